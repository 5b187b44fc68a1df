"""What `omni run` and `omni chat` do. stdout gets the model's words and nothing else."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import trio

from omninfer.chat import ChatTemplate
from omninfer.cli.opening import Asked, OpenModel, open_model, report, summary
from omninfer.coordinator import Coordinator
from omninfer.generation import Generation, new_generation
from omninfer.tokenizer import MAX_TEXT
from omnistore.cli.output import Output
from omnistore.errors import InputError


def run(output: Output, options: Mapping[str, Any]) -> None:
    """`omni run`."""
    _speak_unicode()
    prompt = _prompt(options["prompt"], options["prompt_file"])
    trio.run(_run, output, Asked.of(options), prompt)


def chat(output: Output, options: Mapping[str, Any]) -> None:
    """`omni chat`."""
    _speak_unicode()
    trio.run(_chat, output, Asked.of(options), options["system"])


def _speak_unicode() -> None:
    """A terminal that lacks a letter must not end a generation."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _prompt(text: str | None, path: str | None) -> str:
    if (text is None) == (path is None):
        raise InputError("give the prompt once, as --prompt TEXT, --prompt - (stdin) or --prompt-file PATH")
    try:
        # One character more than a tokenizer takes, so that it can say no; the file may be /dev/zero.
        if path is not None:
            with Path(path).open(encoding="utf-8") as file:
                return file.read(MAX_TEXT + 1)
        return sys.stdin.read(MAX_TEXT + 1) if text == "-" else str(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompt can not be read: {error}") from None


def _shower(output: Output) -> Callable[[str, int], None]:
    """Where the model's words go as they come."""

    def show(text: str, token: int) -> None:
        if output.json:
            output.event("text", text=text, token=token)
        else:
            click.echo(text, nl=False)

    return show


@asynccontextmanager
async def _interruptible() -> AsyncIterator[trio.CancelScope]:
    """Ctrl-C cancels the block, cleanly, instead of raising wherever the program happens to be."""
    async with trio.open_nursery() as nursery:

        async def watch(task_status: Any) -> None:
            with trio.open_signal_receiver(signal.SIGINT) as signals:
                task_status.started()
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        await nursery.start(watch)
        yield nursery.cancel_scope
        nursery.cancel_scope.cancel()


async def _run(output: Output, asked: Asked, prompt: str) -> None:
    interrupted = True
    async with _interruptible(), open_model(output, asked) as opened:
        ids = opened.tokenizer.encode(prompt, add_special=True, parse_special=False)
        async with opened.coordinator(len(ids)) as coordinator:
            generation = new_generation(ids)
            try:
                await coordinator.ready()
                await opened.write(coordinator, ids, _shower(output), generation)
                interrupted = False
            except trio.Cancelled:
                _finish(output, coordinator, generation)
                raise
            _finish(output, coordinator, generation)
    if interrupted:
        raise KeyboardInterrupt


def _finish(output: Output, coordinator: Coordinator, generation: Generation) -> None:
    """The last words on a generation, whole or cut short."""
    if not output.json and generation.text and sys.stdout.isatty():
        click.echo()
    output.note(summary(coordinator, generation))
    output.result({"event": "done", **report(coordinator, generation)})


# --- chat -----------------------------------------------------------------------------------


class _Dialogue:
    """The messages so far and what turns them into a prompt."""

    def __init__(self, opened: OpenModel, system: str | None) -> None:
        self._tokenizer = opened.tokenizer
        self._template = ChatTemplate.from_metadata_untrusted(opened.about.metadata)
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        if self._template.is_fallback:
            opened.output.note("the model has no chat template: this is a guess at what it expects")

    def say(self, text: str) -> None:
        self._turns.append({"role": "user", "content": text})

    def withdraw(self) -> None:
        """Forget what was said last: it can not be answered."""
        self._turns.pop()

    def answered(self, text: str) -> None:
        self._turns.append({"role": "assistant", "content": text})

    def prompt(self, room: int) -> list[int]:
        """The tokens of the conversation; its oldest turns are forgotten until they fit into `room`."""
        while True:
            text = self._template.render([*self._system, *self._turns], now=datetime.now())
            bos = self._template.bos_token
            ids = self._tokenizer.encode(
                text, add_special=not (bos and text.startswith(bos)), parse_special=True
            )
            if len(ids) <= room or len(self._turns) < 3:
                return ids
            del self._turns[:2]


async def _chat(output: Output, asked: Asked, system: str | None) -> None:
    async with open_model(output, asked) as opened:
        dialogue = _Dialogue(opened, system)
        async with opened.coordinator(0) as coordinator:
            await coordinator.ready()
            async for line in _lines():
                dialogue.say(line)
                try:
                    answer = await _turn(output, opened, coordinator, dialogue)
                except InputError as error:
                    # A person types another line; a program that sent a bad one wants to know.
                    if not sys.stdin.isatty():
                        raise
                    dialogue.withdraw()
                    output.note(error.diagnosis())
                else:
                    dialogue.answered(answer.text)


async def _turn(
    output: Output, opened: OpenModel, coordinator: Coordinator, dialogue: _Dialogue
) -> Generation:
    """One answer, or as much of it as there was when Ctrl-C came."""
    params = opened.asked.params
    ids = dialogue.prompt(coordinator.context - min(params.max_tokens, coordinator.context // 2))
    generation = new_generation(ids)
    async with _interruptible():
        await opened.write(coordinator, ids, _shower(output), generation)
    if not output.json:
        click.echo()
    output.note(summary(coordinator, generation))
    output.result({"event": "message", "role": "assistant", **report(coordinator, generation)})
    return generation


@contextmanager
def _terminal() -> Iterator[Callable[[], str | None]]:
    """How to ask for a line; None at the end. Leaves the terminal as it was, whatever readline did to it."""
    if not sys.stdin.isatty():
        yield lambda: sys.stdin.readline() or None
        return
    import readline  # noqa: F401  gives input() history and editing
    import termios

    def ask() -> str | None:
        try:
            return input("> ")
        except EOFError:
            return None

    before = termios.tcgetattr(sys.stdin)
    try:
        yield ask
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


async def _lines() -> AsyncIterator[str]:
    """What a person types, or the lines of a pipe, until /exit or the end."""
    with _terminal() as ask:
        while True:
            line = None
            async with _interruptible():
                # The stubs that come with libp2p are older than trio.
                line = await trio.to_thread.run_sync(ask, abandon_on_cancel=True)  # type: ignore[call-arg]
            if line is None or line.strip() == "/exit":
                return
            if line.strip():
                yield line.strip()
