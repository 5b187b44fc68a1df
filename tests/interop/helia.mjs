// A Helia node that walks a model from its signed manifest to one whole part, block by block.
// Usage: node helia.mjs bitswap MULTIADDR CID  |  node helia.mjs gateway URL CID
// Prints one line of JSON: { part, blocks, bytes }. Helia itself checks every block against its CID.
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { withBitswap } from '@helia/bitswap'
import { withHTTP } from '@helia/http'
import { withLibp2pLight } from '@helia/libp2p'
import * as dagCbor from '@ipld/dag-cbor'
import { identify } from '@libp2p/identify'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { blake3 } from '@noble/hashes/blake3.js'
import { createHeliaLight } from 'helia'
import { CID } from 'multiformats/cid'
import { from } from 'multiformats/hashes/hasher'

const [mode, where, text] = process.argv.slice(2)
const hasher = from({ name: 'blake3', code: 0x1e, encode: (bytes) => blake3(bytes) })
// Helia turns to its gateways when its routers found nobody; without any router it waits for ever.
const nobody = { name: 'nobody', async * findProviders () {} }
const light = createHeliaLight({ codecs: [dagCbor], hashers: [hasher], routers: [nobody] })
const helia = mode === 'gateway'
  ? withHTTP(light, { delegatedRouters: [], recursiveGateways: [where], allowInsecure: true, allowLocal: true })
  : withBitswap(withLibp2pLight(light, {
    addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
    transports: [tcp()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    services: { identify: identify() }
  }))
// Timers of abort signals do not keep a process alive.
setInterval(() => {}, 1000)
await helia.start()
if (mode === 'bitswap') await helia.libp2p.dial(multiaddr(where))

async function bytesOf (cid) {
  const got = await helia.blockstore.get(cid, { signal: AbortSignal.timeout(60_000) })
  if (got instanceof Uint8Array) return got
  const pieces = []
  for await (const piece of got) pieces.push(piece)
  return Buffer.concat(pieces)
}
const nodeOf = async (cid) => dagCbor.decode(await bytesOf(cid))

const signed = await nodeOf(CID.parse(text))
const manifest = await nodeOf(signed.manifest)
const last = manifest.parts[manifest.parts.length - 1]
const part = await nodeOf(last.link)
const links = new Map(part.tensors.flatMap((tensor) => tensor.blocks).map((cid) => [cid.toString(), cid]))
let bytes = 0
for (const cid of links.values()) bytes += (await bytesOf(cid)).length
console.log(JSON.stringify({ part: last.link.toString(), blocks: links.size, bytes }))
await helia.stop()
process.exit(0)
