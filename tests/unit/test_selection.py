"""What `--layers` means."""

from __future__ import annotations

import pytest

from omnistore.cid import CID, DAG_CBOR
from omnistore.errors import InputError
from omnistore.manifest import FileEntry, Manifest, PartKey, PartRef
from omnistore.selection import describe_parts, parse_parts


def model(layers: int = 8, *, tied: bool = False) -> Manifest:
    keys = [PartKey("header", 0), PartKey("header", 1), PartKey("shared"), PartKey("embed")]
    keys += [PartKey("layer", n) for n in range(layers)] + ([] if tied else [PartKey("head")])
    refs = tuple(PartRef(key, 1, CID.of_digest(DAG_CBOR, bytes(32))) for key in keys)
    files = (FileEntry("a.gguf", 9), FileEntry("b.gguf", 9))
    return Manifest("m", "llama", "F32", layers, files, refs, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-3", "0-3"),
        ("3", "3"),
        ("embed", "embed"),
        ("head", "head"),
        ("0-1, 4-5,7,head", "0-1,4-5,7,head"),
        ("1,0,1-2", "0-2"),
        ("all", "embed,0-7,head"),
        ("ALL", "embed,0-7,head"),
        ("7-7", "7"),
    ],
)
def test_what_is_selected(text: str, expected: str) -> None:
    parts = parse_parts(text, model())
    assert describe_parts(parts) == expected
    assert parts >= {PartKey("header", 0), PartKey("header", 1), PartKey("shared")}
    assert parse_parts(expected, model()) == parts


def test_a_tied_model_has_no_head_to_select() -> None:
    assert describe_parts(parse_parts("6-7,head", model(tied=True))) == "6-7"


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "''"),
        ("0-", "'0-'"),
        ("-3", "'-3'"),
        ("a", "'a'"),
        ("0,,1", "''"),
        ("3-1", "backwards"),
        ("8", "layer 8"),
        ("0-99", "layer 99"),
        ("0-9999999", "'0-9999999'"),
        ("1.5", "'1.5'"),
        ("header", "'header'"),
        ("０-１", "layer|selects"),
    ],
)
def test_what_is_refused(text: str, culprit: str) -> None:
    with pytest.raises(InputError, match=culprit):
        parse_parts(text, model())


def test_nothing_selected_describes_as_nothing() -> None:
    assert describe_parts([PartKey("header"), PartKey("shared")]) == ""
