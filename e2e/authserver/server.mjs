// The authorization server of the end-to-end tests: oidc-provider, told to
// issue short-lived JWT access tokens to the clients of clients.json, and a
// small control surface in front of it.
//
//   TTL   lifetime of an access token in seconds; default 5
//
//   GET  /__stats          {"token_requests": 3}
//   POST /__delay?ms=500   answer token requests this much later
//
// It listens on a free loopback port, prints {"issuer": "http://…"} once it is
// ready, and ends when its standard input does, so that it cannot outlive the
// test that started it.
import crypto from 'node:crypto'
import fs from 'node:fs'
import http from 'node:http'
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { Provider } from 'oidc-provider'

const ttl = Number(process.env.TTL ?? 5)
const scope = 'api:read api:write'

const clients = JSON.parse(fs.readFileSync(new URL('clients.json', import.meta.url)))
const { privateKey } = crypto.generateKeyPairSync('rsa', { modulusLength: 2048 })

function newProvider (issuer) {
  const provider = new Provider(issuer, {
    clients: clients.map((client) => ({
      ...client,
      scope,
      grant_types: ['client_credentials'],
      response_types: [],
      redirect_uris: []
    })),
    clientAuthMethods: ['client_secret_basic', 'client_secret_post'],
    scopes: scope.split(' '),
    jwks: { keys: [{ ...privateKey.export({ format: 'jwk' }), kid: 'e2e', use: 'sig', alg: 'RS256' }] },
    ttl: { ClientCredentials: ttl },
    cookies: { keys: [crypto.randomUUID()] },
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      // Without a resource a token is opaque. No default one is set: the
      // gateway is to name it, and is found out if it doesn't.
      resourceIndicators: {
        enabled: true,
        defaultResource: () => undefined,
        getResourceServerInfo: (ctx, resource) => ({
          scope,
          audience: resource,
          accessTokenFormat: 'jwt',
          jwt: { sign: { alg: 'RS256' } }
        })
      }
    }
  })
  for (const event of ['grant.error', 'server_error']) {
    provider.on(event, (ctx, err) => console.error(event, err.message, err.error_description ?? '', err.error_detail ?? ''))
  }
  return provider
}

let tokenRequests = 0
let delay = 0

const server = http.createServer(async (req, res) => {
  const url = new URL(req.url, 'http://authserver')
  switch (url.pathname) {
    case '/__stats':
      res.setHeader('Content-Type', 'application/json')
      res.end(JSON.stringify({ token_requests: tokenRequests }))
      return
    case '/__delay':
      delay = Number(url.searchParams.get('ms'))
      res.end()
      return
    case '/token':
      tokenRequests++
      await sleep(delay)
  }
  handle(req, res)
})

server.listen(0, '127.0.0.1')
await once(server, 'listening')
// The issuer holds the port, which is known only now.
const issuer = `http://127.0.0.1:${server.address().port}`
const handle = newProvider(issuer).callback()
console.log(JSON.stringify({ issuer }))

process.stdin.resume().on('end', () => process.exit())
