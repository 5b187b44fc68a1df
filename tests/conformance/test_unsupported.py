"""The list of what is not supported says what is really said, and nothing on it has come to be supported."""

from __future__ import annotations

import json
import re

import pytest

from omninfer.engines import ENGINES
from omninfer.testing.parity import EVERY, EXACT, QUANTISED
from tests.parity.logits import ROUNDING
from tests.parity.unsupported import FILE, models, text

TABLE = FILE.with_name("table.md")


def test_the_list_says_what_is_said() -> None:
    assert FILE.read_text(encoding="utf-8") == text(), "run: python -m tests.parity.unsupported --write"


@pytest.mark.parametrize(("what", "error"), list(models()), ids=lambda value: value)
def test_each_is_refused_by_a_name_of_its_own(what: str, error: str) -> None:
    assert error and "MalformedGGUF" not in error, f"{what} is not refused, or not as what it is"


def test_the_table_of_parity_is_whole_and_without_a_miss() -> None:
    """Every architecture × type × engine, as `make parity-table` left it."""
    sections = re.split(r"^## ", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        name, _, header, _, *rows = section.strip().split("\n")
        kinds = [cell.strip() for cell in header.strip("|").split("|")][1:]
        assert kinds == [*EXACT, *QUANTISED], name
        cells = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in rows}
        assert list(cells) == list(EVERY), name
        found[name] = json.dumps(cells)
        assert all(re.fullmatch(r"[01]\.\d{5}|–", cell) for row in cells.values() for cell in row), name
    assert sorted(found) == sorted([*ENGINES, ROUNDING])
    assert "–" not in found["numpy"] and "–" not in found["mlx"]
