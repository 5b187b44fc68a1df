"""From strangers' nodes to what they describe, strictly (spec/03-manifest).

Every field is known, typed and bounded, every order is the one specified and the encoding is canonical:
whatever else comes raises `MalformedManifest` or `BadSignature`, which every public function here raises
and nothing else.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, get_args

from omnistore import dagcbor
from omnistore.block import BLOCK_SIZE, MAX_BLOCK_SIZE, Block
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.errors import BadSignature, MalformedManifest
from omnistore.keys import PublicKey
from omnistore.manifest.nodes import (
    FORMAT_VERSION,
    SIGNATURE_DOMAIN,
    SIGNATURE_PAYLOAD_TYPE,
    FileEntry,
    HeaderPart,
    Manifest,
    PaddingEntry,
    Part,
    PartKey,
    PartKind,
    PartRef,
    SignedManifest,
    TensorEntry,
    TensorPart,
    is_file_name,
)

MAX_NODE_SIZE: Final = MAX_BLOCK_SIZE
"""A node travels as one block: 2 MiB is 50,000 links, a part of 50 GB."""
MAX_FILES: Final = 1024
"""Members of a split set; the largest published sets have a few dozen."""
MAX_LAYERS: Final = 4096
MAX_PARTS: Final = MAX_FILES + MAX_LAYERS + 3
MAX_TENSORS: Final = 65_536
"""Tensors of one part."""
MAX_SIZE: Final = 1 << 50
"""Bytes of one file or part: a petabyte."""
MAX_TEXT: Final = 256
"""Characters of a name; 64 KiB of licence text belongs in the header, not here."""
NUMBER_FACTS: Final = frozenset({"context_length", "parameters"})
TEXT_FACTS: Final = frozenset({"license", "size_label", "description", "url"})
MAX_FACT_TEXT: Final = 4096
"""Characters of a fact."""

_KINDS: Final[Mapping[str, PartKind]] = {kind: kind for kind in get_args(PartKind)}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def open_untrusted(block: Block) -> SignedManifest | Manifest:
    """Decode the node that a model's CID names: signed or bare.

    Raises `MalformedManifest` or `BadSignature`. A bare manifest has no publisher; the CID that the
    caller asked for is then all that vouches for it.
    """
    node = _node(block, "manifest")
    if "publisher" in node or "manifest" in node:
        return _signed(node)
    return _manifest(node)


def signed_untrusted(block: Block) -> SignedManifest:
    """Decode a signed manifest and check its signature."""
    return _signed(_node(block, "signed manifest"))


def manifest_untrusted(block: Block) -> Manifest:
    """Decode a bare manifest. Raises `MalformedManifest`."""
    return _manifest(_node(block, "manifest"))


def part_untrusted(block: Block, ref: PartRef) -> Part:
    """Decode a part node and hold it against the manifest's reference. Raises `MalformedManifest`."""
    what = f"part {ref.key}"
    node = _node(block, what)
    part: Part = (
        _header_part(node, ref.key, what) if ref.key.kind == "header" else _tensor_part(node, ref.key, what)
    )
    if part.size != ref.size:
        raise MalformedManifest(f"{what} holds {part.size} bytes but the manifest says {ref.size}")
    return part


def part_links_untrusted(block: Block) -> tuple[CID, ...]:
    """Every block that a part node links to, in order, whatever manifest it belongs to.

    For a server that is asked what it holds of a part. Raises `MalformedManifest`.
    """
    node = _node(block, "part")
    kind, index = node.get("kind"), node.get("index", 0)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise MalformedManifest(f"{block.cid} is not a part")
    if kind == "header":
        links = _header_part(node, PartKey("header"), "part").links()
    else:
        key = PartKey(_KINDS[kind], _int(index, "part index", 0, MAX_LAYERS - 1))
        links = _tensor_part(node, key, "part").links()
    return tuple(cid for cid, _ in links)


def _node(block: Block, what: str) -> Mapping[str, Any]:
    if block.cid.codec != DAG_CBOR:
        raise MalformedManifest(f"{what} {block.cid} is a raw block, not a dag-cbor node")
    value = dagcbor.decode_untrusted(
        bytes(block.data), limit=MAX_NODE_SIZE, error=MalformedManifest, what=f"{what} {block.cid}"
    )
    if not isinstance(value, dict):
        raise MalformedManifest(f"{what} {block.cid} is not a map")
    return value


