"""The whole job on one machine: publish a model, fetch it by content, run it over two nodes.

Four nodes, each with a home, a key and processes of its own, talk over real sockets on 127.0.0.1:

    bootstrap   knows nobody's models; only introduces peers (a DHT node)
    A           adds the model file and seeds it
    B           knows nothing but the CID and the bootstrap address; pins, then runs the model
    C           lends compute; fetches only the layers it is given

Run by `make demo`. Exits non-zero if anything is not as it should be.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omnistore.block import Block
from omnistore.manifest import signed_untrusted

MODEL = Path(__file__).resolve().parent / "omni-demo-F16.gguf"
PUBLISHED = MODEL.with_suffix(".manifest")
"""The manifest of this file as this project signed it."""
PROMPT = "Once upon a time, Otto the owl"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
DEADLINE = 60.0
"""Seconds any one command may take."""


def say(text: str = "") -> None:
    print(text, flush=True)


def command(home: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    omni = Path(sys.executable).with_name("omni")
    return [str(omni), *arguments], {**os.environ, "OMNI_HOME": str(home)}


def omni(home: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run one command with `--json`; its lines. Its talk goes to our stderr."""
    argv, env = command(home, *arguments, "--json")
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, timeout=DEADLINE)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0:
        raise SystemExit(f"demo: omni {' '.join(arguments)} failed with {done.returncode}: {lines[-1:]}")
    return lines


@contextlib.contextmanager
def seed(home: Path, *arguments: str) -> Iterator[dict[str, Any]]:
    """A seed node for as long as the block runs; its `ready` event."""
    argv, env = command(home, "seed", "--listen", LOOPBACK, *arguments, "--json")
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            if not first:
                raise SystemExit(f"demo: omni seed {' '.join(arguments)} did not start")
            yield json.loads(first)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)
            process.kill()


def address(ready: dict[str, Any]) -> str:
    return next(addr for addr in ready["addrs"] if "/ip4/127.0.0.1/" in addr)


def pin(home: Path, cid: str, bootstrap: str, names: dict[str, str]) -> None:
    done = omni(home, "pin", cid, "--bootstrap", bootstrap)[-1]
    path = Path(done["path"])
    if path.read_bytes() != MODEL.read_bytes():
        raise SystemExit(f"demo: {path} is not the file that was added")
    rate = done["bytes_fetched"] / max(done["seconds"], 1e-9) / 1e6
    blocks, size = done["blocks_fetched"], done["bytes_fetched"]
    say(f"  {blocks} blocks, {size:,} bytes, every one verified, {rate:.1f} MB/s")
    for peer, count in done["peers"].items():
        say(f"  {count:,} bytes from {names.get(peer, 'somebody')} ({peer})")
    say("  the file B has is byte for byte the file A added")


def run(home: Path, cid: str, lender: str, names: dict[str, str]) -> str:
    result = omni(
        home, "run", cid, "--prompt", PROMPT, "--max-tokens", "60", "--temperature", "0", "--with", lender
    )[-1]
    for stage in result["stages"]:
        say(f"  layers {stage['layers']} on {names.get(stage['peer'], 'somebody')} ({stage['peer']})")
    say(f"\n  {PROMPT}{result['text']}\n")
    say(f"  {len(result['tokens'])} tokens, {result['tokens_per_second']:.1f} tokens/s")
    if len({stage["peer"] for stage in result["stages"]}) != 2:
        raise SystemExit("demo: the model did not run over two nodes")
    return str(result["text"])


def alone(home: Path, cid: str, text: str) -> None:
    result = omni(
        home, "run", cid, "--prompt", PROMPT, "--max-tokens", "60", "--temperature", "0", "--layers", "all"
    )[-1]
    if result["text"] != text:
        raise SystemExit(f"demo: alone, B says something else: {result['text']!r}")
    say(f"  the same text, {result['tokens_per_second']:.1f} tokens/s")


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="omni-demo-") as scratch, contextlib.ExitStack() as nodes:
        homes = {name: Path(scratch) / name for name in ("bootstrap", "A", "B", "C")}
        say(f"1. A adds {MODEL.name} ({MODEL.stat().st_size:,} bytes), in place, cut per transformer block")
        added = omni(homes["A"], "add", str(MODEL))[-1]
        cid = added["cid"]
        say(f"  signed manifest {cid}")
        say(f"  {added['blocks']} blocks in {len(added['parts'])} parts:")
        for part in added["parts"]:
            say(f"    {part['part']:<9} {part['size']:>9,} bytes  {part['cid']}")

        published = signed_untrusted(Block.node(PUBLISHED.read_bytes()))
        if added["manifest"] != str(published.manifest):
            raise SystemExit(f"demo: {MODEL.name} is not the file that {PUBLISHED.name} describes")
        say(f"  the manifest below that signature is the one in {PUBLISHED.name}, signed by")
        say(f"  {published.publisher.peer_id}")

        say("\n2. Nodes start: a bootstrap node, A as a seed, C lending compute")
        ready = {"bootstrap": nodes.enter_context(seed(homes["bootstrap"]))}
        meeting = address(ready["bootstrap"])
        ready["A"] = nodes.enter_context(seed(homes["A"], "--bootstrap", meeting))
        ready["C"] = nodes.enter_context(
            seed(homes["C"], "--bootstrap", meeting, "--compute", "--allow", "any")
        )
        names = {event["peer_id"]: name for name, event in ready.items()}
        for peer, name in names.items():
            say(f"  {name:<9} {peer}")

        say("\n3. B pins the CID, knowing only the bootstrap node: it finds A in the DHT")
        names[omni(homes["B"], "id")[-1]["peer_id"]] = "B"
        pin(homes["B"], cid, meeting, names)

        say("\n4. B runs the model together with C, which fetches only its own layers")
        text = run(homes["B"], cid, address(ready["C"]), names)
        held = omni(homes["C"], "show", cid)[-1]
        whole = [part for part in held["parts"] if part["held"]]
        say(f"  C holds {len(whole)} of {len(held['parts'])} parts, {sum(p['size'] for p in whole):,} bytes")

        say("\n5. B runs it alone, to compare")
        alone(homes["B"], cid, text)
    say(f"\nEverything as it should be, in {time.monotonic() - started:.1f} s.")


if __name__ == "__main__":
    main()
