"""Clusters of machines in one process: real engines, stores and frames over a network in memory.

`cluster(path)` seeds a model; `Cluster.lend` adds a lender, `Cluster.coordinate` runs a coordinator. The
computing threads are real, so time is too: give links small delays, and no mock clock.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from omninfer import frames
from omninfer.coordinator import Coordinator, RunOptions, Site, Told
from omninfer.labels import Labels
from omninfer.sources import describe_untrusted, header_parts
from omninfer.stage import Lender, LendOptions
from omninfer.testing.noise import noise_model
from omninfer.weights import NetworkWeights
from omnistore.cid import CID
from omnistore.keys import PrivateKey
from omnistore.store.memory import MemoryStore
from omnistore.testing.network import LinkModel, VirtualNetwork, VirtualNode, VirtualRouting
from omnistore.testing.seeding import seeded
from omnistore.testing.tiny_gguf import TinyTensor, tiny_gguf
from omnistore.transfer.server import serve_transfer

LAYERS = 6
VOCAB = 96
KEY = PrivateKey(b"k" * 32)


def write_noise_gguf(path: Path, layers: int = LAYERS) -> None:
    """A llama of noise, width 64, its head tied to the embedding."""
    shape: dict[str, int | float] = {
        "block_count": layers,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "context_length": 512,
        "vocab_size": VOCAB,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    options: dict[str, Any] = {key.replace(".", "__"): value for key, value in shape.items()}
    _, source = noise_model("llama", tied_head=True, **options)
    tensors = [
        TinyTensor(name, source.types[name], source.shapes[name], bytes(source.read(name)))
        for name in source.names()
    ]
    metadata = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in shape.items()}
    path.write_bytes(tiny_gguf(tensors, metadata=metadata))


@dataclass
class LendingMachine:
    """A lender in this process."""

    node: VirtualNode
    store: MemoryStore
    lender: Lender


@dataclass
class Cluster:
    """A seeder, a coordinator and its lenders."""

    network: VirtualNetwork
    nursery: trio.Nursery
    cid: CID
    seeder: VirtualNode
    notes: list[str] = field(default_factory=list)
    loads: list[tuple[str, frames.Progress]] = field(default_factory=list)
    machines: dict[str, LendingMachine] = field(default_factory=dict)

    def lend(
        self,
        name: str,
        *,
        memory: int = 1 << 30,
        allow: frozenset[str] | None = None,
        kept: int = 1 << 28,
        caching: bool = True,
    ) -> LendingMachine:
        """`caching`: whether it speaks version 1.1.0 too."""
        node, store = self.network.node(name), MemoryStore()
        weights = NetworkWeights(node, VirtualRouting(node, latency=0.0), store)
        lender = Lender(name, store, weights, LendOptions(memory, allow, kept))
        lender.serve_on(node)
        if not caching:
            node.refuse(frames.CACHING)
        self.machines[name] = LendingMachine(node, store, lender)
        return self.machines[name]

    @asynccontextmanager
    async def coordinate(self, options: RunOptions, name: str = "me") -> AsyncIterator[Coordinator]:
        node, store = self.network.nodes.get(name) or self.network.node(name), MemoryStore()
        routing = VirtualRouting(node, latency=0.0)
        weights = NetworkWeights(node, routing, store)
        await weights.fetch(self.cid, header_parts)
        about = describe_untrusted(store, self.cid)
        told = Told(self.notes.append, lambda peer, progress: self.loads.append((peer, progress)))
        coordinator = Coordinator(
            Site(node, routing, store, weights, Labels(name.encode())), about, options, told
        )
        try:
            yield coordinator
        finally:
            await coordinator.aclose()


@asynccontextmanager
async def cluster(path: Path) -> AsyncIterator[Cluster]:
    async with trio.open_nursery() as nursery:
        network = VirtualNetwork(nursery, random.Random(1), LinkModel(delay=0.0005))
        store, cid = seeded(path, KEY)
        seeder = network.node("seeder")
        await nursery.start(lambda task_status: serve_transfer(seeder, store, task_status=task_status))
        await VirtualRouting(seeder, latency=0.0).provide(cid)
        made = Cluster(network, nursery, cid, seeder)
        try:
            yield made
        finally:
            for machine in made.machines.values():
                machine.lender.stages.close()
            nursery.cancel_scope.cancel()


async def greedily(coordinator: Coordinator, prompt: list[int], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(int((await coordinator.logits(history)).argmax()))
    return history
