"""Configuration files: what may stand in them, and what is said when something else does."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.config import FILE_NAME, Config, read_config, settings
from omnistore.errors import BadConfig
from omnistore.settings import (
    MAX_FILE,
    METADATA,
    Unit,
    Value,
    parse_file_untrusted,
    parse_quantity_untrusted,
    written,
)

ADDR = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("0", "bytes", 0),
        ("20GB", "bytes", 20_000_000_000),
        ("20 GB", "bytes", 20_000_000_000),
        ("1.5kB", "bytes", 1500),
        ("64MiB", "bytes", 64 << 20),
        ("7B", "bytes", 7),
        ("9007199254740993", "bytes", 9007199254740993),
        ("10MB/s", "bytes/s", 10_000_000),
        ("1MiB/s", "bytes/s", 1 << 20),
        ("5000", "bytes/s", 5000),
        ("22h", "seconds", 79200.0),
        ("1.5h", "seconds", 5400.0),
        ("250ms", "seconds", 0.25),
        ("15min", "seconds", 900.0),
        ("7d", "seconds", 604800.0),
        ("3", "seconds", 3.0),
    ],
)
def test_quantities_are_read(text: str, unit: Unit, value: float) -> None:
    assert parse_quantity_untrusted(text, unit) == value


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("", "bytes"), ("-1", "bytes"), ("20gb", "bytes"), ("20Gb", "bytes"), ("10MB/s", "bytes"),
        ("10MB", "bytes/s"), ("10/s", "bytes/s"), ("1h", "bytes"), ("5 GB", "seconds"), ("5h/s", "seconds"),
        ("1e9", "bytes"), ("nan", "seconds"), ("٣", "bytes"), ("1" * 30, "bytes"), ("1.5.5GB", "bytes"),
    ],
)  # fmt: skip
def test_what_is_no_quantity_is_refused(text: str, unit: Unit) -> None:
    with pytest.raises(BadConfig, match="is not a number of"):
        parse_quantity_untrusted(text, unit)


@given(st.text(max_size=20), st.sampled_from(["bytes", "bytes/s", "seconds"]))
def test_any_text_is_a_quantity_or_refused(text: str, unit: Unit) -> None:
    with contextlib.suppress(BadConfig):
        assert parse_quantity_untrusted(text, unit) >= 0


@given(st.binary(max_size=200) | st.text(alphabet='upmdnslit_hwx=[]"\n 1GB#.', max_size=60).map(str.encode))
def test_any_bytes_are_a_file_or_refused(data: bytes) -> None:
    try:
        found = parse_file_untrusted(data, "config.toml", settings())
    except BadConfig as error:
        assert "config.toml" in error.message
    else:
        assert found.keys() <= settings().keys()


def write(home: Path, text: str | bytes) -> None:
    home.mkdir(exist_ok=True)
    (home / FILE_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())


def test_a_file_changes_what_it_names(home: Path) -> None:
    write(
        home,
        '# ours\nup_limit = "10MB/s"\nbootstrap = ["' + ADDR + '"]\nmdns = false\n'
        'node_grace="2h"\ndisk_cap = 5\nhttp = "127.0.0.1:4142"\ndown_limit = "none"\n',
    )
    read = read_config({"OMNI_HOME": str(home)})
    assert read.config == Config(
        home,
        up_limit=10_000_000,
        bootstrap=(ADDR,),
        mdns=False,
        node_grace=7200.0,
        disk_cap=5,
        http="127.0.0.1:4142",
    )
    assert read.sources["up_limit"] == f"{home / FILE_NAME}:2"
    assert read.sources["node_grace"] == f"{home / FILE_NAME}:5"
    assert Config.from_environment({"OMNI_HOME": str(home)}) == read.config


@given(st.data())
def test_what_is_written_reads_back(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(settings())))
    described = settings()[name]
    value: Value
    match described.unit:
        case "yes/no":
            value = data.draw(st.booleans())
        case "address":
            value = data.draw(
                st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text != "none")
            )
        case "addresses":
            value = tuple(data.draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1))))
        case "off/upnp":
            value = data.draw(st.sampled_from(["off", "upnp"]))
        case "relays":
            some = st.lists(st.text(st.characters(codec="utf-8"), min_size=3), min_size=2).map(tuple)
            value = data.draw(st.sampled_from(["auto", "off"]) | some)
        case "seconds":
            value = float(data.draw(st.integers(int(described.low or 0), int(described.high or 0))))
        case _:
            value = data.draw(st.integers(int(described.low or 0), int(described.high or 0)))
    line = f"{name} = {written(described, value)}"
    assert parse_file_untrusted(line.encode(), "f", settings())[name][0] == value


def test_no_file_means_the_defaults(home: Path) -> None:
    assert read_config({"OMNI_HOME": str(home)}).config == Config(home)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\nuplimit = 1", [":2", "'uplimit'"]),
        ("[network]\nup_limit = 1", [":1", "'network'"]),
        ("up_limit = true", [":1", "up_limit", "bytes a second", '"none"']),
        ('up_limit = "10MB"', ["up_limit", '"10MB/s"']),
        ("up_limit = 1", ["up_limit", "out of range", "1kB/s to 1TB/s"]),
        ("window = 1.5", ["window", "number of bytes"]),
        ('mdns = "yes"', ["mdns", "true or false"]),
        ('port_mapping = "on"', ["port_mapping", '"off" or "upnp"']),
        ("port_mapping = true", ["port_mapping", '"off" or "upnp"']),
        ("mdns = 1", ["mdns", "true or false"]),
        ('bootstrap = "x"', ["bootstrap", "list of texts"]),
        ('listen = ["/ip4/1.2.3.4"]', [":1", "listen", "'/ip4/1.2.3.4'"]),
        ('bootstrap = ["/ip4/1.2.3.4/tcp/1"]', [":1", "bootstrap", "'/ip4/1.2.3.4/tcp/1'"]),
        ("bootstrap = [1]", ["bootstrap", "list of texts"]),
        ("http = 80", ["http", "text"]),
        ("node_grace = nan", ["node_grace", "seconds"]),
        ("node_grace = -1", ["node_grace", "out of range"]),
        ("node_grace = 1979-05-27", ["node_grace", "seconds"]),
        ('home = "/"', ["'home'"]),
        ("mdns = ", ["not TOML", "end of document"]),
        ("\nmdns = tru\n", ["not TOML", "line 2"]),
        ("mdns = true\nmdns = true\n", ["not TOML"]),
        (b"\xff", ["not UTF-8"]),
        (b"#" * (MAX_FILE + 1), [f"more than {MAX_FILE}"]),
        (b"x=" + b"[" * 100_000, ["not TOML"]),
    ],
)
def test_a_bad_file_is_named_with_what_is_allowed(home: Path, text: str | bytes, says: list[str]) -> None:
    write(home, text)
    with pytest.raises(BadConfig) as caught:
        read_config({"OMNI_HOME": str(home)})
    for said in [str(home / FILE_NAME), *says]:
        assert said in caught.value.message


def test_a_file_that_can_not_be_read(home: Path) -> None:
    (home / FILE_NAME).mkdir(parents=True)
    with pytest.raises(BadConfig, match=FILE_NAME):
        read_config({"OMNI_HOME": str(home)})


def test_every_field_is_a_setting_and_its_default_is_allowed() -> None:
    for one in fields(Config):
        if one.name == "home":
            continue
        described = one.metadata[METADATA]
        assert described.reason.endswith("."), one.name
        assert described.unit not in ("bytes", "bytes/s", "seconds", "count") or None not in (
            described.low,
            described.high,
        ), f"{one.name} needs a range"
        if isinstance(one.default, int | float) and described.low is not None:
            assert described.low <= one.default <= described.high, one.name
