// A stock js-libp2p node that does what it is told: one JSON array [command, ...arguments] a line on stdin, one JSON
// object { value } or { error } a line on stdout. Serves /test/echo, and /test/sink, which answers with the BLAKE3 of
// what it read. Prints { value: { peer, addrs } } when it listens; ends with its stdin.
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { autoNAT } from '@libp2p/autonat'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { dcutr } from '@libp2p/dcutr'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { byteStream } from '@libp2p/utils'
import { multiaddr } from '@multiformats/multiaddr'
import { blake3 } from '@noble/hashes/blake3.js'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'
import { PROTOCOL, fetchLastPart } from './transfer.mjs'

const listen = process.argv.length > 2 ? process.argv.slice(2) : ['/ip4/127.0.0.1/tcp/0']
const node = await createLibp2p({
  // A public address is not handed out before somebody has dialled it back, unless it is announced.
  addresses: { listen, announce: listen.filter((addr) => !addr.startsWith('/ip4/127.') && !addr.includes('p2p-circuit')) },
  transports: [tcp(), circuitRelayTransport()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionGater: { denyDialMultiaddr: () => false },
  services: {
    identify: identify({ runOnLimitedConnection: true }),
    ping: ping({ runOnLimitedConnection: true }),
    autonat: autoNAT(),
    dcutr: dcutr(),
    relay: circuitRelayServer(),
    dht: kadDHT({
      protocol: '/omni/kad/1.0.0',
      clientMode: false,
      peerInfoMapper: passthroughMapper,
      allowQueryWithZeroPeers: true
    })
  }
})

// All that a stream has, as a generator of plain arrays.
async function * pieces (stream) {
  for await (const piece of stream) yield piece.subarray()
}
async function write (stream, data) {
  if (!stream.send(data)) await stream.onDrain({ signal: AbortSignal.timeout(30_000) })
}
const limited = { runOnLimitedConnection: true, maxInboundStreams: 64 }
await node.handle('/test/echo', async (stream) => {
  for await (const piece of pieces(stream)) await write(stream, piece)
  await stream.close()
}, limited)
await node.handle('/test/sink', async (stream) => {
  const hash = blake3.create()
  for await (const piece of pieces(stream)) hash.update(piece)
  await write(stream, hash.digest())
  await stream.close()
}, limited)

const open = (peer, protocol) => node.dialProtocol(
  peerIdFromString(peer), protocol, { runOnLimitedConnection: true, signal: AbortSignal.timeout(15_000) }
)
const commands = {
  async dial (addr) {
    const connection = await node.dial(multiaddr(addr), { signal: AbortSignal.timeout(15_000) })
    return { peer: connection.remotePeer.toString(), limited: connection.limits != null }
  },
  async identified (peer) {
    const known = await node.peerStore.get(peerIdFromString(peer))
    return {
      protocols: known.protocols,
      addrs: known.addresses.map((entry) => entry.multiaddr.toString()),
      agent: new TextDecoder().decode(known.metadata.get('AgentVersion'))
    }
  },
  ping: async (peer) => await node.services.ping.ping(peerIdFromString(peer), { runOnLimitedConnection: true }),
  // Have `count` bytes echoed, reading while it writes; the BLAKE3 of what was sent and of what came back.
  async echo (peer, count) {
    const stream = await open(peer, '/test/echo')
    const sent = blake3.create()
    const back = blake3.create()
    const reading = (async () => { for await (const piece of pieces(stream)) back.update(piece) })()
    const piece = new Uint8Array(65_536)
    for (let left = count, number = 0; left > 0; left -= piece.length, number++) {
      piece.fill(number)
      const data = piece.slice(0, Math.min(left, piece.length))
      sent.update(data)
      await write(stream, data)
    }
    await stream.close()
    await reading
    return { sent: Buffer.from(sent.digest()).toString('hex'), back: Buffer.from(back.digest()).toString('hex') }
  },
  fetch: async (peer, cid) => await fetchLastPart(await open(peer, PROTOCOL), cid),
  async find (cid) {
    const found = []
    for await (const provider of node.contentRouting.findProviders(CID.parse(cid), { signal: AbortSignal.timeout(15_000) })) {
      found.push({ peer: provider.id.toString(), addrs: provider.multiaddrs.map(String) })
    }
    return found
  },
  provide: async (cid) => await node.contentRouting.provide(CID.parse(cid), { signal: AbortSignal.timeout(15_000) }),
  addrs: async () => node.getMultiaddrs().map(String),
  connections: async () => node.getConnections().map((one) => ({
    peer: one.remotePeer.toString(), limited: one.limits != null, addr: one.remoteAddr.toString()
  }))
}

const say = (document) => process.stdout.write(JSON.stringify(document) + '\n')
say({ value: { peer: node.peerId.toString(), addrs: node.getMultiaddrs().map(String) } })
for await (const line of createInterface({ input: process.stdin })) {
  const [command, ...args] = JSON.parse(line)
  try {
    say({ value: await commands[command](...args) ?? null })
  } catch (error) {
    say({ error: String(error.stack ?? error) })
  }
}
process.exit(0)
