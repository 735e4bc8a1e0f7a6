// A resource server of the end-to-end tests: it accepts tokens that are bound to
// a key, with a proof, and verifies both with jose (RFC 9449 §4.3, §7).
//
//   ISSUER, AUDIENCE   of the tokens
//   JWKS               the URL of the keys that sign them
//   TYP                their type, in the header
//   NONCE_SECONDS      how long a nonce is good; 0 or nothing: no nonce is wanted
//
//   GET  /__stats      what it was asked for
//
// It answers each good request with its method, its path and the size of its
// body. It listens on a free loopback port, prints {"api": "127.0.0.1:…"} once
// it is ready, and ends when its standard input does.
import crypto from 'node:crypto'
import http from 'node:http'
import { once } from 'node:events'
import { EmbeddedJWK, calculateJwkThumbprint, createRemoteJWKSet, jwtVerify } from 'jose'

const { ISSUER: issuer, AUDIENCE: audience } = process.env
const keys = createRemoteJWKSet(new URL(process.env.JWKS))
const step = 1000 * Number(process.env.NONCE_SECONDS ?? 0)

const stats = {
  accepted: 0,
  challenged: 0,
  refused: {}, // by reason
  algorithms: {}, // of the proofs that were accepted
  tokens: 0 // different ones
}
const seen = new Set() // jti
const tokens = new Set()

const secret = crypto.randomBytes(32)
const nonceOf = (n) => crypto.createHmac('sha256', secret).update(String(n)).digest('base64url')
const newest = () => Math.floor(Date.now() / step)

// A nonce that a refusal names is good for another second: otherwise the next
// proof might be refused as well.
const promised = new Map() // until when, by nonce
const accepts = (sent, nonce) => sent === nonce || promised.get(sent) > Date.now()

class Refusal extends Error {
  constructor (code, message) {
    super(message)
    this.code = code
  }
}
const proof = (message) => new Refusal('invalid_dpop_proof', message)

async function verifyProof (req, token, nonce) {
  const fields = req.rawHeaders.filter((text, i) => i % 2 === 0 && text.toLowerCase() === 'dpop')
  if (fields.length !== 1) throw proof(`${fields.length} proofs`)
  let verified
  try {
    verified = await jwtVerify(req.headers.dpop, EmbeddedJWK, {
      typ: 'dpop+jwt',
      algorithms: ['ES256', 'EdDSA'],
      requiredClaims: ['jti', 'htm', 'htu', 'iat', 'ath'],
      maxTokenAge: '10 s',
      clockTolerance: '2 s'
    })
  } catch (err) {
    throw proof(err.message)
  }
  const { payload, protectedHeader } = verified
  const target = req.url.split('?')[0]
  const uri = `http://${req.headers.host}${target}`
  if (payload.htm !== req.method) throw proof(`htm ${payload.htm}, method ${req.method}`)
  if (payload.htu !== uri) throw proof(`htu ${payload.htu}, URI ${uri}`)
  if (payload.ath !== crypto.createHash('sha256').update(token).digest('base64url')) throw proof('ath')
  if (step && !accepts(payload.nonce, nonce)) {
    promised.set(nonce, Date.now() + 1000)
    throw new Refusal('use_dpop_nonce', 'nonce')
  }
  if (seen.has(payload.jti)) throw proof('jti was seen before')
  seen.add(payload.jti)
  return { jkt: await calculateJwkThumbprint(protectedHeader.jwk, 'sha256'), alg: protectedHeader.alg }
}

async function verify (req, nonce) {
  const [scheme, token, ...more] = (req.headers.authorization ?? '').split(' ')
  if (scheme !== 'DPoP' || !token || more.length) throw new Refusal('invalid_token', `no DPoP token: ${scheme}`)
  const { jkt, alg } = await verifyProof(req, token, nonce)
  let claims
  try {
    claims = (await jwtVerify(token, keys, { issuer, audience, typ: process.env.TYP })).payload
  } catch (err) {
    throw new Refusal('invalid_token', err.message)
  }
  if (claims.cnf?.jkt !== jkt) throw new Refusal('invalid_token', 'the token is bound to another key')
  tokens.add(token)
  stats.tokens = tokens.size
  stats.algorithms[alg] = (stats.algorithms[alg] ?? 0) + 1
}

const server = http.createServer(async (req, res) => {
  if (req.url === '/__stats') {
    res.end(JSON.stringify(stats))
    return
  }
  let size = 0
  for await (const part of req) size += part.length
  const nonce = nonceOf(newest()) // the time may come for the next one meanwhile
  if (step) res.setHeader('DPoP-Nonce', nonce)
  try {
    await verify(req, nonce)
  } catch (err) {
    if (err.code === 'use_dpop_nonce') {
      stats.challenged++
    } else {
      const reason = `${err.code}: ${err.message}`
      stats.refused[reason] = (stats.refused[reason] ?? 0) + 1
    }
    res.setHeader('WWW-Authenticate', `DPoP error="${err.code}", algs="ES256 EdDSA"`)
    res.writeHead(401).end(err.message)
    return
  }
  stats.accepted++
  res.end(`${req.method} ${req.url} ${size}`)
})
server.listen(0, '127.0.0.1')
await once(server, 'listening')
console.log(JSON.stringify({ api: `127.0.0.1:${server.address().port}` }))

process.stdin.resume().on('end', () => process.exit())
