// The authorization server of the end-to-end tests: oidc-provider, told to
// issue short-lived JWT access tokens, and a small control surface in front
// of it.
//
//   TTL   lifetime of an access token in seconds; default 5
//   TLS   a JSON file with key, cert and client_ca in PEM; default: no TLS
//   SIGNING_KEY   a PEM file with the RSA key that signs tokens
//   DPOP  bind tokens to a key, and demand a nonce in each proof; default: no
//
//   GET  /__stats          what it was asked for, see below
//   POST /__delay?ms=500   answer token requests this much later
//   PUT  /__client         register a client beside those of clients.json, or
//                          replace the one with its id
//
// It listens on free loopback ports, prints {"issuer": "http://…"} once it is
// ready, and ends when its standard input does, so that it cannot outlive the
// test that started it.
//
// Two more issuers, /rfc8414 and /oidc below the first, publish their metadata
// by one path rule each, and offer no method but private_key_jwt. With TLS there
// is an issuer at "https": it doesn't ask for client certificates, but its alias
// at "mtls" does, as RFC 8705 §5 has it.
import crypto from 'node:crypto'
import fs from 'node:fs'
import http from 'node:http'
import https from 'node:https'
import { once } from 'node:events'
import { json } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { Provider } from 'oidc-provider'

const ttl = Number(process.env.TTL ?? 5)
const scope = 'api:read api:write'
const asymmetric = ['RS', 'PS', 'ES'].flatMap((family) => ['256', '384', '512'].map((bits) => family + bits))

// Not generated here: Node 20 hangs in one of a hundred times that it does so.
const privateKey = crypto.createPrivateKey(fs.readFileSync(process.env.SIGNING_KEY))

const clients = new Map()
function register (client) {
  clients.set(client.client_id, {
    ...client,
    scope,
    grant_types: ['client_credentials'],
    response_types: [],
    redirect_uris: []
  })
}
JSON.parse(fs.readFileSync(new URL('clients.json', import.meta.url))).forEach(register)

// The `clients` setting is read once; what comes out of an adapter may change.
const adapter = (model) => {
  const entries = model === 'Client' ? clients : new Map()
  return {
    find: async (id) => entries.get(id),
    upsert: async (id, payload) => { entries.set(id, payload) },
    destroy: async (id) => { entries.delete(id) }
  }
}

const stats = {
  token_requests: 0,
  paths: {}, // how often each was asked for
  granted: {}, // by client
  refused: {}, // by client
  assertions: {} // header and claims of the last that was accepted, by client
}
const count = (counts, key) => { counts[key] = (counts[key] ?? 0) + 1 }

// Behind no proxy, the certificate is the one of the connection.
const peerCertificate = (ctx) => ctx.socket.getPeerX509Certificate?.()

const methods = [
  'client_secret_basic', 'client_secret_post', 'client_secret_jwt', 'private_key_jwt',
  'tls_client_auth', 'self_signed_tls_client_auth'
]

function newProvider (issuer, { clientAuthMethods = methods, discovery = {} } = {}) {
  const provider = new Provider(issuer, {
    adapter,
    clientAuthMethods,
    discovery,
    enabledJWA: { clientAuthSigningAlgValues: ['HS256', 'HS384', 'HS512', ...asymmetric, 'EdDSA'] },
    // A client may ask for no more than its own, which api:admin isn't.
    scopes: [...scope.split(' '), 'api:admin'],
    jwks: { keys: [{ ...privateKey.export({ format: 'jwk' }), kid: 'e2e', use: 'sig', alg: 'RS256' }] },
    ttl: { ClientCredentials: ttl },
    cookies: { keys: [crypto.randomUUID()] },
    assertJwtClientAuthClaimsAndHeader: async (ctx, claims, header, client) => {
      stats.assertions[client.clientId] = { header, claims }
    },
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      mTLS: {
        enabled: true,
        certificateBoundAccessTokens: true,
        tlsClientAuth: true,
        selfSignedTlsClientAuth: true,
        getCertificate: peerCertificate,
        certificateAuthorized: (ctx) => ctx.socket.authorized === true,
        certificateSubjectMatches: (ctx, property, expected) => property === 'tls_client_auth_san_dns' &&
          peerCertificate(ctx).checkHost(expected, { subject: 'never', wildcards: false }) !== undefined
      },
      // It demands the nonces that it names.
      dPoP: process.env.DPOP
        ? { enabled: true, nonceSecret: crypto.randomBytes(32), requireNonce: () => true }
        : { enabled: false },
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
  provider.on('grant.success', (ctx) => count(stats.granted, ctx.oidc.client.clientId))
  provider.on('grant.error', (ctx) => count(stats.refused, ctx.oidc.client?.clientId ?? ''))
  for (const event of ['grant.error', 'server_error']) {
    provider.on(event, (ctx, err) => console.error(event, err.message, err.error_description ?? '', err.error_detail ?? ''))
  }
  return provider.callback()
}

// Where the issuers with a path are found: the issuer's path, and what its
// provider knows the resource by.
const mounted = new Map([
  ['/.well-known/oauth-authorization-server/rfc8414', ['/rfc8414', '/.well-known/oauth-authorization-server']],
  ['/rfc8414/token', ['/rfc8414', '/token']],
  ['/oidc/.well-known/openid-configuration', ['/oidc', '/.well-known/openid-configuration']],
  ['/oidc/token', ['/oidc', '/token']]
])

let delay = 0

const handler = (issuers) => async (req, res) => {
  const url = new URL(req.url, 'http://authserver')
  switch (url.pathname) {
    case '/__stats':
      res.setHeader('Content-Type', 'application/json')
      res.end(JSON.stringify(stats))
      return
    case '/__delay':
      delay = Number(url.searchParams.get('ms'))
      res.end()
      return
    case '/__client':
      register(await json(req))
      res.end()
      return
  }
  count(stats.paths, url.pathname)
  const [at, rest] = mounted.get(url.pathname) ?? ['', url.pathname]
  const provider = issuers.get(at)
  if (!provider) {
    res.writeHead(404).end()
    return
  }
  if (rest === '/token') {
    stats.token_requests++
    await sleep(delay)
  }
  // As Express does: it makes the issuer's own URLs come out right.
  req.originalUrl = at + rest + url.search
  req.url = rest + url.search
  provider(req, res)
}

async function listen (server) {
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return `127.0.0.1:${server.address().port}`
}

// An issuer holds its port, which is known only once the server listens.
const plain = new Map()
const issuer = `http://${await listen(http.createServer(handler(plain)))}`
plain.set('', newProvider(issuer))
for (const at of ['/rfc8414', '/oidc']) {
  plain.set(at, newProvider(issuer + at, { clientAuthMethods: ['private_key_jwt'] }))
}
const ready = { issuer }

if (process.env.TLS) {
  const { key, cert, client_ca: ca } = JSON.parse(fs.readFileSync(process.env.TLS))
  const secure = new Map()
  ready.https = `https://${await listen(https.createServer({ key, cert }, handler(secure)))}`
  // Self-signed certificates are for the provider to judge.
  const mutual = { key, cert, ca, requestCert: true, rejectUnauthorized: false }
  ready.mtls = `https://${await listen(https.createServer(mutual, handler(secure)))}`
  secure.set('', newProvider(ready.https, {
    discovery: { mtls_endpoint_aliases: { token_endpoint: `${ready.mtls}/token` } }
  }))
}
console.log(JSON.stringify(ready))

process.stdin.resume().on('end', () => process.exit())
