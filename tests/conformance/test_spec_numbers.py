"""The numbers that spec/04-discovery and spec/05-transfer name as ours, against the constants they stand for.

Each sentence is written here once more with the constant in the place of its number: whoever changes one
without the other is told so.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from pathlib import Path

import pytest
from libp2p.kad_dht import provider_store, value_store

from omnistore import joining
from omnistore.cli import seed
from omnistore.config import Config, settings
from omnistore.dht import lookup, records, schedule, service, values
from omnistore.http.gateway import CAR_MOST, CAR_STREAMS
from omnistore.http.server import LIMITS as HTTP
from omnistore.net import (
    acquaintances,
    addresses,
    autonat,
    circuit_transport,
    circuits,
    dcutr,
    dialback,
    dialing,
    holepunch,
    igd,
    isolation,
    kademlia,
    libp2p,
    mdns,
    port_mapping,
    reachability,
    relay_choice,
    relay_use,
    upnp,
    yamux,
)
from omnistore.net import frames as f
from omnistore.net import records as noise
from omnistore.net.muxing import LIMITS as MUX
from omnistore.node import WATCH_EVERY
from omnistore.transfer import (
    bitswap,
    bitswap_server,
    client,
    hinting,
    hints,
    outflow,
    ranges,
    rate,
    serve,
    server,
    swarm,
    web,
    window,
)
from omnistore.transfer.compare import COMPARED
from omnistore.transfer.source import EARLY_MOST
from tests.conformance.write_transfer_vectors import VECTORS

DISCOVERY, TRANSFER = (
    " ".join((VECTORS.parent / name).read_text().split()) for name in ("04-discovery.md", "05-transfer.md")
)
CONFIG = Config(Path("unused"))
MIB, KIB = 1 << 20, 1 << 10
NET, PACE, RELAY, BACK = (
    libp2p.NetworkOptions(),
    schedule.Pace(),
    circuits.RelayLimits(),
    dialback.DialBackLimits(),
)
SERVE, SESSION, FLOW, SWARM = serve.LIMITS, window.LIMITS, window.FLOW, swarm.LIMITS
WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 8: "eight", 12: "twelve", 16: "sixteen", 32: "32"}


def many(number: int) -> str:
    return WORDS[number]


IN_DISCOVERY = [
    f"identity multihashes of at most {records.MAX_PEER_ID} bytes",
    f"The default port is {addresses.DEFAULT_PORT}",
    f"Ours: a ping every {NET.liveness.ping_every:g} s; a connection on which nothing arrives for"
    f" {NET.liveness.patience:g} s after a ping, or whose socket takes no bytes for"
    f" {NET.liveness.patience:g} s",
    f"{MUX.buffered // MIB} MiB of data that no stream took, {MUX.control // KIB} KiB of answers not taken",
    f"data frames of at most {f.MAX_PAYLOAD // KIB} KiB, in Noise records of up to {noise.MAX_PLAINTEXT:,}"
    f" bytes",
    f"lets a window grow to {MUX.window // MIB} MiB while half of it is used within one and a half round"
    f" trips,"
    f" or {many(round(MUX.growth_trips_far))} where a round trip takes {MUX.far * 1000:g} ms or more, or, up"
    f" to {MUX.bridge // MIB} MiB, within {MUX.growth_least * 1000:g} ms; all windows"
    f" of a connection by {MUX.growth // MIB} MiB together",
    f"Ours: {NET.dial_deadline:g} s for a dial (`dial_timeout`), all addresses of the peer together"
    f" ({dialing.MAX_ADDRESSES} of"
    f" them at most), a next address every {dialing.STAGGER * 1000:g} ms until one answers;"
    f" {NET.open_deadline:g} s to agree on a stream's protocol; at most {CONFIG.connections} connections"
    f" (`connections` in the configuration), and {isolation.MAX_INBOUND_STREAMS} inbound streams of one peer",
    f"A record expires {provider_store.PROVIDER_RECORD_EXPIRATION_INTERVAL // 3600} hours after",
    f"every {PACE.interval * 0.8 / 3600:g} to {PACE.interval / 3600:g} hours, at a time that depends on"
    f" the key",
    f"the message {kademlia.MAX_ANSWER // MIB} MiB; {records.MAX_PEERS} peers (more is a protocol error);"
    f" {records.MAX_ADDRS} addresses of each",
    f"{CONFIG.dht_keys:,} keys (`dht_keys` in the configuration), {provider_store.BUCKET_SIZE} providers"
    f" of each,"
    f" {kademlia.ANNOUNCEMENTS:,} announcements of one peer in 10 s, {kademlia.STREAMS} questions at once",
    f"asks the closest {lookup.WIDTH} that have not failed with `GET_PROVIDERS`, {lookup.PARALLEL} at a time",
    f"One dead peer delays nobody else: it has {service.ASK_DEADLINE:g} s",
    f"At most {lookup.MAX_KNOWN:,} peers are remembered",
    f"A lookup has {service.WALK_DEADLINE:g} s in all",
    f"of at most {values.MAX_KEY} bytes, a value at most {values.MAX_VALUE:,} bytes",
    f"the same one again for another {value_store.DEFAULT_TTL // 3600} hours",
    f"before all others, {PACE.parallel} at a time",
    f"again after {PACE.interval / 3600:g} h × (0.8 … 1.0, by the key)",
    f"again after {PACE.retry_first:g} s, {2 * PACE.retry_first:g} s, {4 * PACE.retry_first:g} s …"
    f" {PACE.retry_most / 60:g} min",
    f"keys with fewer than {PACE.copies} copies: again after {PACE.settle:g} s if they have none, else not"
    f" within"
    f" {PACE.gap:g} s of the last time",
    f"Not more than {PACE.burst} announcements at once, and {PACE.rate:g} a second after that",
    f"after {joining.REJOIN_FIRST:g} s, 2 s … {joining.REJOIN_MOST:g} s again",
    f"up to {acquaintances.MAX_PEERS}, each with {acquaintances.MAX_ADDRS} of the addresses it gave, for"
    f" {acquaintances.MAX_AGE / 86400:g} days",
    f"A seed tries the last {joining.RECALLED} of them once",
    f"for each of its TCP addresses on the local network, at most {mdns.MAX_ADDRS}",
    f"Ours: a node stays connected to {joining.LAN_PEERS} of them at most, tries each again after 1 s, 2 s"
    f" … and lets"
    f" it go after {joining.LAN_TRIES} failures; a command that was told of nobody waits"
    f" {joining.LAN_PATIENCE:g} s",
    f"reserves at {many(relay_choice.MOST)} of the peers",
    f"A relay where {many(relay_use.TRIES)} reservations in a row failed is left alone for"
    f" {relay_choice.AGAIN / 60:g} minutes",
    f"(after {circuit_transport.RETRY_FIRST:g} s, 2 s … {circuit_transport.RETRY_MOST:g} s)",
    f"addresses through relays are tried, {many(dialing.MAX_CIRCUITS)} at most",
    f"{CONFIG.relay_reservations} reservations (`relay_reservations`), {RELAY.reservations_per_host} of"
    f" one IP"
    f" address, for an hour; {CONFIG.relay_circuits} circuits (`relay_circuits`),"
    f" {RELAY.circuits_per_peer} with one"
    f" peer at either end; {CONFIG.relay_bytes >> 30} GiB (`relay_bytes`) and {CONFIG.relay_time / 3600:g}"
    f" hours"
    " (`relay_time`)",
    f"A question has {RELAY.opening_seconds:g} s to arrive whole, a target {RELAY.opening_seconds:g} s to"
    f" answer",
    f"({many(BACK.ports)} at most of {many(autonat.MAX_ADDRS)} addresses)",
    f"{BACK.seconds:g} s for all of a question; {BACK.per_peer} a minute from one peer, {BACK.per_host}"
    f" from one IP"
    f" address, {BACK.in_all} in all",
    f"again every {reachability.RENEW / 60:g} minutes, {many(reachability.WANTED)} peers of different"
    f" networks, up to"
    f" {many(reachability.MOST)} while they disagree",
    f"what {many(reachability.NEEDED)} networks say",
    f"asks for {port_mapping.LEASE} s, and again at half of what it got; a seed that ends takes"
    f" the mapping back (it has {upnp.UNMAP_SECONDS:g} s for it)",
    f"less than {port_mapping.SHORTEST} s",
    f"{many(port_mapping.PORTS - 1)} others at random from {port_mapping.ANY_PORT[0]} to"
    f" {port_mapping.ANY_PORT[1]}",
    f"after {port_mapping.RETRY:g} s, and after twice as long each time,"
    f" {port_mapping.RETRY_MOST:g} s at most",
    f"which has {igd.SECONDS} s and {igd.MEMORY // MIB} MiB",
    f"once a minute with one peer, with {many(holepunch.AT_ONCE)} peers at once",
    f"waits {dcutr.IDENTIFY_SECONDS:g} s for the other end's identify",
    f"at the addresses that that lists there, {dcutr.REVERSAL_SECONDS:g} s",
    f"both for {dcutr.DIAL_SECONDS:g} s, again every second where a dial is refused",
    f"a message of more than {dcutr.MAX_MESSAGE // KIB} KiB, out of turn, or {dcutr.MESSAGE_SECONDS:g} s"
    f" late ends"
    f" it, as does a round trip of over {holepunch.LONGEST:g} s",
]  # fmt: skip
IN_TRANSFER = [
    f"Ours has {server.LAST_WORDS:g} s to bring the last word",
    f"at most {SERVE.streams} streams (`serve_streams` in the configuration),"
    f" {SERVE.streams_per_peer} per peer",
    f"deaf for {serve.DEAF:g} s or with nothing asked for {serve.UNUSED:g} s",
    f"`hello` offers {SERVE.asks} asks and {SERVE.queries} queries",
    f"a turn is one query or up to {SERVE.batch} blocks",
    f"at most {SERVE.memory // MIB} MiB (`serve_memory`) read and not yet sent in all, and no more than"
    f" leaves in half"
    f" a second at the measured rate (at least {outflow.AHEAD_LEAST // MIB} MiB)",
    f"at most {SERVE.ahead // MIB} MiB (`serve_peer_memory`) and at most half of what is free",
    f"lets others pass for {many(SERVE.passes)} rounds at most; nodes, and the first {SERVE.first} blocks"
    f" of a stream",
    f"for {outflow.STUCK:g} to {outflow.STUCK_MOST:g} s (for {serve.HESITANT:g} s, if it never took in"
    f" {serve.PROVEN // MIB} MiB), and after {server.SEND_PATIENCE:g} s it is dropped; after"
    f" {serve.DEAF:g} s already",
    f"Pieces are of {server.SLOW_PIECE // KIB} KiB",
    f"is looked at every {server.NEWS_EVERY:g} s (and for at most a tenth of the time), until there is"
    f" news; at most"
    f" {SERVE.polls} parts are, over all streams, and {2 * SERVE.queries} parts are remembered as told per"
    f" stream",
    f"a stream with nothing asked for {server.IDLE_PATIENCE / 60:g} minutes is ended (`idle`)",
    f"({rate.PIECE * 1000:g} ms of the rate, {rate.PIECE_LEAST // KIB} to {rate.PIECE_MOST // KIB} KiB)",
    f"At most {FLOW.ceiling // MIB} MiB are asked and unanswered over all peers (`window`). Each peer's"
    f" own window"
    f" starts at {FLOW.least // MIB} MiB and is then {many(round(FLOW.gain))} times its bandwidth-delay"
    f" product: the"
    f" highest of its last {many(FLOW.samples)} measured rates times (its shortest time from ask to answer +"
    f" {FLOW.queueing * 1000:g} ms)",
    f"at most {SESSION.peers} peers are asked at once (`peers` in the configuration) of {SWARM.candidates}"
    f" that are known",
    f"A server has {SWARM.hello:g} s to greet",
    f"is queried again {SESSION.refresh:g} s after it last told",
    f"({EARLY_MOST} of them at most)",
    f"so that at most {100 // SESSION.duplicate_share} % of the wanted bytes (at least"
    f" {SESSION.duplicate_least // MIB} MiB) do",
    f"sends no byte for {FLOW.silence_factor:g} times as long as a block should take it"
    f" ({FLOW.silence_least:g} to"
    f" {FLOW.silence_most:g} s)",
    f"dialled again after {SWARM.redial_least:g} s, doubling to {SWARM.redial_most:g} s",
    f"answers nothing for {FLOW.answer_most:g} s though others hold all it owes",
    f"(more than {SWARM.unverified} blocks wait to be verified)",
    f"after {SESSION.probe:g} s of silence a requester cancels the last of its asks",
    f"After {SESSION.provider_timeout:g} s (`provider_timeout`) in which no joined peer"
    f" held anything missing: no providers. After"
    f" {SESSION.stall_timeout:g} s (`stall_timeout`) without one verified block: timed out",
    f"in memory (at most {client.MAX_HEADER_BYTES // MIB} MiB)",
    f"again every {client.DISCOVERY_SOON:g} s while something is lacking, else after 6, 12, 24 s and then"
    f" every"
    f" {client.DISCOVERY_LATER:g} s",
    f"with one range request: up to {ranges.RANGE_MOST // MIB} MiB, gaps of up to {ranges.GAP_MOST // KIB}"
    f" KiB read and"
    f" thrown away, over at most {many(web.CONNECTIONS)} connections to one mirror",
    f"one request each, {many(web.GATEWAY_CONNECTIONS)} at a time",
    f"followed, {many(web.REDIRECTS)} at most",
    f"(at most {ranges.RETRY_MOST / 60:g} minutes; {web.ASK_LATER:g} s if it does not)",
    f"silence ({web.CONNECT_PATIENCE:g} s to connect, {web.READ_PATIENCE:g} s for the next bytes)",
    f"at most {hints.LIMITS.message:,} bytes; whatever is malformed ends the stream",
    f"`urls`: 0 to {hints.LIMITS.urls} different texts",
    f"has 1 to {hints.LIMITS.url} characters",
    f"asks each server for {COMPARED // KIB} KiB at either end",
    f"It answers {hinting.STREAMS} at once, each within {hinting.PATIENCE:g} s",
    f"asks the first {many(hinting.ASKED)} peers that joined",
    f"that most peers named, {many(hints.FOLLOWED)} of them at most",
    f"At most 2^{math.log2(CAR_MOST):g} blocks in one, {CAR_STREAMS} under way",
    f"At most {HTTP.connections} connections (`http_connections`), a request within {HTTP.arrival:g} s,"
    f" {HTTP.sending:g} s for"
    f" a client to"
    " take in a piece",
    f"from at most {many(bitswap_server.STREAMS)} streams of a peer, {bitswap.MAX_WANTS} wants unanswered,"
    f" messages of"
    f" at most {bitswap.MAX_MESSAGE // MIB} MiB",
    f"At most {bitswap_server.PEERS} peers are answered at once",
    f"A peer has {bitswap_server.SEND_PATIENCE:g} s to take in {bitswap_server.PIECE // KIB} KiB, and a"
    f" stream that asks"
    f" is ended when nothing came for {bitswap_server.IDLE_PATIENCE:g} s",
]  # fmt: skip


@pytest.mark.parametrize("sentence", IN_DISCOVERY)
def test_discovery_says_what_the_code_does(sentence: str) -> None:
    assert sentence in DISCOVERY


@pytest.mark.parametrize("sentence", IN_TRANSFER)
def test_transfer_says_what_the_code_does(sentence: str) -> None:
    assert sentence in TRANSFER


def test_halves_and_tenths_are_what_they_are_called() -> None:
    """Sentences that have no number of their own in the text."""
    assert WATCH_EVERY == service.FIND_GRACE == autonat.SETTLE == dcutr.DIAL_AGAIN == 1
    assert dialing.HEAD_START == outflow.AHEAD == circuit_transport.RENEW_AT == 0.5
    assert rate.BURST == 0.25
    assert server.NEWS_SHARE == 10
    assert SESSION.batch_share == 8
    assert SWARM.dials == holepunch.ROUNDS == 3
    assert SWARM.redial_dead == holepunch.PAUSE == dcutr.GRACE == 60
    assert holepunch.TARGETS == 4
    assert MUX.growth_trips == 1.5
    assert RELAY.reservation_seconds == reachability.VALID == 3600
    assert (NET.liveness, MUX.inbound) == (yamux.Liveness(), isolation.MAX_INBOUND_STREAMS)


def test_every_limit_of_the_network_that_can_be_set_is_named() -> None:
    told = set(re.findall(r"`([a-z_]+)`", DISCOVERY.partition("## 12")[2]))
    local = {"busy_timeout", "copy_batch", "sync_batch", "node_grace", "kv_memory", "kv_kept"}
    limits = {
        name for name, one in settings().items() if one.unit in ("bytes", "bytes/s", "seconds", "count")
    }
    assert limits - local <= told
    assert told - {"hello"} <= limits


def test_every_event_of_a_seed_is_in_the_table() -> None:
    section = (VECTORS.parent / "04-discovery.md").read_text().partition("## 8")[2].partition("## 9")[0]
    rows = re.findall(r"^\| (`[a-z_]+`(?: / `[a-z_]+`)?) \|(.*)\|$", section, re.MULTILINE)
    told: dict[str, set[str]] = {}
    for names, described in rows:
        for name in re.findall(r"`([a-z_]+)`", names):
            fields = set(re.findall(r"`([a-z_]+)`", described.partition(":")[0]))
            # `error` is of the second of the two that share a row.
            told[name] = fields - ({"error"} if name == "joined" else set())
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(inspect.getsource(seed))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event":
            assert isinstance(node.args[0], ast.Constant)
            found[str(node.args[0].value)] = {str(keyword.arg) for keyword in node.keywords}
    assert found == told
