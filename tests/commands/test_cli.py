"""The command ``mavis``: what it lists, how it fails, and how it reads its arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from mavis_logits import cli
from mavis_logits.commands.generate import parse_values
from mavis_logits.commands.registry import OWN, Command, available
from mavis_logits.core.weights import parse_weights


def commands_with(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """Let there be commands that run the given functions only."""
    monkeypatch.setattr(cli, "available", lambda: {name: Loaded(name, f) for name, f in functions.items()})


class Loaded(Command):
    """A command that runs a function made in a test."""

    def __init__(self, name: str, function: object) -> None:
        super().__init__(name, "of a test", "tests:function")
        object.__setattr__(self, "made", function)

    def load(self) -> Any:
        return self.made  # type: ignore[attr-defined]


def test_every_command_is_there_and_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in OWN:
        assert callable(command.load())
        assert command.summary
    added = EntryPoint("later", "somewhere:run", "mavis.commands")
    monkeypatch.setattr("mavis_logits.commands.registry.entry_points", lambda group: [added])
    assert [*available()] == [*(command.name for command in OWN), "later"]
    assert available()["later"].function == "somewhere:run"


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from mavis_logits.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'mavis_training'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    for command in ("generate", "demo", "collect", "label", "evaluate", "card", "bundle", "push"):
        assert f"  {command} " in done.stdout


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_a_mistyped_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generat"]) == 2
    assert "did you mean 'generate'?" in capsys.readouterr().err
    assert cli.main(["xyz"]) == 2
    assert "known are generate" in capsys.readouterr().err


def test_arguments_after_the_command_reach_it_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    commands_with(monkeypatch, echo=lambda arguments: seen.append(arguments))
    assert cli.main(["echo", "--help", "-x", "y"]) == 0
    assert seen == [["--help", "-x", "y"]]


def test_a_missing_extra_is_named_with_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Command("collect", "", "no_such_package_at_all:main")
    monkeypatch.setattr(cli, "available", lambda: {"collect": absent})
    assert cli.main(["collect"]) == 2
    error = capsys.readouterr().err
    assert "needs the package no_such_package_at_all" in error
    assert 'pip install "mavis-logits[training]"' in error


@pytest.mark.parametrize("kind", [ValueError, OSError, ImportError])
def test_a_refusal_is_a_message_and_with_debug_a_traceback(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(arguments: list[str]) -> None:
        raise kind("give something else")

    commands_with(monkeypatch, refuse=refuse)
    assert cli.main(["refuse"]) == 2
    assert capsys.readouterr().err == "mavis refuse: give something else\n"
    with pytest.raises(kind):
        cli.main(["--debug", "refuse"])


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> None:
        raise TypeError("a bug")

    commands_with(monkeypatch, broken=broken)
    with pytest.raises(TypeError):
        cli.main(["broken"])


def test_weights_are_read() -> None:
    assert parse_weights("helpful=0.7, humour=-1e-1") == {"helpful": 0.7, "humour": -0.1}


@pytest.mark.parametrize("text", ["", "helpful", "helpful=", "=1", "helpful=much", "a=1,,b=2"])
def test_unreadable_weights_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected NAME=NUMBER"):
        parse_weights(text)


def test_a_weight_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' twice"):
        parse_weights("a=1,a=2")


def test_values_are_read() -> None:
    assert parse_values(["org/head"]) == ["org/head"]
    assert parse_values(["org/a", "./b"]) == ["org/a", "./b"]
    assert parse_values(["a=org/a", "b=./b"]) == {"a": "org/a", "b": "./b"}
    for mixed in (["a=org/a", "org/b"], ["=org/a"], ["a="]):
        with pytest.raises(ValueError, match="expected NAME=FOLDER_OR_ID"):
            parse_values(mixed)
    with pytest.raises(ValueError, match="'a' twice"):
        parse_values(["a=x", "a=y"])
