"""`mavis serve`: what it starts and prints; `mavis verify --url`: on servers that steer rightly, and wrongly."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mavis_logits.cli import main
from mavis_logits.commands import serve as module
from mavis_logits.commands.verify_server import verify_server
from mavis_logits.integrations.serving import ENVIRONMENT, Serving
from mavis_logits.values.value_head import ValueHead, ValueHeadConfig


@pytest.fixture
def head(tmp_path: Path) -> Path:
    ValueHead(ValueHeadConfig(8, 8, 97, 16, objectives=["kind", "short"])).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The commands that would have been run, with their environments."""
    runs: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(module, "_run", lambda command, environment: runs.append((command, environment)) or 0)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "version", lambda name: "1")
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    return runs


def test_the_server_is_started_with_the_plug_in_and_its_settings(
    head: Path, started: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "org/chat", "--values", str(head), "--weights", "kind=1", "--beta", "4", "--port", "8123"]
    assert main(["serve", *words, "--", "--max-model-len", "512"]) == 0
    ((command, environment),) = started
    assert command[:2] == [sys.executable, "-m"]
    assert command[command.index("serve") + 1] == "org/chat"
    assert command[command.index("--logits-processors") + 1] == "mavis_logits.integrations.vllm:MavisProcessor"
    assert command[-2:] == ["--max-model-len", "512"]
    serving = Serving.read(environment[ENVIRONMENT])
    assert serving.values == str(head)
    assert serving.defaults == {"weights": {"kind": 1.0}, "beta": 4.0}
    assert "PROMETHEUS_MULTIPROC_DIR" in environment
    assert not Path(environment["PROMETHEUS_MULTIPROC_DIR"]).exists()  # it goes when the server does


def test_builds_of_another_name_are_started_too(head: Path, started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise module.PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", none)
    main(["serve", "--values", str(head), "--model", "org/chat"])
    ((command, _),) = started
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "org/chat"]


def test_the_printed_command_asks_for_what_there_is(
    head: Path, started: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["serve", "--values", str(head), "--port", "8123"])
    shown = capsys.readouterr().out
    words = shlex.split(shown[shown.index("curl") :])
    assert words[1] == "http://localhost:8123/v1/chat/completions"
    body = json.loads(words[words.index("-d") + 1])
    assert body["vllm_xargs"] == {"mavis_weights": "kind=0.7,short=0.3"}
    assert body["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_mistakes_are_told_before_an_engine_starts(
    head: Path, started: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--values", str(head), "--weights", "kid=1"]) != 0
    assert "did you mean 'kind'" in capsys.readouterr().err
    assert not started


def test_without_vllm_it_says_what_to_install(
    head: Path, started: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert main(["serve", "--values", str(head)]) != 0
    assert "mavis-logits[vllm]" in capsys.readouterr().err


def test_the_server_is_asked_to_end_when_the_command_is() -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); time.sleep(60)"
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    assert module._run([sys.executable, "-c", code], dict(os.environ)) in (7, -signal.SIGTERM)
    assert time.monotonic() - started < 50


Reply = Callable[[str, dict[str, Any]], str | None]


@contextmanager
def server(reply: Reply) -> Iterator[str]:
    """A server of chat completions, by a function of prompt and extra arguments; None refuses."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "org/chat"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = reply(body["messages"][0]["content"], body.get("vllm_xargs") or {})
            if text is None:
                self._send(400, {"error": {"message": "unknown objective"}})
                return
            choice = {"message": {"content": text}, "logprobs": {"content": [{"logprob": -0.1 * len(text)}]}}
            self._send(200, {"choices": [choice]})

        def _send(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()


def right(prompt: str, asked: dict[str, Any]) -> str | None:
    weights = str(asked.get("mavis_weights", "kind=1"))
    if not weights.startswith("kind="):
        return None
    return f"{prompt} kindly" if asked and asked.get("mavis_beta") != 0 else prompt


def checks(reply: Reply) -> dict[str, bool]:
    with server(reply) as url:
        _, found = verify_server(f"{url}/v1", {"kind": 1.0}, None, tokens=4)
    return {check.name: check.passed for check in found}


def test_a_server_that_steers_passes() -> None:
    assert all(checks(right).values())


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda prompt, asked: None if right(prompt, asked) is None else prompt, "steering fires"),
        (lambda prompt, asked: right(prompt, asked and asked | {"mavis_beta": 1}), "strength 0 is the model itself"),
        (lambda prompt, asked: right(prompt, asked) or prompt, "bad requests are refused"),
    ],
)
def test_a_server_that_does_not_fails(wrong: Reply, name: str) -> None:
    found = checks(wrong)
    assert [check for check, passed in found.items() if not passed] == [name]


def test_neighbours_that_are_touched_are_noticed() -> None:
    seen: list[str] = []

    def wrong(prompt: str, asked: dict[str, Any]) -> str | None:
        if asked and "kind" not in str(asked.get("mavis_weights")):
            return None
        seen.append(prompt)
        return f"{prompt} {len(seen) if not asked and len(seen) > 3 else ''}{' kindly' if right('', asked) else ''}"

    assert not checks(wrong)["neighbours in a batch are untouched"]


def test_no_server_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--url", "http://127.0.0.1:9"]) != 0
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_the_command_prints_a_block(capsys: pytest.CaptureFixture[str]) -> None:
    with server(right) as url:
        assert main(["verify", "--url", url, "--weights", "kind=1", "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("```\nmavis verify: org/chat at http://127.0.0.1:")
    assert 'asked: {"mavis_weights": "kind=1"}' in shown
    with server(right) as url:
        assert main(["verify", "--url", url, "--weights", "kid=1"]) != 0
    assert "the server answers 400" in capsys.readouterr().err
