"""Manifests, signed manifests and part nodes (spec/03-manifest). Pure.

`nodes` has the types and what they are written as; `decoding` goes from a stranger's bytes to one of them, so
that a `Manifest` or part in hand was decoded strictly, and a `SignedManifest`'s signature was checked.
Whether the parts agree with the GGUF headers is `omnistore.chunker.layout`'s to say.
"""

from omnistore.manifest.decoding import (
    MAX_FILES,
    MAX_LAYERS,
    MAX_NODE_SIZE,
    MAX_SIZE,
    MAX_TENSORS,
    MAX_TEXT,
    manifest_untrusted,
    open_untrusted,
    part_links_untrusted,
    part_untrusted,
    signed_untrusted,
)
from omnistore.manifest.nodes import (
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
    block_sizes,
    is_file_name,
)

__all__ = [
    "MAX_FILES",
    "MAX_LAYERS",
    "MAX_NODE_SIZE",
    "MAX_SIZE",
    "MAX_TENSORS",
    "MAX_TEXT",
    "SIGNATURE_DOMAIN",
    "SIGNATURE_PAYLOAD_TYPE",
    "FileEntry",
    "HeaderPart",
    "Manifest",
    "PaddingEntry",
    "Part",
    "PartKey",
    "PartKind",
    "PartRef",
    "SignedManifest",
    "TensorEntry",
    "TensorPart",
    "block_sizes",
    "is_file_name",
    "manifest_untrusted",
    "open_untrusted",
    "part_links_untrusted",
    "part_untrusted",
    "signed_untrusted",
]
