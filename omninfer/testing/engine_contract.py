"""The contract of an engine, as tests: subclass `EngineContract`, give it an `engine` fixture, run pytest.

It holds an engine against itself (a prompt in pieces, a model in stages, a forked slot must come out as
without) and against the errors that `omninfer.engines.interface` promises, on models of noise. Whether
the numbers are right is for parity tests against references: see `omninfer.engines.numpy_engine`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omninfer.arch import EMBEDDING, FAMILIES, HEAD, Feature, ModelSpec, kv_bytes
from omninfer.engines.interface import Engine, Stage, StageSpec, TensorSource, tensors_needed
from omninfer.engines.packing import PLAIN, SUPPORTED
from omninfer.testing.noise import NoiseSource, noise_model
from omnistore.chunker.ggml import by_name, nbytes
from omnistore.errors import (
    BadConfig,
    InferenceError,
    InputError,
    LocalProtocolError,
    MalformedGGUF,
    UnsupportedModel,
)

KINDS = SUPPORTED
CONTEXT = 96


def prompt(count: int, start: int = 0) -> NDArray[np.int32]:
    """Tokens of no meaning, none of them near its neighbours."""
    return (np.arange(start, start + count, dtype=np.int32) * 37 + 5) % 320


def load(
    engine: Engine, model: tuple[ModelSpec, TensorSource], *, context: int = CONTEXT, slots: int = 4
) -> Stage:
    return engine.load(StageSpec.whole(model[0]), model[1], context=context, slots=slots)


def run(stages: Sequence[Stage], x: NDArray[Any], *, position: int = 0, slot: int = 0) -> NDArray[np.float32]:
    """All logits of a whole pipeline of stages."""
    for stage in stages:
        x = stage.forward(x, slot=slot, position=position, logits="all")
    return x


class EngineContract:
    """Every engine passes these. `tolerance` is of float32 arithmetic on logits of about 1."""

    tolerance = 2e-4
    quantised_tolerance = 2e-4
    """With quantised weights: more where an engine quantises activations too, and the last bit of one decides
    between two codes."""
    kv_itemsize = 4
    """Bytes of an element of keys and values that are kept in full: 2 where products are of halfs."""

    @pytest.fixture
    def engine(self) -> Engine:
        pytest.fail("a subclass of EngineContract overrides the fixture `engine`")

    @pytest.fixture
    def model(self) -> tuple[ModelSpec, NoiseSource]:
        return noise_model()

    @pytest.fixture
    def stage(self, engine: Engine, model: tuple[ModelSpec, NoiseSource]) -> Stage:
        return load(engine, model)

    def same(self, a: NDArray[np.float32], b: NDArray[np.float32], kind: str = "F32") -> None:
        tolerance = self.tolerance if kind in PLAIN else self.quantised_tolerance
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)

    def refused(self, engine: Engine, model: tuple[ModelSpec, TensorSource]) -> bool:
        """Whether the engine says that it lacks what the model needs; then loading must name it."""
        lacking = model[0].features & ~engine.features
        if not lacking:
            return False
        with pytest.raises(UnsupportedModel, match=str(next(iter(lacking)).name)):
            load(engine, model)
        return True

    # One slot: any way of cutting the same tokens gives the same numbers.

    @pytest.mark.parametrize("kind", KINDS)
    def test_decoding_equals_prefill(self, engine: Engine, kind: str) -> None:
        stage = load(engine, noise_model(kind=kind, block_count=2))
        tokens = prompt(20)
        whole = run([stage], tokens)
        assert np.isfinite(whole).all() and whole.std() > 0.1
        for i, token in enumerate(tokens):
            row = stage.forward(np.array([token], np.int32), slot=1, position=i)
            self.same(row, whole[i : i + 1], kind)

    @pytest.mark.parametrize("architecture", FAMILIES)
    @pytest.mark.parametrize("piece", [1, 7, 16])
    def test_prefill_in_pieces_equals_prefill_at_once(
        self, engine: Engine, architecture: str, piece: int
    ) -> None:
        if self.refused(engine, noise_model(architecture)):
            return
        stage = load(engine, noise_model(architecture))
        tokens = prompt(40)
        pieces = [run([stage], tokens[i : i + piece], position=i, slot=1) for i in range(0, 40, piece)]
        self.same(np.concatenate(pieces), run([stage], tokens))

    def test_a_prompt_longer_than_a_cache_step(self, engine: Engine) -> None:
        stage = load(engine, noise_model(block_count=1), context=700)
        tokens = prompt(700)
        whole = run([stage], tokens)
        first = run([stage], tokens[:250], slot=1)
        second = run([stage], tokens[250:], slot=1, position=250)
        self.same(np.concatenate((first, second)), whole)

    def test_the_same_call_gives_the_same_bits(self, stage: Stage) -> None:
        first, second = run([stage], prompt(30)), run([stage], prompt(30), slot=1)
        assert np.array_equal(first, second)

    def test_order_matters(self, stage: Stage) -> None:
        forward = stage.forward(np.array([1, 2, 3], np.int32), slot=0, position=0)
        backward = stage.forward(np.array([2, 1, 3], np.int32), slot=1, position=0)
        assert np.abs(forward - backward).max() > 0.01

    def test_which_logits(self, stage: Stage) -> None:
        vocab = stage.spec.model.vocab
        every = stage.forward(prompt(9), slot=0, position=0, logits="all")
        last = stage.forward(prompt(9), slot=1, position=0, logits="last")
        none = stage.forward(prompt(9), slot=2, position=0, logits="none")
        assert (every.shape, last.shape, none.shape) == ((9, vocab), (1, vocab), (0, vocab))
        assert every.dtype == last.dtype == none.dtype == np.float32
        self.same(every[-1:], last)
        assert stage.length(2) == 9
        self.same(run([stage], prompt(2, 9), position=9, slot=2), run([stage], prompt(2, 9), position=9))

    # Slots.

    def test_trim_forgets(self, stage: Stage) -> None:
        run([stage], prompt(30))
        stage.trim(0, 12)
        assert stage.length(0) == 12
        again = run([stage], prompt(8, 50), position=12)
        expected = run([stage], np.concatenate((prompt(12), prompt(8, 50))), slot=1)
        self.same(again, expected[12:])
        stage.trim(0, 0)
        self.same(run([stage], prompt(5)), expected[:5])

    @pytest.mark.parametrize("length", [-1, 31])
    def test_trim_keeps_within_the_slot(self, stage: Stage, length: int) -> None:
        run([stage], prompt(30))
        with pytest.raises(InputError):
            stage.trim(0, length)
        assert stage.length(0) == 30

    def test_forks_part_ways(self, stage: Stage) -> None:
        run([stage], prompt(10))
        run([stage], prompt(3, 70), slot=1)
        stage.fork(0, 1)
        assert (stage.length(0), stage.length(1)) == (10, 10)
        left = run([stage], prompt(5, 10), position=10)
        right = run([stage], prompt(5, 60), position=10, slot=1)
        left_on = run([stage], prompt(2, 15), position=15)
        stage.drop(1)
        self.same(left, run([stage], prompt(15), slot=2)[10:])
        self.same(left_on, run([stage], prompt(2, 15), slot=2, position=15))
        self.same(right, run([stage], np.concatenate((prompt(10), prompt(5, 60))), slot=3)[10:])

    @pytest.mark.parametrize("kept", [0, 1, 6, 10])
    def test_a_beginning_can_be_forked(self, stage: Stage, kept: int) -> None:
        run([stage], prompt(10))
        run([stage], prompt(3, 70), slot=1)
        stage.fork(0, 1, kept)
        assert (stage.length(0), stage.length(1)) == (10, kept)
        right = run([stage], prompt(5, 60), position=kept, slot=1)
        left = run([stage], prompt(5, 10), position=10)
        self.same(right, run([stage], np.concatenate((prompt(kept), prompt(5, 60))), slot=3)[kept:])
        self.same(left, run([stage], prompt(15), slot=2)[10:])

    def test_more_than_there_is_can_not_be_forked(self, stage: Stage) -> None:
        run([stage], prompt(4))
        with pytest.raises(InputError, match="can not trim a slot of 4 tokens to 5"):
            stage.fork(0, 1, 5)
        assert (stage.length(0), stage.length(1)) == (4, 0)
        stage.fork(0, 0, 3)
        assert stage.length(0) == 3

    def test_forking_onto_itself_or_from_nothing(self, stage: Stage) -> None:
        run([stage], prompt(4))
        stage.fork(0, 0)
        assert stage.length(0) == 4
        stage.fork(1, 0)
        assert stage.length(0) == 0

    def test_slots_do_not_see_each_other(self, stage: Stage) -> None:
        prompts = [prompt(12, 20 * slot) for slot in range(4)]
        mixed: list[list[NDArray[np.float32]]] = [[], [], [], []]
        for i in range(0, 12, 3):
            for slot in (2, 0, 3, 1):
                mixed[slot].append(run([stage], prompts[slot][i : i + 3], position=i, slot=slot))
        for slot in range(4):
            stage.drop(slot)
            assert stage.length(slot) == 0
            self.same(np.concatenate(mixed[slot]), run([stage], prompts[slot], slot=slot))

    def test_callers_may_change_threads(self, stage: Stage) -> None:
        whole = run([stage], prompt(12), slot=1)
        parts: list[NDArray[np.float32]] = []
        for i in range(0, 12, 4):
            caller = threading.Thread(target=lambda i=i: parts.append(run([stage], prompt(4, i), position=i)))
            caller.start()
            caller.join()
        self.same(np.concatenate(parts), whole)

    # Stages.

    @pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "gpt-oss", "qwen2moe"])
    def test_layers_know_their_number_in_the_model(self, engine: Engine, architecture: str) -> None:
        spec, source = noise_model(architecture)
        if self.refused(engine, (spec, source)):
            return
        whole = run([load(engine, (spec, source))], prompt(20))
        stages = [
            engine.load(StageSpec(spec, 0, 1, embed=True, head=False), source, context=CONTEXT),
            engine.load(StageSpec(spec, 1, 3, embed=False, head=True), source, context=CONTEXT),
        ]
        prefill = run(stages, prompt(12))
        decode = [run(stages, prompt(1, i), position=i) for i in range(12, 20)]
        self.same(np.concatenate((prefill, *decode)), whole)

    @pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "MXFP4", "F16"])
    def test_experts_of_every_form(self, engine: Engine, kind: str) -> None:
        model = noise_model(kind=kind, extra=Feature.EXPERTS, block_count=1)
        if self.refused(engine, model):
            return
        stage = load(engine, model)
        whole = run([stage], prompt(12))
        rows = [run([stage], prompt(1, i), position=i, slot=1) for i in range(12)]
        self.same(np.concatenate(rows), whole, kind)

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("kind", ["F32", "Q4_K"])
    def test_a_model_split_anywhere_is_the_same_model(self, engine: Engine, kind: str, tied: bool) -> None:
        spec, source = noise_model(kind=kind, tied_head=tied, rope_freqs=True)
        whole = run([load(engine, (spec, source))], prompt(10))
        for cuts in ([0, 3], [1], [1, 2], [0, 1, 2, 3]):
            stages: list[Stage] = []
            for first, last in zip([0, *cuts], [*cuts, 3], strict=True):
                part = StageSpec(spec, first, last, embed=not stages, head=len(stages) == len(cuts))
                stages.append(engine.load(part, source, context=CONTEXT))
            prefill = run(stages, prompt(6))
            decode = [run(stages, prompt(1, i), position=i) for i in range(6, 10)]
            self.same(np.concatenate((prefill, *decode)), whole, kind)

    def test_hidden_states_in_and_out(self, engine: Engine, model: tuple[ModelSpec, NoiseSource]) -> None:
        spec = StageSpec(model[0], 1, 2, embed=False, head=False)
        stage = engine.load(spec, model[1], context=CONTEXT)
        x = np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)
        before = x.copy()
        y = stage.forward(x, slot=0, position=0)
        assert y.shape == (5, 256) and y.dtype == np.float32
        assert np.array_equal(x, before)
        assert stage.spec == spec

    def test_only_the_stage_s_own_tensors_are_read(
        self, engine: Engine, model: tuple[ModelSpec, NoiseSource]
    ) -> None:
        spec, source = model
        part = StageSpec(spec, 1, 2, embed=False, head=False)
        own = {name: shape for name, shape in source.shapes.items() if name.startswith("blk.1.")}
        stage = engine.load(part, NoiseSource(own, source.types), context=CONTEXT)
        assert set(tensors_needed(part)) == set(own)
        assert stage.nbytes == sum(nbytes(by_name(source.types[n]), s) for n, s in own.items())

    def test_progress_counts_packed_bytes(self, engine: Engine) -> None:
        spec, source = noise_model(kind="Q8_0")
        seen: list[tuple[int, int]] = []
        stage = engine.load(
            StageSpec.whole(spec), source, context=8, progress=lambda done, total: seen.append((done, total))
        )
        assert seen == sorted(seen) and seen[-1] == (stage.nbytes, stage.nbytes)

    # Keys and values in 8 bits.

    def kept_in_q8(self, engine: Engine, model: tuple[ModelSpec, TensorSource]) -> Stage | None:
        """A stage that keeps them so; None where the engine can not, and then it must say so."""
        whole = StageSpec.whole(model[0])
        if "q8" in engine.kv_kinds:
            return engine.load(whole, model[1], context=CONTEXT, slots=4, kv="q8")
        with pytest.raises(BadConfig, match=f"{engine.name} does not keep keys and values as q8"):
            engine.load(whole, model[1], context=CONTEXT, slots=4, kv="q8")
        return None

    @pytest.mark.parametrize("architecture", FAMILIES)
    def test_q8_differs_by_little_and_by_the_same_in_pieces(self, engine: Engine, architecture: str) -> None:
        model = noise_model(architecture)
        if self.refused(engine, model):
            return
        stage = self.kept_in_q8(engine, model)
        if stage is None:
            return
        tokens = prompt(80)
        whole = run([stage], tokens)
        full = run([load(engine, model)], tokens)
        # The last bit of an activation decides between two codes, a code now and then between two experts.
        typical = np.median if model[0].experts else np.max
        assert 0 < typical(np.abs(whole - full).max(axis=-1)) < 0.05  # on logits of about 1; 0.019 was seen
        pieces = [
            run([stage], tokens[a:b], position=a, slot=1) for a, b in ((0, 33), (33, 34), (34, 35), (35, 80))
        ]
        assert typical(np.abs(np.concatenate(pieces) - whole).max(axis=-1)) < 0.01

    def test_q8_slots_fork_and_trim(self, engine: Engine, model: tuple[ModelSpec, NoiseSource]) -> None:
        stage = self.kept_in_q8(engine, model)
        if stage is None:
            return
        whole = run([stage], prompt(30))
        stage.fork(0, 1, 12)
        stage.trim(0, 12)
        for slot in (0, 1):
            again = run([stage], prompt(30)[12:], position=12, slot=slot)
            np.testing.assert_allclose(again, whole[12:], atol=0.01)

    @pytest.mark.parametrize("head", [32, 24])
    def test_caches_take_what_plans_reckon(self, engine: Engine, head: int) -> None:
        """Heads that are whole groups of 32, and others: exactly, but for zeros that only ort fills them up
        with, and for halfs, which plans do not know of."""
        size = {"attention__key_length": head, "attention__value_length": head, "rope__dimension_count": 16}
        model = noise_model(**size)  # type: ignore[arg-type]  # integers
        took = {}
        for kind in engine.kv_kinds:
            stage = engine.load(StageSpec.whole(model[0]), model[1], context=CONTEXT, kv=kind)
            run([stage], prompt(CONTEXT))
            took[kind] = stage.cache_bytes(0)
            reckoned = kv_bytes(model[0], kind) * CONTEXT * model[0].layers
            assert took[kind] <= reckoned
            itemsize = self.kv_itemsize if kind == "full" else 4
            assert took[kind] * (32 if kind == "full" else head) * 4 >= reckoned * head * itemsize
        if "q8" in took:
            assert took["full"] / took["q8"] > 0.9 * self.kv_itemsize

    # Limits and errors: the call raises what it should, and changes nothing.

    @pytest.mark.parametrize(
        ("x", "position", "error"),
        [
            (np.array([320], np.int32), 4, InputError),
            (np.array([-1], np.int32), 4, InputError),
            (np.array([], np.int32), 4, InputError),
            (np.array([[1]], np.int32), 4, InputError),
            (np.array([1], np.int64), 4, InputError),
            (np.zeros((1, 256), np.float32), 4, InputError),
            (np.array([1], np.int32), 3, LocalProtocolError),
            (np.array([1], np.int32), 5, LocalProtocolError),
            (prompt(CONTEXT - 3), 4, InferenceError),
        ],
    )
    def test_bad_calls_change_nothing(
        self, stage: Stage, x: NDArray[Any], position: int, error: type[Exception]
    ) -> None:
        run([stage], prompt(4))
        with pytest.raises(error):
            stage.forward(x, slot=0, position=position)
        assert stage.length(0) == 4
        run([stage], prompt(8), slot=1)
        self.same(run([stage], prompt(4, 4), position=4), run([stage], prompt(8), slot=2)[4:])

    @pytest.mark.parametrize("x", [np.zeros((2, 255), np.float32), np.zeros(256, np.float32), prompt(2)])
    def test_bad_hidden_states(
        self, engine: Engine, model: tuple[ModelSpec, NoiseSource], x: NDArray[Any]
    ) -> None:
        stage = engine.load(StageSpec(model[0], 1, 3, embed=False, head=True), model[1], context=CONTEXT)
        with pytest.raises(InputError):
            stage.forward(x, slot=0, position=0)

    def test_the_context_can_be_filled_to_the_last_token(self, stage: Stage) -> None:
        run([stage], prompt(CONTEXT - 1))
        run([stage], prompt(1), position=CONTEXT - 1)
        with pytest.raises(InferenceError, match=str(CONTEXT)):
            run([stage], prompt(1), position=CONTEXT)

    @pytest.mark.parametrize("slot", [-1, 4])
    def test_slots_outside_the_stage(self, stage: Stage, slot: int) -> None:
        with pytest.raises(InputError, match=f"slot {slot}"):
            stage.forward(prompt(1), slot=slot, position=0)
        for call in (stage.length, stage.drop, lambda s: stage.fork(0, s), lambda s: stage.trim(s, 0)):
            with pytest.raises(InputError, match=f"slot {slot}"):
                call(slot)

    def test_a_closed_stage(self, stage: Stage) -> None:
        stage.close()
        stage.close()
        with pytest.raises(LocalProtocolError, match="closed"):
            stage.forward(prompt(1), slot=0, position=0)

    @pytest.mark.parametrize(("context", "slots"), [(0, 1), (2049, 1), (8, 0)])
    def test_unusable_limits(
        self, engine: Engine, model: tuple[ModelSpec, NoiseSource], context: int, slots: int
    ) -> None:
        with pytest.raises(InputError):
            load(engine, model, context=context, slots=slots)

    def test_a_type_that_no_engine_has(self, engine: Engine, model: tuple[ModelSpec, NoiseSource]) -> None:
        model[1].types["blk.1.ffn_up.weight"] = "I8"
        with pytest.raises(UnsupportedModel, match=r"blk\.1\.ffn_up\.weight.*I8"):
            load(engine, model)

    def test_a_missing_tensor(self, engine: Engine, model: tuple[ModelSpec, NoiseSource]) -> None:
        del model[1].shapes[HEAD]
        with pytest.raises(MalformedGGUF, match=HEAD):
            load(engine, model)

    @pytest.mark.parametrize("name", [EMBEDDING, "blk.0.attn_norm.weight", "blk.2.attn_k.weight"])
    def test_a_tensor_of_another_shape(
        self, engine: Engine, model: tuple[ModelSpec, NoiseSource], name: str
    ) -> None:
        model[1].shapes[name] = (256, 77)
        with pytest.raises(MalformedGGUF, match=name):
            load(engine, model)

    def test_rows_that_are_no_whole_blocks(self, engine: Engine) -> None:
        spec, source = noise_model(feed_forward_length=300)
        source.types["blk.0.ffn_down.weight"] = "Q4_K"
        with pytest.raises(MalformedGGUF, match=r"blk\.0\.ffn_down\.weight"):
            load(engine, (spec, source))

    def test_a_tensor_that_ends_early(
        self, engine: Engine, model: tuple[ModelSpec, NoiseSource], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = NoiseSource.read
        monkeypatch.setattr(NoiseSource, "read", lambda *args: whole(*args)[:-4])
        with pytest.raises(MalformedGGUF, match="ends after"):
            load(engine, model)