def _signed(node: Mapping[str, Any]) -> SignedManifest:
    what = "signed manifest"
    _fields(node, what, required={"manifest", "publisher", "signature"})
    link = _link(node["manifest"], what, DAG_CBOR)
    publisher, signature = node["publisher"], node["signature"]
    if not isinstance(publisher, bytes) or not isinstance(signature, bytes):
        raise MalformedManifest(f"{what}: publisher and signature must be byte strings")
    key = PublicKey.from_protobuf_untrusted(publisher)
    if len(signature) != 64:
        raise BadSignature(f"{what}: an Ed25519 signature has 64 bytes, not {len(signature)}")
    key.verify_untrusted(
        signature, domain=SIGNATURE_DOMAIN, payload_type=SIGNATURE_PAYLOAD_TYPE, payload=link.binary
    )
    return SignedManifest(link, key, signature)


def _manifest(node: Mapping[str, Any]) -> Manifest:
    what = "manifest"
    if "omni" not in node:
        raise MalformedManifest(
            "the CID names a node, but no manifest", remedy="`omni add` prints a manifest's."
        )
    version = node["omni"]
    if version != FORMAT_VERSION or version is True:
        raise MalformedManifest(
            f"manifest of format version {reprlib.repr(version)}; version {FORMAT_VERSION} is read here",
            remedy="A newer release of omni may read it.",
        )
    _fields(
        node,
        what,
        required={"omni", "name", "architecture", "quantisation", "layers", "files", "parts", "facts"},
        optional={"base"},
    )
    files = tuple(_file(entry) for entry in _items(node["files"], "files", 1, MAX_FILES))
    _check_set([entry.name for entry in files])
    layers = _int(node["layers"], "layers", 0, MAX_LAYERS)
    parts = tuple(_part_ref(entry) for entry in _items(node["parts"], "parts", 1, MAX_PARTS))
    _check_parts(parts, len(files), layers)
    if sum(ref.size for ref in parts) > sum(entry.size for entry in files):
        raise MalformedManifest("manifest: its parts are larger than its files")
    return Manifest(
        name=_label(node["name"], "name"),
        architecture=_label(node["architecture"], "architecture"),
        quantisation=_label(node["quantisation"], "quantisation"),
        layers=layers,
        files=files,
        parts=parts,
        facts=_facts(node["facts"]),
        base=_link(node["base"], "base", DAG_CBOR) if "base" in node else None,
    )


def _check_set(names: Sequence[str]) -> None:
    """Several files are named as a split set: so no two names clash, whatever a system folds."""
    first = f"-00001-of-{len(names):05}.gguf"
    stem = names[0].removesuffix(first)
    if len(names) > 1 and names != [
        f"{stem}-{number:05}-of-{len(names):05}.gguf" for number in range(1, len(names) + 1)
    ]:
        raise MalformedManifest(f"manifest: its {len(names)} files are not named as one split set")


def _check_parts(parts: Sequence[PartRef], files: int, layers: int) -> None:
    ranks = [ref.key.rank for ref in parts]
    if ranks != sorted(set(ranks)):
        raise MalformedManifest("manifest: parts are not in order, or one is listed twice")
    if [ref.key.index for ref in parts if ref.key.kind == "header"] != list(range(files)):
        raise MalformedManifest(f"manifest: {files} files need exactly one header part each")
    for ref in parts:
        if ref.key.kind == "layer" and ref.key.index >= layers:
            raise MalformedManifest(f"manifest: {ref.key} but the model has {layers} layers")


def _file(entry: Any) -> FileEntry:
    node = _map(entry, "file")
    _fields(node, "file", required={"name", "size"}, optional={"sha256"})
    name = _text(node["name"], "file name")
    if not is_file_name(name):
        raise MalformedManifest(f"manifest: {name!r} is not a file name that every system can store")
    sha256 = node.get("sha256")
    if "sha256" in node and (not isinstance(sha256, bytes) or len(sha256) != 32):
        raise MalformedManifest(f"manifest: the sha256 of {name!r} is not 32 bytes")
    return FileEntry(name, _int(node["size"], "file size", 1, MAX_SIZE), sha256)


