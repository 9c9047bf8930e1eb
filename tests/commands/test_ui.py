"""`mavis ui` without a browser: settings, snippets that run, answers in threads, what is shown, and bad input."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chat_model import chat_model
from mavis_logits import ValueHead, ValueModel, cli
from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.commands.ui import engine as engine_module
from mavis_logits.commands.ui import snippets
from mavis_logits.commands.ui.command import check_port, parser
from mavis_logits.commands.ui.engine import Answer, Engine, Engines
from mavis_logits.commands.ui.plot import picture
from mavis_logits.commands.ui.session import MOST, Entry, Session, coloured, plain, progress
from mavis_logits.commands.ui.settings import Choice, Settings, check_prompt, presets
from mavis_logits.core.chat import chat_inputs

SETTINGS = Settings({"helpful": 0.0, "humour": 1.0}, kl=6.0, temperature=0.7, max_new_tokens=12, seed=3)


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> Choice:
    """A chat model and a value head that says something, in folders."""
    folder = tmp_path_factory.mktemp("page")
    model, tokenizer = chat_model()
    torch.manual_seed(0)
    head = ValueHead.for_model(
        model, ["helpful", "humour"], width=8, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)
    )
    torch.nn.init.normal_(head.out.weight)
    model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    head.save_pretrained(folder / "head")
    return Choice(str(folder / "chat"), (str(folder / "head"),))


@pytest.fixture(scope="module")
def engine(choice: Choice) -> Engine:
    return Engines().get(choice)


def written(engine: Engine, settings: Settings = SETTINGS, steered: bool = True, prompt: str = "w5 w6") -> Answer:
    answer = engine.begin(prompt, settings, steered)
    assert answer.join(60)
    assert answer.error == ""
    return answer


# Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kl": -1}, "KL budget must be a number between 0 and 40, got -1"),
        ({"kl": float("nan")}, "KL budget"),
        ({"kl": None}, "KL budget"),
        ({"temperature": 0}, "temperature must be a number between 0.05 and 2"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_new_tokens": 513}, "length must be a whole number between 1 and 512"),
        ({"max_new_tokens": 2.5}, "length must be a whole number"),
        ({"seed": -1}, "seed"),
        ({"weights": {"humour": 7}}, "weight of humour must be a number between -1 and 1, got 7"),
    ],
)
def test_a_setting_out_of_range_is_told(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**(vars(SETTINGS) | wrong))


def test_what_steers() -> None:
    assert SETTINGS.steers
    assert SETTINGS.summary() == "humour +1 within 6 nats"
    for nothing in ({"kl": 0.0}, {"weights": {"humour": 0.0}}):
        settings = Settings(**(vars(SETTINGS) | nothing))
        assert not settings.steers
        assert settings.summary() == "unsteered"


def test_presets_are_those_that_there_are_objectives_for() -> None:
    assert presets(["helpful", "humour", "concise"]) == {"funnier": "humour", "shorter": "concise"}
    assert presets(["quality"]) == {}


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_no_question_is_told(prompt: str) -> None:
    with pytest.raises(ValueError, match="there is no question yet"):
        check_prompt(prompt)


def test_too_long_a_question_is_told(engine: Engine) -> None:
    with pytest.raises(ValueError, match="at most 4000"):
        check_prompt("w" * 4001)
    longest = engine.model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"but the model reads {longest} in all"):
        engine.begin("w5 " * (longest - 4), SETTINGS)


# Answers ---------------------------------------------------------------------------------------------------------


def test_an_unsteered_answer_has_the_tokens_of_generate(engine: Engine) -> None:
    answer = written(engine, steered=False)
    inputs = chat_inputs(engine.tokenizer, ["w5 w6"])
    torch.manual_seed(SETTINGS.seed)
    expected = engine.model.generate(
        **inputs, do_sample=True, temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=12,
        pad_token_id=engine.tokenizer.pad_token_id,
    )  # fmt: skip
    assert answer.ids == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer.kl == 0
    assert set(answer.values()) <= {"helpful", "humour"}


def test_nothing_steers_where_the_budget_or_all_weights_are_0(engine: Engine) -> None:
    plain_ids = written(engine, steered=False).ids
    for nothing in ({"kl": 0.0}, {"weights": {"helpful": 0.0, "humour": 0.0}}):
        assert written(engine, Settings(**(vars(SETTINGS) | nothing))).ids == plain_ids


def test_a_steered_answer_keeps_to_its_budget_and_differs(engine: Engine) -> None:
    answer = written(engine)
    assert answer.state == "done"
    assert 0 < answer.kl <= SETTINGS.kl + 1e-3
    assert answer.ids != written(engine, steered=False).ids
    assert set(answer.values()) == {"helpful", "humour"}
    less = written(engine, Settings(**(vars(SETTINGS) | {"weights": {"humour": -1.0}})))
    assert less.ids != answer.ids


def test_answers_at_once_are_what_they_are_alone(engine: Engine) -> None:
    kinds = [(1, 0, 6, 0, True), (0, 1, 12, 1, True), (-1, 1, 3, 2, True), (0, 1, 6, 4, False)]
    every = [(Settings({"helpful": a, "humour": b}, kl, 0.7, 12, seed), kind) for a, b, kl, seed, kind in kinds]
    alone = [written(engine, *one) for one in every]
    together = [engine.begin("w5 w6", *one) for one in every]
    for one, other in zip(alone, together, strict=True):
        assert other.join(60)
        assert (other.ids, other.values()) == (one.ids, one.values())
        assert other.kl == pytest.approx(one.kl)
    assert engine.mavis.stats.tokens == 0


class Slow:
    """Lets every step of a processor take some time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        step = engine_module.Dice.__call__

        def slow(dice: engine_module.Dice, *given: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds)
            return step(dice, *given)

        monkeypatch.setattr(engine_module.Dice, "__call__", slow)


