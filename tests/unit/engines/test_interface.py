"""Stage specs, the tensors they need, sources of tensors, and how an engine is picked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omninfer.arch import EMBEDDING, HEAD, HEAD_NORM, ROPE_FREQS, Feature
from omninfer.checks import check_engines
from omninfer.engines import (
    FileTensorSource,
    StageSpec,
    choose_engine,
    get_engine,
    pick_engine,
    tensors_needed,
    weigh_engines,
)
from omninfer.engines.blas import limit_blas_to_one_thread
from omninfer.engines.checks import check_tensors
from omninfer.engines.ort_graph import head_part
from omninfer.testing.noise import noise_model
from omnistore.errors import BadConfig, InputError, SourceChanged, UnsupportedModel
from omnistore.testing.tiny_gguf import TinyTensor, tiny_gguf


@pytest.mark.parametrize(
    ("first", "last", "embed", "head"),
    [
        (-1, 1, False, False),
        (2, 1, False, False),
        (0, 4, True, True),
        (1, 2, True, False),
        (0, 2, True, True),
        (1, 1, False, False),
    ],
)
def test_stages_that_can_not_be(first: int, last: int, embed: bool, head: bool) -> None:
    with pytest.raises(InputError):
        StageSpec(noise_model()[0], first, last, embed=embed, head=head)


def test_a_stage_needs_its_own_tensors_only() -> None:
    spec, source = noise_model(rope_freqs=True)
    whole = tensors_needed(StageSpec.whole(spec))
    assert sorted(whole) == sorted(source.names())
    assert len(set(whole)) == len(whole)
    assert tensors_needed(StageSpec(spec, 0, 0, embed=True, head=False)) == (EMBEDDING,)
    assert tensors_needed(StageSpec(spec, 3, 3, embed=False, head=True)) == (HEAD_NORM, HEAD)
    middle = tensors_needed(StageSpec(spec, 1, 2, embed=False, head=False))
    assert middle[0] == ROPE_FREQS and all(name.startswith("blk.1.") for name in middle[1:])


def test_a_tied_head_is_the_embedding() -> None:
    spec, _ = noise_model(tied_head=True)
    assert tensors_needed(StageSpec(spec, 3, 3, embed=False, head=True)) == (HEAD_NORM, EMBEDDING)
    assert tensors_needed(StageSpec.whole(spec)).count(EMBEDDING) == 1


def write_model(path: Path) -> dict[str, bytes]:
    """A whole noise model as a GGUF file, and its tensors' bytes."""
    _, source = noise_model(kind="Q8_0", embedding_length=64, feed_forward_length=64, vocab_size=33)
    data = {name: bytes(source.read(name)) for name in source.names()}
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 64,
        "llama.context_length": 128,
        "llama.vocab_size": 33,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    tensors = [TinyTensor(n, source.types[n], source.shapes[n], data[n]) for n in data]
    path.write_bytes(tiny_gguf(tensors, metadata=metadata))
    return data


def test_tensors_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = write_model(path)
    source = FileTensorSource(path)
    assert set(source.names()) == set(data)
    assert source.info("blk.0.ffn_up.weight")[0].name == "Q8_0"
    assert source.info("blk.0.attn_k.weight")[1] == (64, 16)
    for name, expected in data.items():
        assert source.read(name) == expected
        assert source.read(name, 5, 9) == expected[5:9]
    stage = get_engine("numpy").load(StageSpec.whole(source.model()), source, context=16)
    assert stage.nbytes == sum(map(len, data.values()))
    assert stage.forward(np.array([1, 2], np.int32), slot=0, position=0).shape == (1, 33)


def test_a_file_that_shrank(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path)
    source = FileTensorSource(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SourceChanged, match=r"model\.gguf"):
        get_engine("numpy").load(StageSpec.whole(source.model()), source, context=16)


@pytest.mark.parametrize("content", [None, b""])
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.gguf"):
        FileTensorSource(path)


def test_an_engine_by_name() -> None:
    assert pick_engine("numpy").name == "numpy"
    assert pick_engine("mlx").name == "mlx"
    with pytest.raises(BadConfig, match="torch") as raised:
        pick_engine("torch")
    assert "numpy" in (raised.value.remedy or "")


@pytest.mark.parametrize(("gpu", "expected"), [(True, "mlx"), (False, "ort")])
def test_auto_takes_mlx_where_a_gpu_answers(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, expected: str
) -> None:
    monkeypatch.setattr("omninfer.engines.mlx_engine.MlxEngine.accelerated", lambda self: gpu)
    assert pick_engine("auto").name == expected