def _part_ref(entry: Any) -> PartRef:
    node = _map(entry, "part reference")
    _fields(node, "part reference", required={"kind", "index", "size", "link"})
    kind = node["kind"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise MalformedManifest(f"manifest: unknown kind of part {reprlib.repr(kind)}")
    most = {"layer": MAX_LAYERS, "header": MAX_FILES}.get(kind, 1) - 1
    key = PartKey(_KINDS[kind], _int(node["index"], f"index of {kind}", 0, most))
    return PartRef(
        key, _int(node["size"], f"size of {key}", 1, MAX_SIZE), _link(node["link"], str(key), DAG_CBOR)
    )


def _header_part(node: Mapping[str, Any], key: PartKey, what: str) -> HeaderPart:
    _fields(node, what, required={"kind", "size", "blocks", "padding"})
    if node["kind"] != "header":
        raise MalformedManifest(f"{what}: its node is a {reprlib.repr(node['kind'])}")
    size = _int(node["size"], f"{what} size", 1, MAX_SIZE)
    padding = []
    end = size
    for entry in _items(node["padding"], f"{what} padding", 0, MAX_TENSORS):
        gap = _map(entry, "padding")
        _fields(gap, "padding", required={"offset", "size", "blocks"})
        length = _int(gap["size"], "padding size", 1, MAX_SIZE)
        offset = _int(gap["offset"], "padding offset", end, MAX_SIZE)
        end = offset + length
        padding.append(PaddingEntry(offset, length, _blocks(gap["blocks"], length, "padding")))
    return HeaderPart(key, size, _blocks(node["blocks"], size, what), tuple(padding))


def _tensor_part(node: Mapping[str, Any], key: PartKey, what: str) -> TensorPart:
    required = {"kind", "tensors"} | ({"index"} if key.kind == "layer" else set())
    _fields(node, what, required=required)
    index = _int(node.get("index", 0), f"{what} index", 0, MAX_LAYERS - 1)
    if node["kind"] != key.kind or index != key.index:
        raise MalformedManifest(f"{what}: its node is {reprlib.repr(node['kind'])} {index}")
    tensors = tuple(_tensor(entry, what) for entry in _items(node["tensors"], what, 1, MAX_TENSORS))
    names = [tensor.name.encode() for tensor in tensors]
    if names != sorted(set(names)):
        raise MalformedManifest(f"{what}: tensors are not sorted by name, or one is listed twice")
    return TensorPart(key, tensors)


def _tensor(entry: Any, what: str) -> TensorEntry:
    node = _map(entry, f"{what}: tensor")
    _fields(node, f"{what}: tensor", required={"name", "type", "shape", "size", "blocks"})
    name = _text(node["name"], f"{what}: tensor name", least=0)
    shown = f"{what}: tensor {reprlib.repr(name)}"
    shape = tuple(
        _int(n, f"{shown} shape", 1, MAX_SIZE) for n in _items(node["shape"], f"{shown} shape", 0, 4)
    )
    size = _int(node["size"], f"{shown} size", 1, MAX_SIZE)
    return TensorEntry(
        name, _label(node["type"], f"{shown} type"), shape, size, _blocks(node["blocks"], size, shown)
    )


def _blocks(value: Any, size: int, what: str) -> tuple[CID, ...]:
    count = -(-size // BLOCK_SIZE)
    if not isinstance(value, list) or len(value) != count:
        raise MalformedManifest(f"{what}: {size} bytes need {count} blocks")
    return tuple(_link(cid, what, RAW) for cid in value)


def _facts(value: Any) -> Mapping[str, int | str]:
    node = _map(value, "facts")
    _fields(node, "facts", required=set(), optional=NUMBER_FACTS | TEXT_FACTS)
    for name, fact in node.items():
        if name in TEXT_FACTS:
            _text(fact, name, most=MAX_FACT_TEXT)
        else:
            _int(fact, name, 0, 1 << 62)
    return dict(sorted(node.items()))


def _fields(
    node: Mapping[str, Any],
    what: str,
    *,
    required: set[str],
    optional: frozenset[str] | set[str] = frozenset(),
) -> None:
    missing, unknown = required - node.keys(), node.keys() - required - optional
    if missing:
        raise MalformedManifest(f"{what}: without {', '.join(sorted(missing))}")
    if unknown:
        raise MalformedManifest(f"{what}: unknown field {reprlib.repr(sorted(unknown))}")


def _map(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise MalformedManifest(f"{what} is not a map")
    return value


def _items(value: Any, what: str, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise MalformedManifest(f"{what} is not a list of {least} to {most} items")
    return value


def _int(value: Any, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise MalformedManifest(f"{what}: {reprlib.repr(value)} is not an integer from {least} to {most}")
    return value


def _text(value: Any, what: str, most: int = MAX_TEXT, *, least: int = 1) -> str:
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise MalformedManifest(f"{what} is not a text of {least} to {most} characters")
    return value


def _label(value: Any, what: str) -> str:
    """A text that people see on one line; a control character could rewrite their terminal."""
    if _CONTROL.search(_text(value, what)):
        raise MalformedManifest(f"{what} has a control character")
    return str(value)


def _link(value: Any, what: str, codec: int) -> CID:
    if not isinstance(value, CID) or value.codec != codec:
        raise MalformedManifest(f"{what}: not a link to a {'raw block' if codec == RAW else 'dag-cbor node'}")
    return value
