"""`mavis ui` as a server, without a browser: its endpoint, its handlers, two visitors, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("gradio", reason="the page needs the extra ui: pip install 'mavis-logits[ui]'")

from chat_model import chat_model
from mavis_logits import ValueHead
from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.commands.ui import snippets
from mavis_logits.commands.ui.engine import Engines
from mavis_logits.commands.ui.page import MOST_OBJECTIVES, Page
from mavis_logits.commands.ui.session import Session
from mavis_logits.commands.ui.settings import Choice, Settings

SETTINGS = Settings({"humour": 1.0}, kl=6.0, temperature=0.7, max_new_tokens=12, seed=3)


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> list[Choice]:
    """A chat model, and two value heads for it: of two objectives and of one."""
    folder = tmp_path_factory.mktemp("page")
    model, tokenizer = chat_model()
    model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    for name, objectives in (("two", ["helpful", "humour"]), ("one", ["concise"])):
        torch.manual_seed(0)
        head = ValueHead.for_model(model, objectives, width=8, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
        torch.nn.init.normal_(head.out.weight)
        head.save_pretrained(folder / name)
    return [Choice(str(folder / "chat"), (str(folder / name),)) for name in ("two", "one")]


@pytest.fixture(scope="module")
def page(choices: list[Choice]) -> Iterator[Page]:
    engines = Engines()
    engines.get(choices[0])
    page = Page(engines, choices)
    page.launch("127.0.0.1", None)
    yield page
    page.blocks.close(verbose=False)


def visitor(name: str) -> Any:
    return SimpleNamespace(session_hash=name, headers={"origin": "http://page"})


def asked(page: Page, name: str, choice: Choice, *sliders: float, prompt: str = "w5 w6", **other: Any) -> Iterator[Any]:
    own = {"kl": 6.0, "temperature": 0.7, "length": 12, "seed": 3} | other
    rest = [0.0] * (MOST_OBJECTIVES - len(sliders))
    return page.answer(visitor(name), prompt, *own.values(), choice, Session(), *sliders, *rest)


def over_http(url: str, data: list[Any]) -> tuple[str, Any]:
    """What the page's endpoint says: the kind of its last event, and its content."""
    call = f"{url.rstrip('/')}/gradio_api/call/{snippets.API}"
    body = json.dumps({"data": data}).encode()
    with urllib.request.urlopen(urllib.request.Request(call, body, {"Content-Type": "application/json"})) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}") as reply:
        lines = reply.read().decode().strip().splitlines()
    return lines[-2].removeprefix("event: "), json.loads(lines[-1].removeprefix("data: "))


def test_the_endpoint_gives_the_answer_of_the_engine(page: Page, choices: list[Choice]) -> None:
    kind, content = over_http(page.url, snippets.request_data(choices[0], "w5 w6", SETTINGS))
    answer = page.engines.get(choices[0]).begin("w5 w6", SETTINGS)
    assert answer.join(60)
    assert kind == "complete"
    assert content[0]["text"] == answer.text
    assert content[0]["tokens"] == len(answer.ids)
    assert content[0]["kl"] == pytest.approx(answer.kl)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, " ", "There is no question yet"),
        (1, {"wit": 1.0}, "wit"),
        (2, 1000, "KL budget must be a number between 0 and 40, got 1000"),
        (3, 0, "temperature"),
        (6, "org/other", "this page offers"),
        (7, ["org/other"], "this page offers"),
    ],
)
def test_the_endpoint_tells_what_is_wrong(
    page: Page, choices: list[Choice], capfd: pytest.CaptureFixture[str], place: int, wrong: Any, message: str
) -> None:
    data = snippets.request_data(choices[0], "w5 w6", SETTINGS)
    data[place] = wrong
    kind, content = over_http(page.url, data)
    assert kind == "error"
    assert message.lower() in json.dumps(content).lower()
    assert "Traceback" not in capfd.readouterr().err


def test_an_answer_ends_with_plot_list_and_session(page: Page, choices: list[Choice]) -> None:
    *_, (told, unsteered, steered, plot, listed, session) = asked(page, "a", choices[0], 0.0, 1.0)
    assert 'class="status done"' in told
    assert "Unsteered" in unsteered
    assert steered.count('class="card"') == steered.count('class="token ') > 0
    assert "<svg" in plot
    assert len(listed.samples if hasattr(listed, "samples") else listed["samples"]) == len(session.entries) == 1
    assert page.running == {}
    shown = page.again(0, session)
    assert shown[:3] == [told, unsteered, steered]
    assert shown[4:9] == ["w5 w6", 6.0, 0.7, 12, 3]
    assert [each["value"] for each in shown[9:11]] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"kl": 99.0}, "KL budget"),
        ({"length": 2.5}, "length"),
        ({"prompt": ""}, "no question"),
        ({"seed": None}, "seed"),
    ],
)
def test_the_page_tells_what_is_wrong(page: Page, choices: list[Choice], other: dict, message: str) -> None:
    *_, last = asked(page, "a", choices[0], 0.0, 1.0, **other)
    assert 'class="status failed"' in last[0]
    assert message in last[0]
    assert page.running == {}