def test_auto_takes_numpy_for_what_ort_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = noise_model("gemma2")
    assert pick_engine("auto", model).name == "ort"
    monkeypatch.setattr("omninfer.engines.ort_engine.FEATURES", ~Feature.POST_NORMS)
    monkeypatch.setattr("omninfer.engines.ort_engine.OrtEngine.features", ~Feature.POST_NORMS)
    assert pick_engine("auto", model).name == "numpy"
    assert pick_engine("auto", noise_model()[0]).name == "ort"
    with pytest.raises(UnsupportedModel, match=r"ort has no .*POST_NORMS"):
        get_engine("ort").load(StageSpec.whole(model), source, context=8)


@pytest.mark.parametrize("gpu", [True, False])
def test_auto_says_why(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr("omninfer.engines.mlx_engine.MlxEngine.accelerated", lambda self: gpu)
    mlx, ort, numpy = weigh_engines(noise_model()[0])
    assert [one.name for one in (mlx, ort, numpy) if one.taken] == ["mlx" if gpu else "ort"]
    assert mlx.reason.startswith("a GPU answers" if gpu else "no GPU answers")
    assert ort.reason.startswith("mlx is faster" if gpu else "it is the fastest engine on CPUs; mlx: no GPU")
    assert numpy.reason == ("mlx" if gpu else "ort") + " is faster here"
    assert choose_engine("numpy")[1] == "it was asked for"


def test_auto_names_what_an_engine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omninfer.engines.mlx_engine.MlxEngine.accelerated", lambda self: False)
    monkeypatch.setattr("omninfer.engines.ort_engine.OrtEngine.features", ~Feature.EXPERTS)
    engine, reason = choose_engine("auto", noise_model("qwen3moe")[0])
    assert engine.name == "numpy"
    assert reason.startswith("no other engine can be taken; mlx: no GPU answers")
    assert "ort: it lacks " in reason and "EXPERTS" in reason


def test_doctor_names_the_reason_for_each_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omninfer.engines.mlx_engine.MlxEngine.unavailable", lambda self: "no such chip")
    mlx, ort, numpy = check_engines()
    assert (mlx.check, mlx.state) == ("engine mlx", "unknown") and "no such chip" in mlx.text
    assert "--engine auto takes it" in ort.text and "no such chip" in ort.text
    assert "does not take it: ort is faster here" in numpy.text


def test_doctor_where_no_engine_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("no BLAS")

    monkeypatch.setattr("importlib.import_module", broken)
    found = list(check_engines())
    assert [one.state for one in found] == ["unknown", "unknown", "warning"]
    assert "seed only" in (found[-1].remedy or "")


def without_mlx(name: str) -> Any:
    if name == "omninfer.engines.mlx_engine":
        raise ImportError("libmlx.so: cannot open shared object file")
    return SimpleNamespace(
        engine=lambda: SimpleNamespace(name="numpy", unavailable=lambda: None, kv_kinds=("full",))
    )


def test_mlx_that_can_not_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", without_mlx)
    assert pick_engine("auto").name == "numpy"
    with pytest.raises(BadConfig, match=r"libmlx\.so"):
        pick_engine("mlx")


def test_an_engine_that_this_machine_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omninfer.engines.mlx_engine.MlxEngine.unavailable", lambda self: "no such chip")
    assert pick_engine("auto").name == "ort"
    with pytest.raises(BadConfig, match="no such chip"):
        pick_engine("mlx")


def test_importing_engines_imports_no_engine() -> None:
    code = (
        "import sys, omninfer.engines, omninfer.engines.interface\n"
        "print({'mlx', 'onnx', 'onnxruntime', "
        "'trio', 'libp2p', 'omninfer.engines.numpy_engine'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.skipif(
    sys.platform != "linux", reason="numpy's wheels bring OpenBLAS to Linux; elsewhere it varies"
)
def test_blas_is_told_to_use_one_thread() -> None:
    assert limit_blas_to_one_thread()


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "F16"])
def test_a_head_cut_by_rows_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model, source = noise_model(kind=kind)
    spec = StageSpec(model, model.layers, model.layers, embed=False, head=True)
    x = np.random.default_rng(5).standard_normal((3, model.width), dtype=np.float32)
    whole = get_engine("ort").load(spec, source, context=8)
    monkeypatch.setattr("omninfer.engines.ort_graph.HEAD_BYTES", whole.nbytes // 3)
    assert len(head_part(model, check_tensors(spec, source)).matrices) > 2
    cut = get_engine("ort").load(spec, source, context=8)
    expected = whole.forward(x, slot=0, position=0, logits="all")
    assert expected.shape == (3, model.vocab)
    np.testing.assert_allclose(cut.forward(x, slot=0, position=0, logits="all"), expected, atol=1e-5)
