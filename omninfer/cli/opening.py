"""What `omni run` and `omni chat` share: from a model's name to something that answers logits.

Opens a node only if somebody else is needed: a whole model runs here without any network.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from omninfer.arch import KVKind
from omninfer.coordinator import Coordinator, RunOptions, Site, Told
from omninfer.frames import Progress
from omninfer.generation import Generation, GenerationParams, Shown, generate
from omninfer.grammar import MAX_SCHEMA, JsonSchema
from omninfer.labels import Labels
from omninfer.sampling import SamplingParams
from omninfer.sources import Description, describe_untrusted, header_parts
from omninfer.tokenizer import Tokenizer
from omninfer.weights import NetworkWeights
from omnistore.cid import CID
from omnistore.cli.client import check_reachable, open_client, routing_of
from omnistore.cli.home import config, home_store
from omnistore.cli.names import find_named, is_published_name
from omnistore.cli.output import Output, size
from omnistore.config import Config, load_key
from omnistore.errors import BlockMissing, InputError, MalformedCID
from omnistore.net.addresses import parse_dialable_untrusted
from omnistore.transfer.client import Offline, every_part, provider_at

LEAST_CONTEXT: Final = 2048
"""Tokens planned for unless --context says otherwise: a page or two."""
_VERIFY: Final = "If you added it here, `omni verify` names the file that is gone or has changed."
_TELL_EVERY: Final = 2.0
"""Seconds between two words on one machine's progress."""


_SAMPLING: Final = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n",
    "presence_penalty", "frequency_penalty",
)  # fmt: skip
"""Options that are parameters of the sampler, by the same names."""


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise InputError(
            f"--logit-bias {text!r} is not a token ID and a number", remedy="Say --logit-bias 198=-5."
        ) from None


