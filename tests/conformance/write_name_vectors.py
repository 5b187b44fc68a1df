"""Writes spec/vectors/names.json and invites.json: `python -m tests.conformance.write_name_vectors`.

To be run when a vector is added. A change to what was there before is a change of the format.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from blake3 import blake3

from omnistore import dagcbor
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.dht.names import MAX_RECORD, name_key, sign
from omnistore.invite import MAX_TOKEN, PREFIX, invite
from omnistore.keys import PrivateKey

VECTORS = Path(__file__).resolve().parent.parent.parent / "spec" / "vectors"
SEED = bytes(31) + b"\x01"
KEY = PrivateKey(SEED)
ONE, TWO = (CID.of_digest(DAG_CBOR, blake3(text).digest()) for text in (b"one", b"two"))
ADDR = f"/ip4/192.0.2.1/tcp/4141/p2p/{KEY.public.peer_id}"


def fields(data: bytes, limit: int) -> dict[str, Any]:
    node = dagcbor.decode_untrusted(data, limit=limit)
    assert isinstance(node, dict)
    return dict(node)


def names() -> dict[str, Any]:
    records = [
        sign(KEY, "llama-3.1", ONE, 1, 2_000_000_000),
        sign(KEY, "llama-3.1", TWO, 2, 2_000_000_000),
        sign(KEY, "llama-3.1", ONE, 2, 2_000_000_000),
        sign(KEY, "a" * 63, ONE, (1 << 53) - 1, (1 << 53) - 1),
    ]
    node = fields(records[0].encode(), MAX_RECORD)
    bad: dict[str, Any] = {
        "a name of capitals": node | {"name": "Llama"},
        "another name": node | {"name": "llama-3.2"},
        "another value": node | {"value": TWO},
        "a value that is a raw block": node | {"value": CID.of_digest(RAW, ONE.digest)},
        "a higher sequence number": node | {"sequence": 2},
        "sequence number 0": node | {"sequence": 0},
        "a later expiry": node | {"not-after": 2_000_000_001},
        "an unknown field": node | {"more": 1},
        "version 2": node | {"omni": 2},
        "a publisher of small order": node | {"publisher": node["publisher"][:4] + bytes(32)},
        "a short signature": node | {"signature": node["signature"][:63]},
    }
    return {
        "about": "spec/07-names: records by an Ed25519 seed, records to refuse, and which one counts",
        "seed": SEED.hex(),
        "records": [
            {
                "name": record.name,
                "value": str(record.value),
                "sequence": record.sequence,
                "not_after": record.not_after,
                "key": name_key(record.publisher, record.name).decode(),
                "record": record.encode().hex(),
            }
            for record in records
        ],
        "bad": {fault: dagcbor.encode(value).hex() for fault, value in bad.items()},
        "selection": [
            {"found": [0, 1], "seen": None, "now": 1, "record": 1, "forked": False},
            {"found": [1, 2], "seen": None, "now": 1, "record": _larger(records, 1, 2), "forked": True},
            {"found": [2], "seen": 1, "now": 1, "record": _larger(records, 1, 2), "forked": True},
            {"found": [0], "seen": 1, "now": 1, "record": None, "forked": False},
            {"found": [0, 1], "seen": None, "now": 2_000_000_001, "record": None, "forked": False},
        ],
    }


def _larger(records: list[Any], one: int, other: int) -> int:
    return one if records[one].encode() > records[other].encode() else other


def token_of(body: bytes) -> str:
    text = base64.b32encode(body + blake3(body).digest()[:4]).decode()
    return PREFIX + text.rstrip("=").lower()


def invites() -> dict[str, Any]:
    tokens = [invite(KEY, b"\x5a" * 32, (ADDR,), 2_000_000_000), invite(KEY, bytes(32), (), 1)]
    good = tokens[0].encode()
    letters = good[len(PREFIX) :].upper()
    node = fields(base64.b32decode(letters + "=" * (-len(letters) % 8))[:-4], MAX_TOKEN)
    bad: dict[str, Any] = {
        "another key": node | {"psk": bytes(32)},
        "a key of 31 bytes": node | {"psk": bytes(31)},
        "other addresses": node | {"bootstrap": []},
        "a later expiry": node | {"not-after": 2_000_000_001},
        "an unknown field": node | {"more": 1},
        "version 2": node | {"omni": 2},
    }
    return {
        "about": "spec/08-private-swarms: tokens by an Ed25519 seed, and tokens to refuse at time 0",
        "seed": SEED.hex(),
        "tokens": [
            {
                "psk": token.psk.hex(),
                "bootstrap": list(token.bootstrap),
                "not_after": token.not_after,
                "token": token.encode(),
            }
            for token in tokens
        ],
        "bad": {fault: token_of(dagcbor.encode(value)) for fault, value in bad.items()}
        | {"one letter changed": good[:-1] + ("a" if good[-1] != "a" else "b"), "cut short": good[:-8]},
        "cipher": {
            "key": "1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389",
            "nonce": "69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37",
            "stream": "eea6a7251c1e72916d11c2cb214d3c252539121d8e234e652d651fa4c8cff880",
        },
    }


def main() -> None:
    for name, document in (("names", names()), ("invites", invites())):
        (VECTORS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
