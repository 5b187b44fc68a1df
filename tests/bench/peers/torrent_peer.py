"""A BitTorrent v2 node on libtorrent, for `bench_peers`; run by the Python of `.peers`.

    python torrent_peer.py create FILE TORRENT           {"seconds": …}
    python torrent_peer.py seed TORRENT DIR CAP          {"addrs": ["127.0.0.1:PORT"]}, then serves until
                                                         stdin ends
    python torrent_peer.py get TORRENT DIR ADDR…         {"seconds": …}

TCP alone, plain text, no DHT, no local discovery, loopback. CAP is bytes per second, 0 for none.
`seconds` of a fetch count from the first byte that came, half a second after the start.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import libtorrent as lt

PIECE = 1 << 20
TICK = 0.01
PATIENCE = 120
SETTINGS = {
    "listen_interfaces": "127.0.0.1:0",
    "enable_outgoing_utp": False,
    "enable_incoming_utp": False,
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    # Two seeders on one address are two peers.
    "allow_multiple_connections_per_ip": True,
    "out_enc_policy": int(lt.enc_policy.pe_disabled),
    "in_enc_policy": int(lt.enc_policy.pe_disabled),
    "hashing_threads": 2,
    # What libtorrent's manual advises for fast links.
    "send_buffer_watermark": 3 << 20,
    "max_out_request_queue": 2000,
}


def create(file: Path, torrent: Path) -> None:
    made = lt.create_torrent(lt.list_files(str(file)), PIECE, lt.create_torrent.v2_only)
    lt.set_piece_hashes(made, str(file.parent))
    torrent.write_bytes(lt.bencode(made.generate()))


def joined(torrent: str, folder: str) -> tuple[Any, Any]:
    """A session, and its torrent in `folder`."""
    session = lt.session(SETTINGS)
    wanted = lt.add_torrent_params()
    wanted.ti, wanted.save_path = lt.torrent_info(torrent), folder
    wanted.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)
    return session, session.add_torrent(wanted)


def whole(handle: Any) -> float:
    """Returns once every piece is here and verified: the seconds since the first byte came."""
    until, started = time.monotonic() + PATIENCE, time.perf_counter()
    while not (status := handle.status()).is_seeding:
        if status.errc.value() or time.monotonic() > until:
            raise SystemExit(f"libtorrent: {status.errc.message()}, {status.progress:.0%} in {PATIENCE} s")
        if not status.total_payload_download:
            started = time.perf_counter()
        time.sleep(TICK)
    return time.perf_counter() - started


def main(verb: str, *words: str) -> None:
    started = time.perf_counter()
    if verb == "create":
        create(Path(words[0]), Path(words[1]))
        seconds = time.perf_counter() - started
    elif verb == "seed":
        session, handle = joined(words[0], words[1])
        # The torrent's own limit: the session's does not hold for local addresses.
        handle.set_upload_limit(int(words[2]))
        whole(handle)
        print(json.dumps({"addrs": [f"127.0.0.1:{session.listen_port()}"]}), flush=True)
        sys.stdin.read()
        return
    else:
        session, handle = joined(words[0], words[1])
        for address in words[2:]:
            host, _, port = address.rpartition(":")
            handle.connect_peer((host, int(port)))
        seconds = whole(handle)
    print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