def test_a_stopped_answer_ends_and_keeps_what_it_has(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    Slow(monkeypatch, 0.05)
    long = Settings(**(vars(SETTINGS) | {"max_new_tokens": 100}))
    answer = engine.begin("w5 w6", long)
    while len(answer.ids) < 3:
        answer.look()
    hooks = len(engine.model._forward_pre_hooks)
    answer.stop()
    assert answer.join(10)
    assert answer.state == "stopped"
    assert 3 <= len(answer.ids) < 100
    assert len(engine.model._forward_pre_hooks) < hooks  # nothing stays on the model
    assert "Stopped: " in progress(answer, answer)
    assert len(answer.written.tokens) == len(answer.ids)


def test_an_answer_that_nobody_looks_at_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    Slow(monkeypatch, 0.02)
    monkeypatch.setattr(engine_module, "PATIENCE", 0.2)
    answer = engine.begin("w5 w6", Settings(**(vars(SETTINGS) | {"max_new_tokens": 100})))
    answer._thread.join(20)
    assert answer.state == "stopped"
    assert len(answer.ids) < 100


def test_what_fails_in_the_thread_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise ValueError("the base model's scores hold NaN")

    monkeypatch.setattr(engine_module.Dice, "__call__", broken)
    answer = engine.begin("w5 w6", SETTINGS)
    assert answer.join(20)
    assert answer.state == "failed"
    assert "scores hold NaN" in progress(answer, answer)


def test_an_unknown_objective_leaves_nothing_on_the_model(engine: Engine) -> None:
    hooks = len(engine.model._forward_pre_hooks)
    with pytest.raises(ValueError, match="the objective 'wit'"):
        engine.begin("w5 w6", Settings(**(vars(SETTINGS) | {"weights": {"wit": 1.0}})))
    assert len(engine.model._forward_pre_hooks) == hooks


def test_models_are_loaded_once_and_the_oldest_goes(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = engine_module.load_chat_model

    def counted(name: str) -> object:
        loaded.append(name)
        return load(choice.model)

    monkeypatch.setattr(engine_module, "load_chat_model", counted)
    engines = Engines()
    first = engines.get(Choice("one", choice.values))
    assert engines.get(Choice("one", choice.values)) is first
    assert engines.get(Choice("one", choice.values, top_k=5)).model is first.model
    engines.get(Choice("two", choice.values))
    engines.get(Choice("three", choice.values))
    assert engines.get(Choice("one", choice.values)) is not first
    assert loaded == ["one", "two", "three", "one"]


def test_what_is_loaded_does_not_wait_for_what_is_being_loaded(choice: Choice, monkeypatch) -> None:
    engines = Engines()
    first = engines.get(choice)
    begun, go_on = threading.Event(), threading.Event()

    def slow(_: str) -> object:
        begun.set()
        assert go_on.wait(20)
        raise OSError("no such model")

    monkeypatch.setattr(engine_module, "load_chat_model", slow)
    told = []

    def load() -> None:
        with pytest.raises(OSError, match="no such model") as error:
            engines.get(Choice("other", choice.values))
        told.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    assert begun.wait(20)
    assert engines.get(choice) is first
    go_on.set()
    thread.join(20)
    assert len(told) == 1


@pytest.mark.parametrize("kind", ["value model", "words"])
def test_value_functions_of_every_kind_steer_the_page(choice: Choice, tmp_path: Path, kind: str) -> None:
    model, tokenizer = chat_model()
    small = ValueModel.from_backbone(
        model, ["short"], num_layers=1, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)
    )
    torch.nn.init.normal_(small.head.weight)
    small.save_pretrained(tmp_path / "small")
    own = Choice(choice.model, (str(tmp_path / "small"),)) if kind == "value model" else None
    own = own or Choice(choice.model, (), ("joke=w3 w4 w9",))
    engine = Engines().get(own)
    settings = Settings(dict.fromkeys(engine.objectives, 1.0), 6.0, 0.7, 8, 3)
    steered = written(engine, settings)
    assert 0 < steered.kl <= 6.001
    assert list(steered.values()) == engine.objectives
    inputs = chat_inputs(engine.tokenizer, ["w5 w6"])
    torch.manual_seed(3)
    expected = engine.model.generate(
        **inputs, do_sample=True, temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=8,
        pad_token_id=engine.tokenizer.pad_token_id,
    )  # fmt: skip
    assert written(engine, settings, steered=False).ids == expected[0, inputs["input_ids"].shape[1] :].tolist()


# What is shown ---------------------------------------------------------------------------------------------------


def test_colours_are_those_of_the_trace(engine: Engine) -> None:
    answer = written(engine)
    trace = answer._mavis.trace
    ratios = trace.log_ratios(torch.tensor([answer.ids]))[0].tolist()
    assert [token.log_ratio for token in answer.written.tokens] == pytest.approx(ratios, abs=1e-5)
    assert sum(token.kl for token in answer.written.tokens) == pytest.approx(answer._mavis.stats.kl, abs=1e-4)
    html = coloured(answer)
    assert html.count('class="token ') == len(answer.ids)
    assert html.count('class="token up"') == sum(ratio >= 0 for ratio in ratios)
    assert html.count('class="card"') == len(answer.ids)
    for name in engine.objectives:
        assert html.count(f"<th>{name}</th>") == len(answer.ids)
    strengths = [f"--t:{min(1, abs(ratio) / 3):.2f}" for ratio in ratios]
    assert [part.split(";")[0] for part in html.split('style="')[1:] if part.startswith("--t")] == strengths


def test_the_text_of_the_tokens_is_that_of_the_answer(engine: Engine) -> None:
    answer = written(engine)
    assert "".join(token.text for token in answer.written.tokens).split() == engine.tokenizer.decode(answer.ids).split()


def test_what_a_model_writes_does_not_act_on_the_page(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = written(engine)
    monkeypatch.setattr(Answer, "text", property(lambda _: "<script>alert(1)</script>"))
    assert "<script" not in plain(answer)
    answer.state, answer.error = "failed", "<img src=x>"
    assert "<img" not in progress(answer, answer)
    entry = an_entry(prompt="<script>alert(1)</script>", values={"<b>": 1.0})
    assert "<script" not in picture(Session([entry]))
    assert "<b>" not in picture(Session([entry]))


def an_entry(**other: object) -> Entry:
    given = {
        "choice": Choice("m"), "prompt": "w5", "settings": SETTINGS, "steered": "s", "unsteered": "u", "text": "t",
        "kl": 5.0, "values": {"humour": 1.0, "helpful": 0.2}, "unsteered_values": {"humour": -0.5}, "told": "Done",
    }  # fmt: skip
    return Entry(**(given | other))


def test_a_session_is_a_value() -> None:
    empty = Session()
    one = empty.with_entry(an_entry())
    assert (len(empty.entries), len(one.entries)) == (0, 1)
    many = empty
    for number in range(MOST + 3):
        many = many.with_entry(an_entry(kl=float(number)))
    assert len(many.entries) == MOST
    assert many.entries[-1].kl == MOST + 2
    assert one.entries[0].row() == ["w5", "humour +1 within 6 nats", "5.0", "t"]


def test_the_plot_has_an_end_for_every_known_value() -> None:
    session = Session([an_entry(), an_entry(kl=2.0, values={"humour": 0.3})])
    shown = picture(session)
    assert shown.count("<g class=") == 3
    assert shown.count('class="asked latest"') == 1
    assert "answer 1, humour: +1.00 from -0.50 unsteered, at 5.0 nats" in shown
    assert "answer 1, helpful: +0.20, at 5.0 nats" in shown
    assert "svg" not in picture(Session())


@given(st.lists(st.tuples(st.floats(0, 40), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=6))
def test_everything_plotted_lies_within_the_picture(rows) -> None:
    entries = [an_entry(kl=kl, values={"a": after}, unsteered_values={"a": before}) for kl, after, before in rows]
    shown = picture(Session(entries))
    for part in shown.split('cx="')[1:]:
        x, y = float(part.split('"')[0]), float(part.split('cy="')[1].split('"')[0])
        assert 0 <= x <= 460
        assert 0 <= y <= 260


# Snippets --------------------------------------------------------------------------------------------------------

PROMPTS = ["w5 w6", 'it\'s "w7" $HOME `w8` \\ w9', "-w5\nw6 {w7}"]
UNSTEERED = Settings({"humour": 0.0}, kl=4.0, temperature=0.9, max_new_tokens=7, seed=11)


@pytest.mark.parametrize("settings", [SETTINGS, UNSTEERED], ids=["steered", "unsteered"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_program_prints_the_answer(engine: Engine, choice: Choice, settings: Settings, prompt: str) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippets.python(choice, prompt, settings), "snippet", "exec"), {})
    assert out.getvalue().strip() == written(engine, settings, prompt=prompt).text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_command_prints_the_answer(engine: Engine, choice: Choice, prompt: str, capsys) -> None:
    words = shlex.split(snippets.command(choice, prompt, SETTINGS))
    assert words[0] == "mavis"
    assert cli.main(words[1:]) == 0
    assert capsys.readouterr().out.strip() == written(engine, SETTINGS, prompt=prompt).text


def test_the_command_of_nothing_prints_the_unsteered_answer(engine: Engine, choice: Choice, capsys) -> None:
    assert cli.main(shlex.split(snippets.command(choice, "w5 w6", UNSTEERED))[1:]) == 0
    assert capsys.readouterr().out.splitlines()[0].strip() == written(engine, UNSTEERED).text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_curl_sends_the_settings(choice: Choice, prompt: str) -> None:
    script = snippets.curl("http://127.0.0.1:7860/", choice, prompt, SETTINGS)
    asking = script.split("$(", 1)[1].rsplit(" | cut", 1)[0]
    words = shlex.split(asking)
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:7860/gradio_api/call/answer"]
    sent = json.loads(words[words.index("-d") + 1])
    assert sent == {"data": [prompt, {"humour": 1.0}, 6.0, 0.7, 12, 3, choice.model, list(choice.values)]}


def test_programs_of_every_kind_of_choice_compile() -> None:
    for own in (
        Choice("smollm2"),
        Choice("smollm2", ("a", "b"), top_k=7),
        Choice("smollm2", ("kind=org/value-kind",)),
        Choice("org/chat", (), ("joke=Answer with a joke.",)),
        Choice("org/chat", ("a",), ('joke=Say it\'s "fun".',)),
    ):
        text = snippets.python(own, "w5", SETTINGS)
        compile(text, "snippet", "exec")
        assert ("top_k=7" in text) == (own.top_k == 7)
        assert ("objectives=" in text) == bool(own.words)
        shlex.split(snippets.command(own, "w5", SETTINGS))


# Bad input on the terminal ---------------------------------------------------------------------------------------


def test_a_port_in_use_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["ui", "--port", str(port), "--model", "no/such-model"]) == 2
        said = capsys.readouterr().err
        assert f"port {port} of 127.0.0.1 cannot be used" in said
        assert "--port" in said
        assert "Traceback" not in said
    check_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "between 1 and 65535"),
        (["--temperature", "0"], "temperature must be a number between"),
        (["--max-new-tokens", "0"], "length must be a whole number"),
        (["--visitors", "0"], "--visitors must be at least 1"),
        (["--values", "a=b", "c"], "expected NAME=FOLDER_OR_ID"),
        (["--host", "no.such.host.invalid", "--port", "7999"], "cannot be used"),
    ],
)
def test_what_is_out_of_range_is_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ui", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_gradio_it_is_told_what_to_install(capsys, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    monkeypatch.delitem(__import__("sys").modules, "mavis_logits.commands.ui.page", raising=False)
    assert cli.main(["ui"]) == 2
    assert 'pip install "mavis-logits[ui]"' in capsys.readouterr().err


def test_help_names_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    text = parser().format_help()
    assert "Escape stops" in text
    assert "Exit status" in text


def test_a_budget_beside_a_strength_is_refused(choice: Choice, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "--prompt", "w5", "--model", choice.model, "--values", *choice.values]
    for words, message in (
        (["--kl", "4", "--beta", "2"], "--beta and --kl were both given"),
        (["--kl", "0"], "--kl must be a number of nats above 0"),
        (["--kl", "nan"], "--kl must be"),
        (["--kl", "4", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    ):
        assert cli.main([*common, *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*common, "--kl", "4", "--max-new-tokens", "5"]) == 0
    assert "at most 4 nats" in capsys.readouterr().err


def test_no_file_of_the_page_is_missing() -> None:
    folder = Path(engine_module.__file__).parent
    assert {"page.css", "page.js"} <= {path.name for path in folder.iterdir()}
