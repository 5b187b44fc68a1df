"""Errors become exit codes once; commands load when they run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable

import click
import pytest

from omnistore import errors
from omnistore.cli import main as cli
from omnistore.cli.main import exit_codes, main
from omnistore.errors import BadSignature, OmniError, RemoteProtocolError, StoreFull


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `omni fail` raise something."""

    def install(error: BaseException) -> None:
        @click.command()
        @click.option("--json", is_flag=True)
        def fail(json: bool) -> None:
            raise error

        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: fail)

    return install


def test_every_error_class_has_its_exit_code(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, OmniError)]
    assert len(classes) > 25
    documented = dict(exit_codes())
    for kind in classes:
        failing(kind("the culprit", remedy="what to do"))
        assert main(["fail"]) == kind.exit_code
        captured = capsys.readouterr()
        assert captured.err == "omni: the culprit\n  what to do\n"
        assert captured.out == ""
        if kind is not OmniError:
            assert kind.__name__ in documented[kind.exit_code]


def test_help_lists_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for code, meaning in exit_codes():
        assert f"\n  {code} " in text
        assert meaning.split(",")[0] in text


def test_an_error_in_json(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(StoreFull("no room", remedy="make some"))
    assert main(["fail", "--json"]) == StoreFull.exit_code
    assert json.loads(capsys.readouterr().out) == {
        "event": "error",
        "error": "StoreFull",
        "message": "no room",
        "remedy": "make some",
    }


def test_an_error_inside_groups_is_itself(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(ExceptionGroup("outer", [ExceptionGroup("inner", [BadSignature("forged")])]))
    assert main(["fail"]) == BadSignature.exit_code
    assert capsys.readouterr().err == "omni: forged\n"


def test_two_errors_in_a_group_are_both_told(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(ExceptionGroup("both", [RemoteProtocolError("first"), StoreFull("second")]))
    assert main(["fail"]) == RemoteProtocolError.exit_code
    assert capsys.readouterr().err == "omni: first\nomni: second\n"


def test_a_bug_is_called_one(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(ExceptionGroup("mixed", [StoreFull("full"), ZeroDivisionError("oops")]))
    assert main(["fail"]) == 1
    told = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in told
    assert "bug" in told
    assert "Traceback" not in told
    monkeypatch.setenv("OMNI_DEBUG", "1")
    assert main(["fail"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), BaseExceptionGroup("nursery", [KeyboardInterrupt()]), click.Abort()]
)
def test_an_interrupt_is_quiet(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    failing(error)
    assert main(["fail"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_command_may_choose_its_exit_code(failing: Callable[[BaseException], None]) -> None:
    failing(SystemExit(4))
    assert main(["fail"]) == 4


@pytest.mark.parametrize("args", [["nonsense"], ["ls", "--nonsense"], ["add"]])
def test_wrong_usage_is_an_input_error(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*args, "--json"]) == errors.InputError.exit_code
    captured = capsys.readouterr()
    assert captured.err.startswith("omni: ")
    assert json.loads(captured.out)["event"] == "error"


def test_our_own_commands_all_load() -> None:
    context = click.Context(cli.omni)
    for name in cli._OWN:
        command = cli.omni.get_command(context, name)
        assert command is not None, name
        assert command.name == name
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--quiet"} <= options, name
