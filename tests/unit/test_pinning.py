"""A pin as a request between processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omnistore.cid import CID
from omnistore.errors import InputError
from omnistore.pinning import PinRequest, request_untrusted

MODEL = "bafyr4ib2yddttmwzm2xrzf4arh2mvmtpzb5gvzvqnywcgyimlwetbcwa5m"
PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"


@pytest.mark.parametrize(
    "request_made",
    [
        PinRequest(CID.parse_untrusted(MODEL)),
        PinRequest(CID.parse_untrusted(MODEL), "0-3,embed", (PEER,), (PEER, PEER), Path("/tmp/x.gguf")),
    ],
)
def test_a_request_survives_the_journey(request_made: PinRequest) -> None:
    assert request_untrusted(json.loads(json.dumps(request_made.document()))) == request_made


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (None, "object"),
        ([], "object"),
        ({}, "CID"),
        ({"cid": 1}, "cid: 1"),
        ({"cid": "x"}, "'x'"),
        ({"cid": MODEL, "layer": "1"}, "'layer'"),
        ({"cid": MODEL, "layers": 1}, "layers: 1"),
        ({"cid": MODEL, "peers": PEER}, "peers"),
        ({"cid": MODEL, "peers": [1]}, "peers"),
        ({"cid": MODEL, "peers": ["/ip4/1.2.3.4"]}, "1.2.3.4"),
        ({"cid": MODEL, "bootstrap": [PEER] * 65}, "more than 64"),
        ({"cid": MODEL, "output": "x.gguf"}, "not an absolute path"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(document: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        request_untrusted(document)
