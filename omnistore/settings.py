"""What may stand in a configuration file: names, units, ranges, and how values are written (pure).

A setting is a field of `omnistore.config.Config`, declared with `setting`, so that the file, the
command line and `omni config` read one table. This module knows no field, opens no file, and does not
look into addresses: those are checked by whoever listens or dials.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, TypeVar

from omnistore.errors import BadConfig

Unit: TypeAlias = Literal[
    "bytes",
    "bytes/s",
    "seconds",
    "count",
    "yes/no",
    "address",
    "addresses",
    "relays",
    "directory",
    "off/upnp",
]
Value: TypeAlias = int | float | bool | str | tuple[str, ...] | None
_T = TypeVar("_T")

METADATA: Final = "setting"
"""Where a dataclass field keeps its `Setting`."""
MAX_FILE: Final = 1 << 20
"""Bytes of a configuration file; ours takes two thousand."""

_POWERS: Final = MappingProxyType({"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5})
_SECONDS: Final = MappingProxyType(
    {"ms": 0.001, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "": 1, "w": 7 * 86400}
)
_QUANTITY: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})(/s)?", re.ASCII)
_SIZE: Final = re.compile(r"([kKMGTP]?)(i?)B")
_WRITTEN: Final = MappingProxyType(
    {
        "bytes": {
            "PB": 10**15,
            "TB": 10**12,
            "TiB": 1 << 40,
            "GB": 10**9,
            "GiB": 1 << 30,
            "MB": 10**6,
            "MiB": 1 << 20,
            "kB": 1000,
            "KiB": 1 << 10,
        },
        "seconds": {"d": 86400, "h": 3600, "min": 60, "s": 1},
    }
)
"""Units a value is written in, by what it counts, largest first."""
_EXAMPLES: Final = MappingProxyType(
    {
        "bytes": 'a number of bytes, or a text such as "20GB" or "64MiB"',
        "bytes/s": 'a number of bytes a second, or a text such as "10MB/s"',
        "seconds": 'a number of seconds, or a text such as "90s", "15min", "22h" or "7d"',
        "count": "a whole number",
        "yes/no": "true or false",
        "address": "a text",
        "addresses": "a list of texts",
        "relays": '"auto", "off", or a list of texts',
        "off/upnp": '"off" or "upnp"',
    }
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting and what it may be."""

    unit: Unit
    reason: str
    """What it is for, and why its default is what it is."""
    low: float | None = None
    high: float | None = None
    """The least and the most it may be, in its unit."""
    optional: bool = False
    """Whether it may be absent: `"none"` where it is written down."""


def setting(
    default: _T, unit: Unit, reason: str, *, low: float | None = None, high: float | None = None
) -> _T:
    """A dataclass field with a default and a description. None as default: it may be absent."""
    described = Setting(unit, reason, low, high, optional=default is None)
    return field(default=default, metadata={METADATA: described})


def parse_quantity_untrusted(text: str, unit: Unit) -> float:
    """A size ("20GB", "64MiB"), a rate ("10MB/s") or a duration ("22h") in `unit`; a bare number too.

    kB, MB, GB … are powers of 1000, KiB, MiB, GiB … of 1024. Raises `BadConfig`.
    """
    matched = _QUANTITY.fullmatch(text.strip())
    if matched is None:
        raise _refused(text, unit)
    number, letters, per_second = matched.groups()
    if unit == "seconds":
        factor: float | None = None if per_second else _SECONDS.get(letters)
    elif letters == "":
        factor = None if per_second else 1
    else:
        power = _SIZE.fullmatch(letters)
        # "10MB" as a rate is refused: it may as well be a mistaken size.
        fits = power is not None and (per_second is not None) == (unit == "bytes/s")
        factor = (1024 if power[2] else 1000) ** _POWERS[power[1]] if fits and power else None
    if factor is None or (unit not in ("bytes", "bytes/s", "seconds") and letters + (per_second or "")):
        raise _refused(text, unit)
    value = float(number) * factor
    # Whole numbers above 2^53 must not be rounded.
    return value if unit == "seconds" else int(number) * int(factor) if number.isdigit() else int(value)


def _refused(value: object, unit: Unit) -> BadConfig:
    return BadConfig(f"{str(value)[:80]!r} is not {_EXAMPLES[unit]}")


