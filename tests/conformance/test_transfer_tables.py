"""The message table of spec/05-transfer, run: what it allows is taken, what is just outside is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from omnistore import dagcbor
from omnistore.cid import CID, RAW
from omnistore.errors import RemoteProtocolError
from omnistore.transfer.messages import ERROR_CODES, LENGTH_SIZE, LIMITS, REQUESTER, SERVER, Decoder
from tests.conformance.write_transfer_vectors import VECTORS

SPEC = (VECTORS.parent / "05-transfer.md").read_text()
NUMBER = 1 << 53
ROW = re.compile(r"\| `([a-z]+)` \| (server|requester) \| (.+) \|")
FIELD = re.compile(r"`([a-z]+)`: (.*)")
RANGE = re.compile(r"([\d,]+) to ([\d,]+)")


def rows() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Message, who sends it, and its fields as they are described."""
    section = SPEC.partition("## Messages")[2].partition("## The server")[0]
    for line in section.splitlines():
        found = ROW.fullmatch(line)
        if found:
            fields = (FIELD.fullmatch(field.strip()) for field in found[3].split(" · "))
            yield found[1], found[2], {match[1]: match[2] for match in fields if match}


def link(number: int) -> CID:
    return CID.of_digest(RAW, number.to_bytes(32, "big"))


def values(described: str) -> tuple[list[Any], list[Any]]:
    """What a field's description allows, at its bounds, and what lies just outside."""
    found = RANGE.search(described)
    low, high = (int(text.replace(",", "")) for text in found.groups()) if found else (0, NUMBER)
    if "different" in described:
        item = link if "links" in described else int
        made = [[item(number) for number in range(count)] for count in (low, high, low - 1, high + 1)]
        return made[:2], [*made[2:], [item(0), item(0)], [None], "0"]
    if "bitmap" in described:
        taken: list[Any] = [bytes(low), bytes(high), *([None] if "or null" in described else [])]
        return taken, [bytes(low - 1), bytes(high + 1), "00", 0]
    if described == "link":
        return [link(0)], [str(link(0)), link(0).binary, None]
    if "characters" in described:
        most = int(re.search(r"at most (\d+) characters", described)[1])  # type: ignore[index]
        return ["", "ü" * most], ["x" * (most + 1), b"", None]
    codes = re.findall(r"`([a-z-]+)`", described)
    if codes:
        return list(codes), ["", "Busy", None, 0]
    return [low, high], [low - 1, high + 1, True, str(low), None]


def message(name: str, fields: dict[str, Any]) -> bytes:
    body = dagcbor.encode({name: fields})
    return len(body).to_bytes(LENGTH_SIZE, "big") + body


def taken(side: str, data: bytes) -> bool:
    try:
        Decoder(SERVER if side == "server" else REQUESTER).feed_untrusted(data)
    except RemoteProtocolError:
        return False
    return True


MESSAGES = {name: (side, fields) for name, side, fields in rows()}


def test_the_table_is_whole() -> None:
    assert {name for name, (side, _) in MESSAGES.items() if side == "requester"} == REQUESTER
    assert {name for name, (side, _) in MESSAGES.items() if side == "server"} == SERVER
    assert set(values(MESSAGES["error"][1]["code"])[0]) == ERROR_CODES


@pytest.mark.parametrize("name", MESSAGES)
def test_every_field_has_the_range_that_is_written(name: str) -> None:
    side, fields = MESSAGES[name]
    ranges = {field: values(described) for field, described in fields.items()}
    least = {field: good[0] for field, (good, _) in ranges.items()}
    for field, (good, bad) in ranges.items():
        for value in good:
            # The last of 2^53 numbers has no room for a second ask behind it.
            if (name, field, value) != ("want", "first", NUMBER):
                assert taken(side, message(name, {**least, field: value})), (field, value)
        for value in bad:
            assert not taken(side, message(name, {**least, field: value})), (field, value)
        assert not taken(side, message(name, {key: one for key, one in least.items() if key != field}))
    assert not taken(side, message(name, {**least, "more": 0}))
    assert not taken("server" if side == "requester" else "requester", message(name, least))


def test_the_limits_are_those_of_the_code() -> None:
    section = SPEC.partition("### Limits")[2].partition("###")[0]
    written = {
        cells[1].strip(): int(cells[2].replace(",", "").replace("bytes", "").replace("2^53", str(NUMBER)))
        for cells in (line.split("|") for line in section.splitlines())
        if len(cells) == 5 and cells[2].strip()[:1].isdigit()
    }
    assert written == {
        "message, without length and payload": LIMITS.message,
        "payload": LIMITS.payload,
        "links in a `want`, asks in a `cancel` or `missing`": LIMITS.links,
        "parts in a `have`": LIMITS.queries,
        "bitmap": LIMITS.bitmap,
        "ask numbers": LIMITS.number,
    }
