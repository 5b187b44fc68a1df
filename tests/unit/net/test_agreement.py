"""Agreeing on a protocol without waiting: the answer is looked at when it comes, however it is split."""

from __future__ import annotations

import pytest
from libp2p.protocol_muxer.multiselect import MULTISELECT_PROTOCOL_ID
from libp2p.utils import encode_delim

from omnistore.errors import RemoteProtocolError
from omnistore.net.agreement import Answer, agreed

SAID = agreed("/omni/transfer/1.0.0")


def test_it_is_what_libraries_say() -> None:
    assert encode_delim(MULTISELECT_PROTOCOL_ID.encode()) + encode_delim(b"/omni/transfer/1.0.0") == SAID
    assert SAID == b"\x13/multistream/1.0.0\n\x15/omni/transfer/1.0.0\n"


@pytest.mark.parametrize("step", [1, 2, 7, 20, len(SAID), 100])
def test_what_follows_is_handed_on(step: int) -> None:
    answer, behind, data = Answer("/omni/transfer/1.0.0"), b"", SAID + b"what follows"
    for start in range(0, len(data), step):
        behind += bytes(answer.take_untrusted(data[start : start + step]))
    assert behind == b"what follows" and answer.lacking == 0


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x13/multistream/1.0.0\n\x03na\n", "does not speak /omni/transfer/1.0.0"),
        (b"\x13/multistream/1.0.0\n\x15/omni/transfer/2.0.0\n", "does not agree"),
        (b"\x13/multistream/1.0.1\n", "does not agree"),
        (b"HTTP/1.1 400 Bad Request\r\n", "does not agree"),
        (b"\0", "does not agree"),
    ],
)
def test_another_answer_is_refused(data: bytes, said: str, step: int) -> None:
    answer = Answer("/omni/transfer/1.0.0")
    with pytest.raises(RemoteProtocolError, match=said):
        for start in range(0, len(data), step):
            answer.take_untrusted(data[start : start + step])
