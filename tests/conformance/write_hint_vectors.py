"""Writes spec/vectors/mirror-hints.json: `python -m tests.conformance.write_hint_vectors`.

To be run when a vector is added. What was accepted stays accepted under this protocol ID.
"""

from __future__ import annotations

import json
from typing import Any

from omnistore import dagcbor
from omnistore.transfer.hints import LIMITS, encode_answer, encode_question
from tests.conformance.write_transfer_vectors import PART as MODEL
from tests.conformance.write_transfer_vectors import VECTORS, A, frame, prefixed

URLS = ("https://example.org/m/model.gguf", "http://[2606:4700::1]:8080/m/")
SET = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
BAD_URLS = (
    "", "ftp://example.org/x", "HTTPS://example.org/x", "https:/example.org/x", "https://example.org",
    "https://example.org:0/x", "https://example.org:65536/x", "https://u@example.org/x",
    "https://u:p@example.org/x", "https://example.org/x?y", "https://example.org/x#y", "https://example.org/x?",
    "https://example.org/a b", "https://example.org/a\n", "https://example.org/\u00e4", "https://ex\u00e4mple.org/x",
    "https://example.org/" + "x" * (LIMITS.url - 19),
)  # fmt: skip
NOT_PUBLIC = (
    "localhost", "router", "nas.local", "127.0.0.1", "10.0.0.1", "172.31.0.1", "192.168.0.1",
    "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "192.0.2.1", "[::1]",
    "[::]", "[fe80::1]", "[fd00::1]", "[ff02::1]", "[::ffff:10.0.0.1]", "[2002:a00:1::]", "[64:ff9b::a00:1]",
)  # fmt: skip


def document() -> dict[str, Any]:
    """The file's content."""
    question = dagcbor.encode({"which": {"model": MODEL}})
    refused: dict[str, tuple[str, bytes]] = {
        "length 0": ("both", bytes(4)),
        "length 65537": ("both", (65537).to_bytes(4, "big")),
        "no map": ("both", frame([])),
        "two names": ("asker", frame({"mirrors": {"model": MODEL, "urls": []}, "which": {"model": MODEL}})),
        "byte behind the item": ("teller", prefixed(question + b"\0")),
        "a model that is text": ("teller", frame({"which": {"model": str(MODEL)}})),
        "additional field": ("teller", frame({"which": {"model": MODEL, "more": 1}})),
        "missing field": ("asker", frame({"mirrors": {"model": MODEL}})),
        "of another model": ("asker", frame({"mirrors": {"model": A, "urls": []}})),
        "a URL twice": ("asker", frame({"mirrors": {"model": MODEL, "urls": [URLS[0], URLS[0]]}})),
        "65 URLs": (
            "asker",
            frame({"mirrors": {"model": MODEL, "urls": [f"https://a.example/{n}" for n in range(65)]}}),
        ),
        "a URL with a password": (
            "asker",
            frame({"mirrors": {"model": MODEL, "urls": ["https://u:p@example.org/x"]}}),
        ),
        "the asker's message to the asker": ("asker", prefixed(question)),
    }
    split = [f"https://a.example/{SET[1]}", "https://b.example/m/", f"https://a.example/{SET[0]}"]
    return {
        "about": "spec/05-transfer, section Mirror hints; the question in every vector is about `model`",
        "model": str(MODEL),
        "accepted": [
            {"name": "which", "hex": encode_question(MODEL).hex(), "model": str(MODEL)},
            *(
                {"name": name, "hex": encode_answer(MODEL, urls).hex(), "urls": list(urls)}
                for name, urls in (("none", ()), ("two", URLS))
            ),
        ],
        "refused": [{"name": name, "by": by, "hex": data.hex()} for name, (by, data) in refused.items()],
        "urls": {"accepted": list(URLS), "refused": list(BAD_URLS)},
        "hosts": {
            "public": ["example.org", "a.b.example", "9.9.9.9", "[2620:fe::fe]"],
            "not public": list(NOT_PUBLIC),
        },
        "sets": [
            {
                "files": list(SET),
                "urls": split,
                "mirrors": {
                    "https://a.example/": [split[2], split[0]],
                    "https://b.example/m/": [f"https://b.example/m/{name}" for name in SET],
                },
            },
            {
                "files": ["m.gguf"],
                "urls": ["https://a.example/other-name", "https://b.example/m/"],
                "mirrors": {
                    "https://a.example/other-name": ["https://a.example/other-name"],
                    "https://b.example/m/": ["https://b.example/m/m.gguf"],
                },
            },
        ],
    }  # fmt: skip


if __name__ == "__main__":
    (VECTORS / "mirror-hints.json").write_text(json.dumps(document(), indent=1) + "\n")
