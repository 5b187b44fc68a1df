"""Write the signed manifest of a model beside its file, under the identity of `$OMNI_HOME`.

    python manifests/sign.py manifests/demo/omni-demo-F16.gguf

Writes `<name>.manifest`: the dag-cbor node whose CID `omni add` prints, and prints that CID. Nothing
is stored or published. The publisher's peer ID goes into `publishers.json` by hand.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from omnistore.chunker.cut import cut, model_files
from omnistore.config import Config, load_key
from omnistore.manifest import SignedManifest


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    model = Path(sys.argv[1])
    key = load_key(Config.from_environment(os.environ).home)
    made = cut(model_files(model))
    signed = SignedManifest.sign(made.node.cid, key).encode()
    model.with_suffix(".manifest").write_bytes(bytes(signed.data))
    print(f"{signed.cid}  signed by {key.public.peer_id}")


if __name__ == "__main__":
    main()
