"""Where a node lives on this machine, its limits, and its identity.

`Config` is one record of settings, each with its unit, range and reason; `$OMNI_HOME/config.toml` may
change them. `load_key` reads or makes the Ed25519 identity of a home. Nothing here is global: the
command line builds a `Config` from the environment once and passes it on.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from omnistore.errors import BadConfig
from omnistore.keys import SEED_SIZE, PrivateKey
from omnistore.settings import MAX_FILE, METADATA, Setting, Value, parse_file_untrusted, setting

FILE_NAME: Final = "config.toml"
KEY_NAME: Final = "identity.key"
_KEY_PREFIX: Final = bytes((0x08, 0x01, 0x12, 0x40))
"""Protobuf of libp2p's PrivateKey{Type: Ed25519, Data: 64 bytes}, up to the data: seed, then public key."""
_KEY_SIZE: Final = len(_KEY_PREFIX) + 2 * SEED_SIZE


@dataclass(frozen=True, slots=True)
class Config:
    """What a node may use, and what a seed does unless told otherwise. The defaults suit a workstation."""

    home: Path
    """`$OMNI_HOME`: index, identity, files fetched, and `config.toml`."""

    listen: tuple[str, ...] = setting(
        (), "addresses", "Multiaddrs a seed listens at. None given: TCP port 4141 on every interface."
    )
    announce: tuple[str, ...] = setting(
        (), "addresses", "Multiaddrs that others reach this node at, where it can not see them itself."
    )
    bootstrap: tuple[str, ...] = setting(
        (), "addresses", "Nodes to join the network through, as multiaddrs ending in /p2p/PEER."
    )
    mdns: bool = setting(
        True, "yes/no", "Find, and be found by, other nodes on the local network without any address."
    )
    port_mapping: str = setting(
        "off", "off/upnp",
        "Whether a seed asks the router, over UPnP, to forward its port, for an hour at a time. off: the"
        " router is not spoken to, and what it lets in stays its owner's choice.",
    )  # fmt: skip
    relay: bool = setting(
        False, "yes/no", "Whether a seed relays for nodes that nobody can dial: it costs their traffic twice."
    )
    relay_via: str | tuple[str, ...] = setting(
        "auto", "relays",
        "Relays that a seed is reached through. auto: some of its peers that relay, while others find that"
        " nobody can connect to it. A list of multiaddrs ending in /p2p/PEER: those, always. off: none.",
    )  # fmt: skip
    relay_reservations: int = setting(
        128, "count", "Peers a relay lets be reached through it; each keeps a connection open.",
        low=1, high=10_000,
    )  # fmt: skip
    relay_circuits: int = setting(
        64, "count", "Connections a relay carries at once; each takes up to 1 MiB of memory.",
        low=1, high=10_000,
    )  # fmt: skip
    relay_bytes: int = setting(
        4 << 30, "bytes",
        "Most that one relayed connection carries, both directions together: a small model whole.",
        low=1 << 17, high=10**15,
    )  # fmt: skip
    relay_time: float = setting(
        7200.0, "seconds", "The longest life of a relayed connection: what hangs is cut sometime.",
        low=60, high=7 * 86400,
    )  # fmt: skip
    http: str | None = setting(
        None, "address", "HOST:PORT where a seed answers HTTP. None: nobody but this machine's user asks."
    )
    mirrors: bool = setting(
        False, "yes/no",
        "Whether `omni pin` also asks web servers that peers name. Otherwise they are only shown: nobody is"
        " dialled on a stranger's word.",
    )  # fmt: skip
    up_limit: int | None = setting(
        None, "bytes/s", "Most that is sent to all peers together. None: as fast as the network goes.",
        low=1000, high=10**12,
    )  # fmt: skip
    down_limit: int | None = setting(
        None, "bytes/s", "Most that is received from all peers together. None: as fast as it goes.",
        low=1000, high=10**12,
    )  # fmt: skip
    disk_cap: int | None = setting(
        None, "bytes",
        "Disk space for models fetched; above it a seed frees those not pinned, least recently used first."
        " None: they stay until `omni gc`.",
        low=0, high=10**15,
    )  # fmt: skip
    kv_memory: int | None = setting(
        None, "bytes",
        "Most memory for keys and values of a model that is run from here, over all machines: prompts, and"
        " earlier ones whose beginnings may come again. None: one full context, whatever its length.",
        low=1 << 16, high=10**15,
    )  # fmt: skip
    kv_q8: bool = setting(
        False, "yes/no",
        "Keep keys and values in 8 bits, in a quarter of the memory, unless --kv says otherwise: answers may"
        " differ a little, and not every engine can.",
    )  # fmt: skip
    kv_kept: int = setting(
        256 << 20, "bytes",
        "Most memory, of what is lent, for prompts that a peer may come back to after its stream ended, each"
        " peer: a few pages of a large model. 0 keeps nothing.",
        low=0, high=10**13,
    )  # fmt: skip
    window: int = setting(
        64 << 20, "bytes",
        "Most bytes a fetch has asked for and not received: a gigabit a second times half a second.",
        low=1 << 20, high=1 << 32,
    )  # fmt: skip
    stall_timeout: float = setting(
        60.0, "seconds",
        "How long a fetch that has peers goes on without one verified block. A block takes that long at"
        " 17 kB/s.",
        low=1, high=86400,
    )  # fmt: skip
    provider_timeout: float = setting(
        30.0, "seconds", "How long a fetch waits for somebody who holds what is missing.", low=1, high=86400
    )
    fetch_peers: int = setting(
        32, "count", "Peers that a fetch asks at once; more make it no faster, and each costs a stream.",
        low=1, high=1000,
    )  # fmt: skip
    dial_timeout: float = setting(
        10.0, "seconds", "How long connecting to a peer may take, all its addresses together.",
        low=1, high=300,
    )  # fmt: skip
    connections: int = setting(
        512, "count",
        "Most connections to peers; each takes a descriptor, two sockets' buffers and three tasks. What is"
        " beyond is refused.",
        low=16, high=100_000,
    )  # fmt: skip
    serve_streams: int = setting(
        256, "count",
        "Requesters served at once, at some 64 KiB each; in a full house those make room that nobody misses.",
        low=4, high=10_000,
    )  # fmt: skip
    serve_memory: int = setting(
        64 << 20, "bytes",
        "Most memory for blocks read and not yet sent, all requesters together: half a second of a gigabit.",
        low=8 << 20, high=1 << 36,
    )  # fmt: skip
    serve_peer_memory: int = setting(
        16 << 20, "bytes", "The same of one requester, once it has shown that it reads.",
        low=2 << 20, high=1 << 36,
    )  # fmt: skip
    dht_keys: int = setting(
        50_000, "count",
        "Keys under which others may leave a seed word of who holds what; each takes about 1 KiB of memory.",
        low=100, high=10**7,
    )  # fmt: skip
    http_connections: int = setting(
        128, "count", "Connections to the gateway (http) at once.", low=1, high=10_000
    )
    busy_timeout: float = setting(
        30.0, "seconds",
        "How long to wait for another process's write to the index before giving up. A commit takes"
        " milliseconds; the largest transaction, adding a 405B model, a few seconds.",
        low=0, high=3600,
    )  # fmt: skip
    disk_reserve: int = setting(
        64 << 20, "bytes",
        "Disk space that fetching leaves free: the index, and every other program, need some.",
        low=0, high=10**15,
    )  # fmt: skip
    copy_batch: int = setting(
        32 << 20, "bytes",
        "What is copied locally between two commits: bounds memory and what a crash makes us copy again.",
        low=1 << 20, high=1 << 30,
    )  # fmt: skip
    sync_batch: int = setting(
        256 << 20, "bytes",
        "Most that is written and not on the disk: what a power cut may make us check and fetch again. The"
        " disk is told at half of it.",
        low=1 << 20, high=1 << 40,
    )  # fmt: skip
    node_grace: float = setting(
        3600.0, "seconds",
        "How long garbage collection spares a node no pin reaches: somebody may be fetching its model.",
        low=0, high=365 * 86400,
    )  # fmt: skip

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Config:
        """The home that `OMNI_HOME` names (default `~/.omni`), and what its file says. Raises `BadConfig`."""
        return read_config(environ).config