def test_two_visitors_get_their_own(page: Page, choices: list[Choice]) -> None:
    alone = {
        name: list(asked(page, name, choices[0], *weights, prompt=prompt))[-1]
        for name, weights, prompt in (("a", (0.0, 1.0), "w5"), ("b", (1.0, 0.0), "w7 w8"))
    }
    both = {"a": asked(page, "a", choices[0], 0.0, 1.0, prompt="w5"),
            "b": asked(page, "b", choices[0], 1.0, 0.0, prompt="w7 w8")}  # fmt: skip
    ends: dict[str, Any] = {}

    def visit(name: str) -> None:
        *_, ends[name] = both[name]

    threads = [threading.Thread(target=visit, args=(name,)) for name in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, end in ends.items():
        assert end[1:4] == alone[name][1:4]  # both texts and the plot
        assert [entry.prompt for entry in end[5].entries] == [alone[name][5].entries[0].prompt]
    assert ends["a"][2] != ends["b"][2]


def test_one_visitor_stops_and_the_other_goes_on(page: Page, choices: list[Choice], monkeypatch) -> None:
    from mavis_logits.commands.ui import engine as module

    step = module.Dice.__call__
    monkeypatch.setattr(module.Dice, "__call__", lambda *given: (time.sleep(0.03), step(*given))[1])
    stopped, other = (asked(page, name, choices[0], 0.0, 1.0, length=60) for name in ("a", "b"))
    for generator in (stopped, other):
        next(generator), next(generator)
    page.stop(visitor("a"), True)
    assert 'class="status stopped"' in list(stopped)[-1][0]
    assert 'class="status done"' in list(other)[-1][0]


def test_what_waits_for_its_turn_can_be_stopped(page: Page, choices: list[Choice]) -> None:
    page.stop(visitor("a"), False)  # nothing waits
    assert 'class="status done"' in list(asked(page, "a", choices[0], 0.0, 1.0))[-1][0]
    page.stop(visitor("a"), True)
    ((told, *_),) = asked(page, "a", choices[0], 0.0, 1.0)
    assert "Stopped before it began" in told
    assert 'class="status done"' in list(asked(page, "a", choices[0], 0.0, 1.0))[-1][0]


def test_the_code_is_for_the_address_that_the_visitor_has(page: Page, choices: list[Choice]) -> None:
    rest = [0.0] * MOST_OBJECTIVES
    program, command, call = page.code(visitor("a"), "w5", 6.0, 0.7, 12, 3, choices[0], 0.0, 1.0, *rest)
    assert (program, command) == (
        snippets.python(choices[0], "w5", SETTINGS),
        snippets.command(choices[0], "w5", SETTINGS),
    )
    assert "http://page/gradio_api/call/answer" in call
    assert set(page.code(visitor("a"), "w5", 99.0, 0.7, 12, 3, choices[0], *rest)) == {
        "# The KL budget must be a number between 0 and 40, got 99.0"
    }


def test_where_a_visitor_has_gone_nothing_is_written_on(page: Page, choices: list[Choice], monkeypatch) -> None:
    from mavis_logits.commands.ui import engine as module

    step = module.Dice.__call__
    monkeypatch.setattr(module.Dice, "__call__", lambda *given: (time.sleep(0.03), step(*given))[1])
    going = asked(page, "gone", choices[0], 0.0, 1.0, length=100)
    next(going), next(going)
    answers = list(page.running["gone"])
    going.close()  # what Gradio does when the connection ends
    assert page.running == {}
    for answer in answers:
        assert answer.join(10)
        assert len(answer.ids) < 100


def test_another_choice_is_loaded_and_one_that_is_not_offered_refused(page: Page, choices: list[Choice]) -> None:
    busy, ready = page.pick(choices[1].model, choices[1].values[0], choices[0])
    assert 'class="status busy"' in busy[0]
    assert 'class="status ready"' in ready[0]
    assert ready[1] == choices[1]
    sliders = ready[5 : 5 + MOST_OBJECTIVES]
    assert [each["label"] for each in sliders if each["visible"]] == ["concise"]
    *_, failed = page.pick("org/other", "", choices[0])
    assert 'class="status failed"' in failed[0]
    assert failed[1] == choices[0]
    *_, failed = page.pick(choices[0].model, "'", choices[0])
    assert 'class="status failed"' in failed[0]


def test_presets_set_one_slider_and_enough_of_a_budget(page: Page, choices: list[Choice]) -> None:
    assert page.preset("funnier", choices[0], 3.0)[:3] == [12.0, 0.0, 1.0]
    assert page.preset("funnier", choices[0], 20.0)[0] == 20.0
    assert page.preset("shorter", choices[1], 12.0)[:2] == [12.0, 1.0]


def test_too_many_objectives_are_told(page: Page, choices: list[Choice], monkeypatch) -> None:
    from mavis_logits.commands.ui import page as module

    monkeypatch.setattr(module, "MOST_OBJECTIVES", 1)
    with pytest.raises(ValueError, match="has 2 objectives"):
        Page(page.engines, choices)


def test_the_command_serves_tells_and_ends(choices: list[Choice], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["ui", "--model", choices[0].model, "--values", *choices[0].values, "--port", str(port)]
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); " \
           "from mavis_logits.cli import main; sys.exit(main(sys.argv[1:]))"  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=out, stderr=out, env=os.environ.copy())
        try:
            end = time.monotonic() + 300
            while "The page is at" not in log.read_text() and time.monotonic() < end and process.poll() is None:
                time.sleep(0.2)
            url = f"http://127.0.0.1:{port}/"
            assert url in log.read_text()
            assert "mavis" in urllib.request.urlopen(url).read().decode()
            assert over_http(url, snippets.request_data(choices[0], "w5 w6", SETTINGS))[0] == "complete"
            assert over_http(url, ["", {}, 0, 0, 0, 0, "x", []])[0] == "error"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()
    assert "closed" in log.read_text()


def test_a_model_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mavis_logits import cli

    assert cli.main(["ui", "--model", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert "nowhere" in said
    assert "Traceback" not in said


def test_a_value_function_that_is_not_there_is_told(choices: list[Choice], tmp_path: Path, capsys) -> None:
    from mavis_logits import cli

    assert cli.main(["ui", "--model", choices[0].model, "--values", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