def _schema(text: str) -> str:
    """The schema itself, of a file unless it is given as JSON."""
    if text.lstrip()[:1] in ("{", "["):
        return text
    try:
        with Path(text).open(encoding="utf-8") as file:
            return file.read(MAX_SCHEMA + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"the JSON schema can not be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of both commands, checked."""

    model: str
    layers: str
    lenders: tuple[str, ...]
    peers: tuple[str, ...]
    bootstrap: tuple[str, ...]
    engine: str
    context: int | None
    silence: float
    kv: KVKind | None
    """None: as the configuration says."""
    params: GenerationParams
    caps: Mapping[str, Any]
    """Settings that were given as options."""
    schema: str | None = None
    """JSON Schema that what is written has to satisfy."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Asked:
        """From click's options. Raises `InputError`."""
        chosen = {name: options[name] for name in _SAMPLING if options[name] is not None}
        seed = secrets.randbits(32) if options["seed"] is None else options["seed"]
        biases = tuple(_bias(text) for text in options["biases"])
        sampling = SamplingParams(seed=seed, logit_bias=biases, **chosen)
        params = GenerationParams(
            options["max_tokens"], tuple(options["stops"]), sampling, options["logprobs"]
        )
        rest = (
            "model",
            "layers",
            "lenders",
            "peers",
            "bootstrap",
            "engine",
            "context",
            "silence",
            "kv",
            "caps",
        )
        schema = None if options["schema"] is None else _schema(options["schema"])
        return cls(params=params, schema=schema, **{name: options[name] for name in rest})


@dataclass(slots=True)
class OpenModel:
    """An opened model."""

    asked: Asked
    output: Output
    about: Description
    tokenizer: Tokenizer
    site: Site
    schema: JsonSchema | None = None
    kv: KVKind = "full"
    kv_memory: int | None = None
    """How keys and values are kept and bytes for them, as in the configuration."""
    _told: dict[tuple[str, str], float] = field(default_factory=dict)
    """When each machine's phase was last spoken of, or began."""
    _spoken: set[tuple[str, str]] = field(default_factory=set)
    """Phases that a person was told of: these are told to the end."""

    @asynccontextmanager
    async def coordinator(self, prompt_tokens: int) -> AsyncIterator[Coordinator]:
        """Whoever runs the model, with room for a prompt of so many tokens and what is to follow it."""
        most = self.about.spec.context_length
        wanted = prompt_tokens + self.asked.params.max_tokens
        context = self.asked.context or min(most, max(LEAST_CONTEXT, -(-wanted // 1024) * 1024))
        if context > most:
            raise InputError(f"--context {context} is more than the {most} tokens the model was made for")
        options = RunOptions(
            layers=self.asked.layers,
            lenders=self.asked.lenders,
            providers=tuple(provider_at(addr) for addr in (*self.asked.peers, *self.asked.lenders)),
            engine=self.asked.engine,
            context=context,
            kv_memory=self.kv_memory,
            kv=self.kv,
            silence=self.asked.silence,
        )
        coordinator = Coordinator(self.site, self.about, options, Told(self._note, self._progress))
        try:
            yield coordinator
        finally:
            with trio.CancelScope(shield=True):
                await coordinator.aclose()

    async def write(
        self, coordinator: Coordinator, prompt: Sequence[int], shown: Shown, generation: Generation
    ) -> None:
        """Continue a prompt as it was asked for, into `generation`; says where JSON came out incomplete."""
        text = self.schema.begin() if self.schema is not None else None
        before = coordinator.computed
        try:
            await generate(coordinator, self.tokenizer, prompt, self.asked.params, shown, generation, text)
        finally:
            generation.computed = coordinator.computed - before
        if text is not None and not text.complete:
            why = "--stop" if generation.finish == "stop" else f"--max-tokens {self.asked.params.max_tokens}"
            if generation.finish == "length" and len(generation.tokens) < self.asked.params.max_tokens:
                why = "the end of the context"
            self._note(f"the JSON is incomplete: {why} cut it off")

    def _note(self, text: str) -> None:
        self.output.note(text)
        self.output.event("note", text=text)

    def _progress(self, peer: str, progress: Progress) -> None:
        """Called from any thread, often."""
        key, now = (peer, progress.phase), time.monotonic()
        if progress.total == 0:
            return
        ended = progress.done >= progress.total and key in self._spoken
        if now - self._told.setdefault(key, now) < _TELL_EVERY and not ended:
            return
        self._told[key] = now
        (self._spoken.discard if ended else self._spoken.add)(key)
        self.output.event(
            "progress", peer=peer, phase=progress.phase, done=progress.done, total=progress.total
        )
        percent = 100 * progress.done // progress.total
        name = "this machine" if peer == self.site.network.peer_id else peer
        self.output.note(f"{name}: {progress.phase} {percent} % of {size(progress.total)}")


class _Alone(Offline):
    """This machine, for a model that needs no other."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id


@asynccontextmanager
async def open_model(output: Output, asked: Asked) -> AsyncIterator[OpenModel]:
    """Find the model, here or among peers, and read its headers."""
    others = (*asked.peers, *asked.lenders)
    settings = config(bootstrap=asked.bootstrap, **asked.caps)
    name = asked.model
    if is_published_name(name):
        name = str(await find_named(output, settings, name, others))
    cid, whole = await trio.to_thread.run_sync(_look, name)
    for addr in others:
        parse_dialable_untrusted(addr)
    if whole and not others and not asked.bootstrap:
        with home_store() as store:
            alone = _Alone(load_key(settings.home).public.peer_id)
            site = Site(alone, None, store, NetworkWeights(alone, None, store))
            yield await _opened(asked, output, cid, site, settings)
        return
    named = bool(others)
    check_reachable(settings, f"{asked.model} is not here, or not whole", named=named, remedy=f" {_VERIFY}")
    if not (named or settings.bootstrap):
        output.note(f"{asked.model} is not here, or not whole: looking who has it. {_VERIFY}")
    async with open_client(settings, named=named) as node:
        routing = routing_of(node, named=named)
        weights = NetworkWeights(
            node.network, routing, node.store, node.download, node.limits, hints=node.hints
        )
        await weights.fetch(cid, header_parts, tuple(provider_at(addr) for addr in others))
        labels = Labels(load_key(settings.home).seed)
        site = Site(node.network, routing, node.store, weights, labels)
        yield await _opened(asked, output, cid, site, settings)


async def _opened(asked: Asked, output: Output, cid: CID, site: Site, settings: Config) -> OpenModel:
    about = await trio.to_thread.run_sync(describe_untrusted, site.store, cid)
    tokenizer = await trio.to_thread.run_sync(Tokenizer.from_metadata_untrusted, about.metadata)
    schema = None
    if asked.schema is not None:
        schema = await trio.to_thread.run_sync(
            JsonSchema.parse_untrusted, asked.schema, tokenizer, about.spec.vocab
        )
    kv = asked.kv or ("q8" if settings.kv_q8 else "full")
    return OpenModel(asked, output, about, tokenizer, site, schema, kv, settings.kv_memory)


def _look(text: str) -> tuple[CID, bool]:
    """The model's CID, and whether all of it is here."""
    with home_store() as store:
        try:
            cid = CID.parse_untrusted(text)
        except MalformedCID:
            cid = store.find(text).cid
        try:
            status = store.status(cid)
        except BlockMissing:
            return cid, False
        return cid, status.complete.issuperset(every_part(status.model.manifest))


def report(coordinator: Coordinator, generation: Generation) -> dict[str, Any]:
    """What `--json` says of a generation."""
    stages = coordinator.plan.stages if coordinator.plan else ()
    thoughts = [
        {
            "token": one.token,
            "logprob": round(one.logprob, 6),
            "top": [{"token": token, "logprob": round(value, 6)} for token, value in one.top],
        }
        for one in generation.logprobs
    ]
    return {
        **({"logprobs": thoughts} if thoughts else {}),
        "text": generation.text,
        "tokens": generation.tokens,
        "prompt_tokens": list(generation.prompt),
        "computed_tokens": generation.computed,
        "cached_tokens": generation.cached,
        "engine": coordinator.engine,
        "stages": [{"peer": stage.peer, "layers": stage.layers} for stage in stages],
        "tokens_per_second": round(generation.tokens_per_second, 3),
        "prompt_seconds": round(generation.prompt_seconds, 6),
        "seconds": round(generation.seconds, 6),
        "finish": generation.finish,
        "lost": list(coordinator.losses),
    }


def summary(coordinator: Coordinator, generation: Generation) -> str:
    """The same in a line for a person."""
    where = coordinator.whereabouts() if coordinator.plan else "not begun"
    cached = f", {generation.cached} of them cached" if generation.cached else ""
    return (
        f"{len(generation.prompt)} prompt tokens{cached} in {generation.prompt_seconds:.2f} s;"
        f" {len(generation.tokens)} tokens at {generation.tokens_per_second:.1f} tokens/s ({where})"
    )