@dataclass(frozen=True, slots=True)
class ReadConfig:
    """A configuration and where each value came from."""

    config: Config
    sources: Mapping[str, str]
    """Setting to `FILE:LINE`; what is not here has its default."""


def settings() -> dict[str, Setting]:
    """Every setting there is, by name."""
    return {one.name: one.metadata[METADATA] for one in fields(Config) if METADATA in one.metadata}


def read_config(environ: Mapping[str, str]) -> ReadConfig:
    """The configuration of the home that the environment selects. Raises `BadConfig`."""
    home = _home(environ)
    path = home / FILE_NAME
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        return ReadConfig(Config(home), {})
    except OSError as error:
        raise BadConfig(f"{path} can not be read: {error.strerror}") from None
    found = parse_file_untrusted(data, str(path), settings())
    _check_addresses(found)
    values: dict[str, Any] = {name: value for name, (value, _) in found.items()}
    return ReadConfig(Config(home, **values), {name: where for name, (_, where) in found.items()})


def _check_addresses(found: Mapping[str, tuple[Value, str]]) -> None:
    """Refuse what is no address where one has to be. Raises `BadConfig`."""
    # Most homes have no configuration, and sockets take a while to import.
    from omnistore.net.addresses import parse_dialable_untrusted, parse_untrusted

    parsers: dict[str, Callable[[str], object]] = {
        "listen": parse_untrusted,
        "announce": parse_untrusted,
        "bootstrap": parse_dialable_untrusted,
        "relay_via": parse_dialable_untrusted,
    }
    for name, parse in parsers.items():
        value, where = found.get(name, ((), ""))
        for addr in value if isinstance(value, tuple) else ():
            try:
                parse(addr)
            except BadConfig as error:
                raise BadConfig(f"{where}: {name}: {error.message}", remedy=error.remedy) from None


