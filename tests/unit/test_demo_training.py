"""The scripts behind the demo model: a consistent grammar, right gradients, the same bytes every time."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

DEMO = Path(__file__).resolve().parents[2] / "manifests" / "demo"


@pytest.fixture
def stories(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module("stories")


@pytest.fixture
def transformer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module("transformer")


def test_every_plot_fills_every_slot_and_reads_as_sentences(stories: ModuleType) -> None:
    rng = random.Random(7)
    for plot in stories.PLOTS:
        for beat in plot:
            for sentence in beat:
                text = sentence.format_map(stories.draw_slots(rng, rng.choice(stories.FRIENDS)))
                assert "{" not in text
                assert text.rstrip('"')[-1] in ".?!", text
    for _ in range(2000):
        text = stories.story(rng)
        assert text[0].isupper()
        assert "  " not in text
        assert " a owl" not in text


def test_a_story_keeps_to_its_hero(stories: ModuleType) -> None:
    for seed in range(300):
        rng = random.Random(seed)
        hero = stories.FRIENDS[seed % len(stories.FRIENDS)]
        text = stories.story(rng, hero)
        named = {friend.name for friend in stories.FRIENDS if friend.name in text}
        assert hero.name in text.split(".")[0]
        assert len(named) <= 3


def test_questions_about_places_are_answered_by_what_was_told(stories: ModuleType) -> None:
    for seed in range(300):
        turns = stories.where(random.Random(seed))
        told = turns[0][0]
        for question, answer in turns:
            place = answer.removesuffix(".").split(" is ")[1]
            thing = question.rpartition("Where is the ")[2].removesuffix("?")
            assert told.count(f"The {thing} is {place}.") == 1
            assert told.count(place) == 1


def test_texts_depend_on_the_seed_alone(stories: ModuleType) -> None:
    assert stories.documents(3, 50, "<end>") == stories.documents(3, 50, "<end>")
    assert stories.documents(3, 50, "<end>") != stories.documents(4, 50, "<end>")


def test_gradients_agree_with_differences_of_the_loss(transformer: ModuleType) -> None:
    rng = np.random.default_rng(0)
    shape = transformer.Shape(50, layers=2, width=16, heads=4, kv_heads=2, hidden=24)
    params = transformer.initial(shape, rng)
    tokens, targets = rng.integers(0, 50, (3, 13)), rng.integers(0, 50, 39)

    def loss() -> float:
        return float(transformer.cross_entropy(transformer.forward(shape, params, tokens)[0], targets)[0])

    logits, run = transformer.forward(shape, params, tokens)
    gradients = transformer.backward(run, transformer.cross_entropy(logits, targets)[1])
    assert gradients.keys() == params.keys()
    for name, value in params.items():
        # Along the gradient itself the slope is its squared length: large enough for single precision.
        slope = float((gradients[name].astype(np.float64) ** 2).sum())
        step = 0.02 / slope**0.5
        params[name] = value + np.float32(step) * gradients[name]
        above = loss()
        params[name] = value - np.float32(step) * gradients[name]
        below = loss()
        params[name] = value
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=0.03), name


def test_training_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("first.gguf", "second.gguf"):
        path = tmp_path / name
        command = [sys.executable, str(DEMO / "train.py"), "--steps", "2", "--quiet", "--output", str(path)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert len(written[0]) <= 2_000_000
