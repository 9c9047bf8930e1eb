"""`mavis chat`: what a line does, on a tiny model."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from chat_model import chat_model
from mavis_logits import MavisLogitsProcessor, cli
from mavis_logits.commands import chat as module
from mavis_logits.commands.chat import COMMANDS, Chat, run
from mavis_logits.values.value_head import ValueHead


def chat(width: int = 400, **settings) -> tuple[Chat, io.StringIO]:
    model, tokenizer = chat_model()
    torch.manual_seed(0)
    head = ValueHead.for_model(model, ["a", "b"], width=16)
    torch.nn.init.normal_(head.out.weight)
    mavis = MavisLogitsProcessor(head, model=model, tokenizer=tokenizer, trace=True, beta=3.0)
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, soft_wrap=True)
    return Chat(model, tokenizer, mavis, console, **({"max_new_tokens": 8} | settings)), out


def test_a_conversation_is_kept_and_begun_anew() -> None:
    talk, out = chat(system="w9")
    run(talk, ["w3 w4", "w5", "/new", "w6", "/quit", "w7"])
    assert [turn["role"] for turn in talk.turns] == ["system", "user", "assistant"]
    assert talk.turns[1]["content"] == "w6"
    assert out.getvalue().count("nats]") == 3
    assert "w7" not in talk.turns[1]["content"]


def test_an_answer_is_that_of_generate() -> None:
    talk, _ = chat(seed=5)
    talk.take("w3 w4")
    other, _ = chat(seed=5)
    encoded = other.tokenizer.apply_chat_template(
        [{"role": "user", "content": "w3 w4"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(5)
    expected = other.model.generate(
        **encoded, do_sample=True, top_k=0, max_new_tokens=8, logits_processor=[other.mavis],
        pad_token_id=other.tokenizer.pad_token_id,
    )[0, encoded["input_ids"].shape[1] :]  # fmt: skip
    assert talk.last.tolist() == expected.tolist()


def test_weights_strength_and_temperature_take_effect() -> None:
    talk, out = chat()
    run(talk, ["/weights a=0.7,b=0.3", "/beta 2.5", "/temperature 0.5"])
    assert talk.mavis.weights.tolist() == pytest.approx([0.7, 0.3])
    assert float(talk.mavis.beta) == 2.5
    assert talk.temperature == 0.5
    assert "a 0.7, b 0.3" in out.getvalue()
    talk.take("/kl 2")
    assert talk.mavis.config.kl_budget == pytest.approx(2 / 8)
    talk.take("w3")
    assert 0 < talk.mavis.stats.kl <= 2.001
    talk.take("/beta 0")
    assert talk.mavis.config.kl_budget is None


def test_why_tells_the_ratios_and_compare_answers_unsteered() -> None:
    talk, out = chat()
    run(talk, ["/why", "/compare"])
    assert out.getvalue().count("There is no answer yet") == 2
    talk.take("w3 w4")
    kept = list(talk.turns)
    run(talk, ["/why", "/compare"])
    shown = out.getvalue()
    assert "most of all" in shown
    assert "[unsteered, the same seed]" in shown
    assert talk.turns == kept
    assert talk.seed == 1


def test_with_no_strength_compare_says_the_same() -> None:
    talk, out = chat()
    talk.mavis.config = module.replace(talk.mavis.config, top_k=None)
    run(talk, ["/beta 0", "w3 w4", "/compare"])
    first, rest = out.getvalue().split("[", 1)
    assert rest.split("]\n", 1)[1].split("[")[0].strip() == first.strip()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/weights a=much", "expected NAME=NUMBER"),
        ("/weights c=1", "c"),
        ("/beta", "expected a number of at least 0"),
        ("/beta -1", "expected a number of at least 0"),
        ("/kl nan", "expected a number"),
        ("/temperature 0", "expected a number above 0"),
        ("/wieghts a=1", "There is no /wieghts"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_changes(line, message) -> None:
    talk, out = chat()
    before = talk.mavis.config, talk.mavis.weights.tolist(), float(talk.mavis.beta)
    assert talk.take(line)
    assert message in out.getvalue()
    assert (talk.mavis.config, talk.mavis.weights.tolist(), float(talk.mavis.beta)) == before
    assert talk.turns == []


def test_ctrl_c_stops_the_answer_only(monkeypatch) -> None:
    talk, out = chat(max_new_tokens=20)
    calls = 0
    step = type(talk.mavis).__call__

    def interrupted(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(type(talk.mavis), "__call__", interrupted)
    talk.take("w3 w4")
    assert "stopped" in out.getvalue()
    assert len(talk.last) == 3
    assert talk.turns[-1]["role"] == "assistant"
    talk.take("w5")  # and it goes on
    assert len(talk.turns) == 4


def test_help_lists_every_command_and_each_is_known() -> None:
    talk, out = chat()
    talk.take("/help")
    for name in COMMANDS:
        assert name in out.getvalue()
    for name in COMMANDS:
        word = name.split()[0]
        if word != "/quit":
            talk.take(word)
    assert "There is no /" not in out.getvalue()


def test_a_model_without_turns_is_refused() -> None:
    model, tokenizer = chat_model()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Chat(model, tokenizer, None, Console(file=io.StringIO()))


def test_the_command_reads_lines_and_ends_with_them(tmp_path, monkeypatch, capsys) -> None:
    talk, _ = chat()
    model, tokenizer = chat_model()
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    talk.mavis.functions.all[0].save_pretrained(tmp_path / "head")
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w4\n/weights a=1\nw5\n"))
    words = ["chat", "--model", str(tmp_path / "chat"), "--values", str(tmp_path / "head"), "--max-new-tokens", "6"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("nats]") == 2
    assert "a 1" in shown


def test_choices_find_the_weights() -> None:
    talk, out = chat(max_new_tokens=6)
    talk.take("/find a b")
    assert "There is no question yet" in out.getvalue()
    run(talk, ["w3 w4", "/find a"])
    assert "/find takes two or more" in out.getvalue()
    before, turns = talk.mavis.weights.tolist(), list(talk.turns)
    talk.take("/find a b")
    assert talk.mavis.weights.tolist() == before
    assert talk.turns == turns
    finding = talk.finding
    assert finding.rewards.shape == (6, 2)
    assert torch.isfinite(finding.rewards).all()
    for _ in range(10):  # somebody who wants nothing but a
        if talk.finding is None:
            break
        first, second = (float(finding.rewards[which, 0]) for which in finding.pair)
        talk.take("a" if first >= second else "b")
    assert talk.finding is None
    assert "weights now: a " in out.getvalue()
    assert talk.mavis.weights[0] > 0.6
    run(talk, ["/find", "/stop"])
    assert out.getvalue().count("weights now") == 2
    run(talk, ["/find a b", "w5"])  # to say something else is to leave off
    assert talk.finding is None
    assert talk.turns[-2]["content"] == "w5"