def check_untrusted(name: str, described: Setting, value: object) -> Value:
    """`value`, from a file or the command line, as this setting. Raises `BadConfig` with what is allowed."""
    if described.optional and value in ("none", None):
        return None
    try:
        checked = _typed(described.unit, value)
    except BadConfig as error:
        allowed = _EXAMPLES[described.unit] + (', or "none"' if described.optional else "")
        raise BadConfig(f"{name}: {_shown(value)} is not {allowed}", remedy=error.remedy) from None
    if isinstance(checked, int | float) and not isinstance(checked, bool):
        low = -math.inf if described.low is None else described.low
        high = math.inf if described.high is None else described.high
        if not low <= checked <= high:
            raise BadConfig(f"{name}: {_shown(value)} is out of range; allowed: {allowed_range(described)}")
    return checked


def allowed_range(described: Setting) -> str:
    """Least and most, for people; only its unit where there is neither."""
    low, high = (
        None if end is None else _number(described.unit, end) for end in (described.low, described.high)
    )
    if low is None and high is None:
        return described.unit
    return f"{low} to {high}" if low and high else f"{low} or more" if low else f"up to {high}"


def written(described: Setting, value: Value) -> str:
    """A value as a configuration file has it, in the largest unit that keeps it whole."""
    match value:
        case None:
            return '"none"'
        case bool():
            return str(value).lower()
        case str() | tuple():
            # TOML's texts are JSON's, but for one character.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    number = _number(described.unit, value)
    return number if number.replace(".", "").isdigit() else f'"{number}"'


def _number(unit: Unit, value: float) -> str:
    rate = "/s" if unit == "bytes/s" else ""
    for suffix, factor in _WRITTEN.get(unit.partition("/")[0], {}).items():
        if value and value % factor == 0:
            return f"{value // factor:.0f}{suffix}{rate}"
    return f"{value:.6f}" if value % 1 else f"{value:.0f}"


def _typed(unit: Unit, value: object) -> Value:
    match unit, value:
        case "yes/no", bool():
            return value
        case _, bool():
            raise _refused(value, unit)
        case "address", str() if value:
            return value
        case "off/upnp", "off" | "upnp":
            return str(value)
        case "relays", "auto" | "off" | ["auto" | "off"]:
            return str(value if isinstance(value, str) else value[0])
        case "addresses" | "relays", list() | tuple() if all(isinstance(item, str) for item in value):
            return tuple(value)
        case "bytes" | "bytes/s" | "count", int():
            return value
        case "seconds", int() | float() if math.isfinite(value):
            return float(value)
        case "bytes" | "bytes/s" | "seconds", str():
            return parse_quantity_untrusted(value, unit)
    raise _refused(value, unit)


def _shown(value: object) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def parse_file_untrusted(
    data: bytes, source: str, known: Mapping[str, Setting]
) -> dict[str, tuple[Value, str]]:
    """The settings of a TOML file: name to value and where it stands, as in `config.toml:3`.

    Flat: every key is a setting. Raises `BadConfig` naming `source`, the line, the key and what is allowed.
    """
    import tomllib  # only where there is a file

    if len(data) > MAX_FILE:
        raise BadConfig(f"{source} has more than {MAX_FILE} bytes")
    try:
        text = data.decode()
        document: dict[str, Any] = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise BadConfig(f"{source} is not UTF-8 (byte {error.start})") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadConfig(f"{source} is not TOML: {error}") from None
    where = _line_finder(text, source)
    settings: dict[str, tuple[Value, str]] = {}
    for name, value in document.items():
        described = known.get(name)
        if described is None:
            raise BadConfig(
                f"{where(name)}: there is no setting {name[:80]!r}",
                remedy=f"Settings: {', '.join(known)}.",
            )
        try:
            settings[name] = check_untrusted(name, described, value), where(name)
        except BadConfig as error:
            raise BadConfig(f"{where(name)}: {error.message}", remedy=error.remedy) from None
    return settings


def _line_finder(text: str, source: str) -> Callable[[str], str]:
    """Where a key stands; the parser does not tell. Good for keys at the beginning of a line."""
    lines = text.splitlines()

    def where(name: str) -> str:
        key = re.compile(rf"""\s*\[*\s*["']?{re.escape(name)}["']?\s*[.=\]]""")
        number = next((count for count, line in enumerate(lines, 1) if key.match(line)), None)
        return source if number is None else f"{source}:{number}"

    return where
