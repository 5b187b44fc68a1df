"""A small model of noise, and what one machine says with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omninfer.engines import FileTensorSource, StageSpec, get_engine
from omninfer.testing.cluster import write_noise_gguf


@pytest.fixture(scope="session")
def noise_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of six layers whose weights are noise; its head is tied to the embedding."""
    path = tmp_path_factory.mktemp("noise") / "noise.gguf"
    write_noise_gguf(path)
    return path


@pytest.fixture(scope="session")
def greedy(noise_file: Path) -> list[int]:
    """A prompt and the 40 tokens that greedy decoding on one machine continues it with."""
    source = FileTensorSource(noise_file)
    stage = get_engine("numpy").load(StageSpec.whole(source.model()), source, context=512)
    history = [5, 17, 3, 80, 41]
    for _ in range(40):
        position = stage.length(0)
        x = np.array(history[position:], dtype=np.int32)
        history.append(int(stage.forward(x, slot=0, position=position)[0].argmax()))
    return history


@pytest.fixture(autouse=True)
def _same_speed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines in one process measure each other's noise: plans would differ from run to run."""
    monkeypatch.setattr("omninfer.stage.measure", lambda engine: 1e9)
    monkeypatch.setattr("omninfer.coordinator.measure", lambda engine: 1e9)