def _home(environ: Mapping[str, str]) -> Path:
    text = environ.get("OMNI_HOME", "")
    try:
        home = Path(text).expanduser() if text else Path.home() / ".omni"
    except RuntimeError as error:
        raise BadConfig(
            f"the home directory is unknown: {error}", remedy="Set OMNI_HOME to a directory."
        ) from None
    try:
        usable = not home.exists() or home.is_dir()
    except OSError as error:
        raise BadConfig(
            f"OMNI_HOME={str(home)[:200]}: {error.strerror}", remedy="Set OMNI_HOME to a directory."
        ) from None
    if not usable:
        raise BadConfig(f"OMNI_HOME={home} is not a directory", remedy="Set OMNI_HOME to a directory.")
    return home.absolute()


def make_home(home: Path) -> None:
    """Create the home, for its owner only. Raises `BadConfig`."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfig(
            f"{home} can not be created: {error.strerror}",
            remedy="Set OMNI_HOME to a directory you may write.",
        ) from None


def load_key(home: Path) -> PrivateKey:
    """The identity of this home, made on first use.

    The file holds libp2p's protobuf form of the private key, as other libp2p programs write it. Two
    processes that make it at once agree on one. Raises `BadConfig` for a file that others can read.
    """
    path = home / KEY_NAME
    try:
        return _read_key(path)
    except FileNotFoundError:
        make_home(home)
        return _make_key(path)


def _read_key(path: Path) -> PrivateKey:
    try:
        with open(path, "rb", opener=_open_at_once) as file:  # Path.open takes no opener
            status = os.fstat(file.fileno())
            data = file.read(_KEY_SIZE + 1) if stat.S_ISREG(status.st_mode) else b""
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadConfig(f"{path} can not be read: {error.strerror}") from None
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise BadConfig(
            f"{path} can be read or written by others (mode {mode:04o})",
            remedy=f"Run `chmod 600 {path}`; if the key may have leaked, delete it for a new identity.",
        )
    key = (
        PrivateKey(data[len(_KEY_PREFIX) : len(_KEY_PREFIX) + SEED_SIZE]) if len(data) == _KEY_SIZE else None
    )
    if key is None or data != _encode(key):
        raise BadConfig(
            f"{path} is not an Ed25519 private key in libp2p's form",
            remedy="Restore it from a backup, or delete it for a new identity.",
        )
    return key


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end, should the file be a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _encode(key: PrivateKey) -> bytes:
    return _KEY_PREFIX + key.seed + key.public.raw


def _make_key(path: Path) -> PrivateKey:
    temporary = path.with_name(f".{KEY_NAME}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(_encode(PrivateKey(os.urandom(SEED_SIZE))))
                file.flush()
                os.fsync(file.fileno())
            try:
                # Unlike a rename, a link fails when another process was first: its key then stands.
                os.link(temporary, path)
            except FileExistsError:
                return _read_key(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise BadConfig(f"{path} can not be written: {error.strerror}") from None
    return _read_key(path)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
