// A requester of /omni/transfer/1.0.0, written from spec/05-transfer.md alone: it fetches one whole part of a model,
// asks for every block of it at once, and checks every payload against its CID before it counts.
import * as dagCbor from '@ipld/dag-cbor'
import { byteStream } from '@libp2p/utils'
import { blake3 } from '@noble/hashes/blake3.js'
import { CID } from 'multiformats/cid'

export const PROTOCOL = '/omni/transfer/1.0.0'
const MAX_MESSAGE = 65_536
const MAX_PAYLOAD = 2_097_152

class Requester {
  constructor (stream) {
    this.bytes = byteStream(stream, { maxBufferSize: 64 << 20 })
    this.asked = 0
  }

  async send (message) {
    const body = dagCbor.encode(message)
    const length = Buffer.alloc(4)
    length.writeUInt32BE(body.length)
    await this.bytes.write(length)
    await this.bytes.write(body)
  }

  async receive () {
    const length = Buffer.from(await this.exactly(4)).readUInt32BE(0)
    if (length === 0 || length > MAX_MESSAGE) throw new Error(`a message of ${length} bytes`)
    const message = dagCbor.decode(await this.exactly(length))
    const names = Object.keys(message)
    if (names.length !== 1) throw new Error(`a message with ${names.length} keys`)
    if (names[0] === 'error') throw new Error(`the server ends: ${message.error.code} ${message.error.text}`)
    return [names[0], message[names[0]]]
  }

  async exactly (bytes) {
    return (await this.bytes.read({ bytes, signal: AbortSignal.timeout(20_000) })).slice()
  }

  // Every one of these CIDs, in the order of arrival: [cid, payload].
  async * fetch (cids) {
    const first = this.asked
    this.asked += cids.length
    await this.send({ want: { first, links: cids } })
    for (let left = cids.length; left > 0; left--) {
      const [name, value] = await this.receive()
      if (name !== 'block') throw new Error(`${name} where blocks were asked for`)
      if (value.size < 1 || value.size > MAX_PAYLOAD) throw new Error(`a block of ${value.size} bytes`)
      const cid = cids[value.ask - first]
      const payload = await this.exactly(value.size)
      if (Buffer.compare(blake3(payload), cid.multihash.digest) !== 0) throw new Error(`a lie about ${cid}`)
      yield [cid, payload]
    }
  }

  async node (cid) {
    for await (const [, payload] of this.fetch([cid])) return dagCbor.decode(payload)
  }
}

// Walk from a signed manifest to its last part, and fetch that whole.
export async function fetchLastPart (stream, text) {
  const requester = new Requester(stream)
  const [name, hello] = await requester.receive()
  if (name !== 'hello') throw new Error(`${name} before the hello`)
  const signed = await requester.node(CID.parse(text))
  const manifest = await requester.node(signed.manifest)
  const last = manifest.parts[manifest.parts.length - 1]
  const part = await requester.node(last.link)
  const links = part.tensors.flatMap((tensor) => tensor.blocks)
  await requester.send({ have: { parts: [last.link] } })
  const [answer, holds] = await requester.receive()
  if (answer !== 'holds' || holds.part.toString() !== last.link.toString()) throw new Error('another answer')
  if (holds.blocks.length !== Math.ceil(links.length / 8)) throw new Error('a bitmap of another length')
  const missing = links.findIndex((_, index) => !(holds.blocks[index >> 3] & (1 << (index & 7))))
  if (missing >= 0) throw new Error(`block ${missing} is not held`)
  const wanted = [...new Map(links.map((cid) => [cid.toString(), cid])).values()]
  let bytes = 0
  const most = Math.min(hello.asks, 1024)
  for (let start = 0; start < wanted.length; start += most) {
    for await (const [, payload] of requester.fetch(wanted.slice(start, start + most))) bytes += payload.length
  }
  await stream.close()
  return { part: last.link.toString(), blocks: wanted.length, bytes }
}
