"""Pipelines over processes and real sockets: the tokens of llama.cpp, alone, together and after a loss."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from omninfer import frames
from omninfer.cli.opening import Asked, open_model
from omninfer.engines import ENGINES
from omninfer.generation import generate
from omninfer.lenders import ask_lender
from omninfer.stage import Lender, LendOptions
from omninfer.weights import NetworkWeights
from omnistore.cid import CID
from omnistore.cli.output import Output
from omnistore.config import Config
from omnistore.keys import PrivateKey
from omnistore.net.interface import Provider
from omnistore.net.libp2p import open_network
from omnistore.store.files import FileStore
from omnistore.store.memory import MemoryStore

if TYPE_CHECKING:
    from tests.conftest import Run
    from tests.system.conftest import StartSeed

Reference = dict[str, list[dict[str, Any]]]
STORIES = "stories260K-F32.gguf"
DEMO = Path(__file__).resolve().parents[2] / "manifests" / "demo" / "omni-demo-F16.gguf"
"""For what needs no reference beside the repository."""


@pytest.fixture
def reference(shared: Path) -> Reference:
    """What llama.cpp says, by file: four prompts and 64 greedy tokens of each."""
    found: Reference = json.loads((shared / "models" / "reference.json").read_text())
    return found


@pytest.fixture
def published(omni: Run) -> Callable[[Path], str]:
    """Add a model to the coordinator's home; its CID."""

    def add(path: Path) -> str:
        done = omni("add", path)
        assert done.returncode == 0, done.stderr
        return str(done.stdout.splitlines()[-1])

    return add


def last(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def demo_case(number: int) -> dict[str, Any]:
    """What llama.cpp says with the model of the repository."""
    cases = json.loads(DEMO.with_name("reference.json").read_text())["answers"]
    found: dict[str, Any] = cases[number]
    return found


def run_json(omni: Run, cid: str, prompt: str, *args: object, **options: Any) -> dict[str, Any]:
    words = ("--prompt", prompt, "--temperature", 0, "--json", *args)
    done = omni("run", cid, *words, **options)
    assert done.returncode == 0, done.stderr
    return last(done.stdout)


def options(cid: str, **changes: Any) -> dict[str, Any]:
    """What click passes on for `omni run CID --max-tokens 64 --temperature 0 …`."""
    unset = (
        "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n", "presence_penalty",
        "frequency_penalty", "seed", "context", "kv", "logprobs", "schema",
    )  # fmt: skip
    given = {"model": cid, "layers": "auto", "engine": "auto", "silence": 10.0, "max_tokens": 64, "caps": {}}
    none: dict[str, Any] = dict.fromkeys(("lenders", "peers", "bootstrap", "stops", "biases"), ())
    return {**dict.fromkeys(unset), **none, **given, "temperature": 0.0, **changes}


def start_omni(home: Path, *args: str, **options: Any) -> subprocess.Popen[str]:
    """A command in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "omnistore.cli.main", *args],
        **{"stdin": subprocess.DEVNULL, **options},
        env={**os.environ, "OMNI_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
    )


def start_run(home: Path, *args: str) -> subprocess.Popen[str]:
    return start_omni(home, "run", *args, "--json")


def wait_for_text(run: subprocess.Popen[str]) -> None:
    """Until a few tokens have come."""
    assert run.stdout is not None
    seen = 0
    for line in run.stdout:
        seen += json.loads(line)["event"] == "text"
        if seen == 3:
            return
    raise AssertionError("the run ended before it said anything")


@pytest.mark.parametrize("name", ["stories260K-F32.gguf", "stories260K-F16.gguf"])
def test_alone_the_tokens_are_those_of_llama_cpp(
    name: str, shared: Path, reference: Reference, published: Callable[[Path], str], omni: Run
) -> None:
    cid = published(shared / "models" / name)
    for case in reference[name]:
        answer = run_json(omni, cid, case["prompt"], "--max-tokens", 64)
        assert answer["tokens"] == case["tokens"]
        assert answer["prompt_tokens"] == case["prompt_tokens"]
        assert answer["text"] == case["text"]
        assert [stage["layers"] for stage in answer["stages"]] == ["0-4"]
        assert answer["engine"]["name"] in ENGINES and answer["engine"]["reason"]


def test_stdout_is_the_completion_alone(published: Callable[[Path], str], omni: Run) -> None:
    cid, case = published(DEMO), demo_case(0)
    done = omni("run", cid, "--prompt", case["prompt"], "--temperature", 0)
    assert done.stdout == case["text"]
    assert "tokens/s" in done.stderr


def test_json_of_a_schema_and_what_cuts_it_off(
    published: Callable[[Path], str], omni: Run, tmp_path: Path
) -> None:
    cid, file = published(DEMO), tmp_path / "schema.json"
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    file.write_text(json.dumps(schema))
    for given in (str(file), json.dumps(schema)):
        done = omni("run", cid, "--prompt", "Once", "--seed", 3, "--json-schema", given)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) in ({"a": True}, {"a": False})
        assert "incomplete" not in done.stderr
    done = omni("run", cid, "--prompt", "Once", "--max-tokens", 2, "--json-schema", given)
    assert "--max-tokens 2 cut it off" in done.stderr
    for wrong, fault in (
        ("{", "no JSON"),
        ('{"not": {}}', "not"),
        (str(tmp_path / "none"), "can not be read"),
    ):
        done = omni("run", cid, "--prompt", "Once", "--json-schema", wrong)
        assert done.returncode == 2 and fault in done.stderr, done.stderr


def test_options_of_sampling_are_checked_and_log_probabilities_told(
    published: Callable[[Path], str], omni: Run
) -> None:
    cid, case = published(DEMO), demo_case(0)
    answer = run_json(omni, cid, case["prompt"], "--max-tokens", 3, "--logprobs", 2)
    assert [one["token"] for one in answer["logprobs"]] == case["tokens"][:3]
    assert [one["top"][0]["token"] for one in answer["logprobs"]] == case["tokens"][:3]
    banned = run_json(
        omni, cid, case["prompt"], "--max-tokens", 1, "--logit-bias", f"{case['tokens'][0]}=-10000"
    )
    assert banned["tokens"][0] == answer["logprobs"][0]["top"][1]["token"]
    for wrong in (("--logit-bias", "x"), ("--typical-p", 2), ("--logprobs", 1000), ("--repeat-penalty", 0)):
        done = omni("run", cid, "--prompt", "Once", *wrong)
        assert done.returncode == 2 and done.stderr.startswith("omni: "), done.stderr


def test_prompts_from_files_and_pipes_stops_and_seeds(
    published: Callable[[Path], str], omni: Run, home: Path, tmp_path: Path
) -> None:
    cid, case = published(DEMO), demo_case(0)
    file = tmp_path / "prompt.txt"
    file.write_text(case["prompt"])
    stopped = omni("run", cid, "--prompt-file", file, "--temperature", 0, "--stop", " to build", "--quiet")
    assert case["text"].startswith(stopped.stdout + " to build")
    assert stopped.stderr == ""
    sampled = ("run", cid, "--prompt", "-", "--max-tokens", "30", "--temperature", "1.5")
    said = []
    for seed in ("1", "1", "2"):
        with start_omni(home, *sampled, "--seed", seed, stdin=subprocess.PIPE) as process:
            out, _ = process.communicate(case["prompt"], timeout=60)
            said.append(out)
    assert said[0] == said[1] != said[2]
    neither = omni("run", cid)
    assert (neither.returncode, neither.stdout) == (2, "")


@pytest.mark.trio
@pytest.mark.parametrize("lenders", [1, 2])
async def test_over_processes_the_tokens_are_the_same_and_each_fetches_its_parts(
    lenders: int,
    shared: Path,
    reference: Reference,
    published: Callable[[Path], str],
    home: Path,
    start_seed: StartSeed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cid = published(shared / "models" / STORIES)
    seeds = [start_seed(tmp_path / f"lender{n}", "--compute", "--allow", "any") for n in range(lenders)]
    monkeypatch.setenv("OMNI_HOME", str(home))
    asked = Asked.of(options(cid, lenders=tuple(seed.addr for seed in seeds)))
    async with open_model(Output(quiet=True), asked) as opened, opened.coordinator(0) as coordinator:
        for case in reference[STORIES]:
            ids = opened.tokenizer.encode(case["prompt"], add_special=True, parse_special=False)
            done = await generate(coordinator, opened.tokenizer, ids, asked.params, lambda text, token: None)
            assert done.tokens == case["tokens"]
            assert done.text == case["text"]
        assert coordinator.plan is not None
        stages = {stage.peer: stage for stage in coordinator.plan.stages}
    assert len(stages) == lenders + 1
    for seed in seeds:
        stage = stages[seed.peer_id]
        wanted = {"header.0", *(f"layer.{n}" for n in range(stage.first, stage.last))}
        wanted |= ({"embed"} if stage.embed else set()) | ({"head"} if stage.head else set())
        with closing(FileStore(Config(seed.home))) as store:  # what `omni show` prints, without a process
            status = store.status(CID.parse_untrusted(cid))
        assert {str(key) for key in status.complete} == wanted
        assert status.bytes_held == sum(p.size for p in status.model.manifest.parts if str(p.key) in wanted)


def test_a_run_over_two_lenders_says_who_did_what(
    published: Callable[[Path], str],
    omni: Run,
    start_seed: StartSeed,
    tmp_path: Path,
) -> None:
    cid, case = published(DEMO), demo_case(0)
    seeds = [start_seed(tmp_path / f"lender{n}", "--compute=1", "--allow", "any") for n in range(2)]
    named = [word for seed in seeds for word in ("--with", seed.addr)]
    answer = run_json(omni, cid, case["prompt"], *named)
    assert answer["tokens"] == case["tokens"]
    assert answer["tokens_per_second"] > 0
    assert {seed.peer_id for seed in seeds} < {stage["peer"] for stage in answer["stages"]}
    ends = [tuple(map(int, stage["layers"].split("-"))) for stage in answer["stages"]]
    assert sorted(n for end in ends for n in range(end[0], end[-1] + 1)) == list(range(8))


def test_with_layers_none_no_weights_come_here(
    published: Callable[[Path], str],
    omni: Run,
    home: Path,
    start_seed: StartSeed,
    tmp_path: Path,
) -> None:
    cid, case = published(DEMO), demo_case(1)
    lender = start_seed(home, "--compute", "--allow", "any")
    elsewhere = tmp_path / "elsewhere"
    answer = run_json(omni, cid, case["prompt"], "--layers", "none", "--with", lender.addr, home=elsewhere)
    assert answer["tokens"] == case["tokens"]
    assert answer["stages"] == [{"peer": lender.peer_id, "layers": "0-7"}]
    assert answer["engine"] is None
    shown = json.loads(omni("show", cid, "--json", home=elsewhere).stdout)
    assert [part["part"] for part in shown["parts"] if part["held"]] == ["header.0"]


def test_a_second_run_finds_its_prompt_at_the_lender_and_nobody_else_does(
    published: Callable[[Path], str], omni: Run, home: Path, start_seed: StartSeed, tmp_path: Path
) -> None:
    cid, case = published(DEMO), demo_case(1)
    prompt = ((case["prompt"] + case["text"]) * 2)[:-60]
    lender = start_seed(home, "--compute", "--allow", "any")
    for q8 in ((), ("--kv", "q8", "--engine", "numpy")):
        words = ("--layers", "none", "--with", lender.addr, "--max-tokens", 8, *q8)
        mine, other = tmp_path / "mine", tmp_path / "other"
        first = run_json(omni, cid, prompt, *words, home=mine)
        length = len(first["prompt_tokens"])
        assert length > 128 and first["cached_tokens"] == 0
        assert first["computed_tokens"] == length + len(first["tokens"]) - 1
        again = run_json(omni, cid, prompt, *words, home=mine)
        assert again["tokens"] == first["tokens"]
        assert again["cached_tokens"] == (length - 1) // 64 * 64
        assert again["computed_tokens"] == first["computed_tokens"] - again["cached_tokens"]
        stranger = run_json(omni, cid, prompt, *words, home=other)
        assert (stranger["tokens"], stranger["cached_tokens"]) == (first["tokens"], 0)


def test_eight_bit_keys_and_values_are_an_option_and_a_setting(
    published: Callable[[Path], str], omni: Run, home: Path
) -> None:
    cid, case = published(DEMO), demo_case(0)
    answer = run_json(omni, cid, case["prompt"], "--max-tokens", 16, "--kv", "q8")
    assert answer["engine"]["name"] == "numpy"
    assert "ort: it does not keep keys and values as q8" in answer["engine"]["reason"]
    refused = omni("run", cid, "--prompt", "x", "--kv", "q8", "--engine", "ort")
    assert refused.returncode == 2
    assert "the engine ort does not keep keys and values as q8" in refused.stderr
    (home / "config.toml").write_text('kv_q8 = true\nkv_memory = "256KB"\n')
    assert run_json(omni, cid, "Once", "--max-tokens", 2)["engine"]["name"] == "numpy"
    assert run_json(omni, cid, "Once", "--max-tokens", 2, "--kv", "full", "--context", 16)["tokens"]
    full = omni("run", cid, "--prompt", "Once", "--kv", "full")
    assert full.returncode == 11
    assert "kv_memory is" in full.stderr and "Raise kv_memory in config.toml" in full.stderr


# --- losses and refusals --------------------------------------------------------------------


LONG = ("--prompt", "Once upon a time", "--max-tokens", "400")


@pytest.mark.parametrize(
    ("how", "sampling"),
    [
        (signal.SIGKILL, ("--temperature", "0")),
        (signal.SIGKILL, ("--temperature", "0.9", "--seed", "11")),
        (signal.SIGSTOP, ("--temperature", "0", "--silence", "2")),
    ],
    ids=["killed-greedy", "killed-sampled", "stopped"],
)
def test_a_lender_lost_in_the_middle_changes_no_letter(
    how: signal.Signals,
    sampling: tuple[str, ...],
    shared: Path,
    published: Callable[[Path], str],
    omni: Run,
    home: Path,
    start_seed: StartSeed,
    tmp_path: Path,
) -> None:
    cid = published(shared / "models" / STORIES)
    alone = last(omni("run", cid, *LONG, *sampling, "--json").stdout)
    lenders = [start_seed(tmp_path / f"lender{n}", "--compute", "--allow", "any") for n in range(2)]
    named = [word for lender in lenders for word in ("--with", lender.addr)]
    with start_run(home, cid, *LONG, *sampling, *named) as run:
        wait_for_text(run)
        lenders[0].process.send_signal(how)
        assert run.stdout is not None
        answer = last(run.stdout.read())
    assert run.returncode == 0
    assert answer["lost"] == [lenders[0].peer_id]
    assert lenders[0].peer_id not in {stage["peer"] for stage in answer["stages"]}
    assert answer["tokens"] == alone["tokens"]
    assert answer["text"] == alone["text"]


def test_an_interrupted_run_ends_cleanly_with_what_there_was(
    shared: Path, published: Callable[[Path], str], home: Path
) -> None:
    with start_run(home, published(shared / "models" / STORIES), *LONG, "--temperature", "0") as run:
        wait_for_text(run)
        run.send_signal(signal.SIGINT)
        assert run.stdout is not None
        answer = last(run.stdout.read())
    assert run.returncode == 130
    assert answer["finish"] == "interrupted"
    assert 0 < len(answer["tokens"]) < 400


def test_a_lender_that_does_not_know_us_refuses_and_says_what_to_do(
    published: Callable[[Path], str], omni: Run, start_seed: StartSeed, tmp_path: Path
) -> None:
    cid = published(DEMO)
    lender = start_seed(tmp_path / "lender", "--compute")
    me = omni("id").stdout.strip()
    done = omni("run", cid, "--prompt", "x", "--with", lender.addr)
    assert done.returncode == 11
    assert done.stdout == ""
    assert f"{lender.peer_id} does not lend compute to {me}" in done.stderr
    assert f"omni seed --compute --allow {me}" in done.stderr


def test_a_lender_that_is_not_there_is_named(
    published: Callable[[Path], str], omni: Run, start_seed: StartSeed, tmp_path: Path
) -> None:
    cid = published(DEMO)
    lender = start_seed(tmp_path / "lender", "--compute", "--allow", "any")
    addr = lender.addr
    lender.stop(signal.SIGKILL)
    done = omni("run", cid, "--prompt", "x", "--with", addr)
    assert done.returncode == 9
    assert lender.peer_id in done.stderr


def test_a_seed_that_lends_nothing_is_named(
    published: Callable[[Path], str], omni: Run, start_seed: StartSeed, tmp_path: Path
) -> None:
    cid = published(DEMO)
    seed = start_seed(tmp_path / "seed")
    done = omni("run", cid, "--prompt", "x", "--with", seed.addr)
    assert done.returncode == 9
    assert f"{seed.peer_id} does not answer as a lender" in done.stderr
    assert "omni seed --compute" in done.stderr


@pytest.mark.trio
async def test_a_lender_of_the_first_version_is_spoken_to_in_it() -> None:
    """What a peer does not speak shows on a real network only when it is to answer."""
    async with (
        open_network(PrivateKey(secrets.token_bytes(32)), ["/ip4/127.0.0.1/tcp/0"]) as old,
        open_network(PrivateKey(secrets.token_bytes(32)), []) as network,
    ):
        store = MemoryStore()
        options = LendOptions(memory=1 << 30, allow=None)
        lender = Lender(old.peer_id, store, NetworkWeights(old, None, store), options)
        old.serve(frames.PROTOCOL, partial(lender.serve, caching=False))
        provider = Provider(await network.connect(old.addrs()[0]))
        lending = await ask_lender(network, provider, "numpy", 10.0, named=True)
        assert (lending.peer, lending.link.conversation.caching) == (old.peer_id, False)
        await lending.link.aclose()


# --- chat -----------------------------------------------------------------------------------


def test_chat_reads_lines_from_a_pipe_and_answers_each(published: Callable[[Path], str], home: Path) -> None:
    with start_omni(
        home,
        "chat",
        published(DEMO),
        "--max-tokens",
        "12",
        "--temperature",
        "0",
        "--json",
        stdin=subprocess.PIPE,
    ) as process:
        out, _ = process.communicate("Hello\n\nMore\n/exit\nnever read\n", timeout=60)
    turns = [event for event in map(json.loads, out.splitlines()) if event["event"] == "message"]
    assert process.returncode == 0
    assert len(turns) == 2
    assert all(0 < len(turn["tokens"]) <= 12 for turn in turns)
    # The second prompt begins with everything of the first turn, which is not computed again.
    asked = [len(turn["prompt_tokens"]) + len(turn["tokens"]) for turn in turns]
    assert turns[0]["computed_tokens"] in (asked[0], asked[0] - 1)
    assert turns[1]["computed_tokens"] < asked[1] - len(turns[0]["prompt_tokens"])
    first, second = (turn["prompt_tokens"] for turn in turns)
    assert second[: len(first)] == first
