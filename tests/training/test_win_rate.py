"""A judge behind OpenAI's chat API: what it is asked, how its replies count, and what it is not asked again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_model import chat_model
from judging import longer, served
from mavis_training.evaluate import EvaluateConfig, evaluate
from mavis_training.measure.win_rate import Judge, JudgeSettings, score
from mavis_training.pareto.config import ParetoConfig
from mavis_training.pareto.run import pareto

pytest.importorskip("openai")
ROWS = [{"id": str(i), "prompt": f"question {i}"} for i in range(6)]


def judge(url: str, **changes) -> Judge:
    return Judge(JudgeSettings("umpire", url, **changes))


def test_the_better_answers_share_is_what_it_is(tmp_path) -> None:
    own, plain = ["longer"] * 3 + ["x"] * 2 + ["same"], ["short"] * 3 + ["yy"] * 2 + ["ties"]
    with served(longer) as (url, asked):
        judge(url).require_there()
        found = judge(url).win_rate(tmp_path / "v.json", ROWS, own, plain, 6)
    assert found["rate"] == pytest.approx(3.5 / 6)
    assert found["error"] > 0
    assert (found["pairs"], found["first"], found["unclear"]) == (6, 0.5, 0.0)
    assert len(asked) == 12
    assert all("It is more helpful" in text for text in asked)


def test_one_who_likes_the_first_best_prefers_none(tmp_path) -> None:
    with served(lambda *_: "A") as (url, _):
        found = judge(url).win_rate(tmp_path / "v.json", ROWS, ["a"] * 6, ["b"] * 6, 6)
    assert (found["rate"], found["first"]) == (0.5, 1.0)


def test_nothing_is_asked_twice_and_another_judge_is(tmp_path) -> None:
    path, answers = tmp_path / "v.json", (ROWS * 2, ["aa"] * 12, ["b"] * 12, 6)
    with served(longer) as (url, asked):
        first = judge(url).win_rate(path, *answers)
        assert judge(url).win_rate(path, *answers) == first
        assert len(asked) == 24
        judge(url, criterion="It rhymes.").win_rate(path, *answers)
        assert len(asked) == 48


def test_one_that_stops_answering_goes_on_later(tmp_path, monkeypatch) -> None:
    path, answers = tmp_path / "v.json", (ROWS, ["aa"] * 6, ["b"] * 6, 6)
    with served(longer) as (url, asked):
        stopping = judge(url, at_once=1)
        reply = stopping._reply
        monkeypatch.setattr(stopping, "_reply", lambda text: reply(text) if len(asked) < 5 else stop(stopping))
        with pytest.raises(OSError, match="does not answer"):
            stopping.win_rate(path, *answers)
        assert len(json.loads(path.read_text())["replies"]) == 4
        assert judge(url, at_once=1).win_rate(path, *answers)["rate"] == 1.0
        assert len(asked) == 5 + 8


def stop(judge: Judge) -> str:
    raise judge._failed("gone")


def test_what_names_none_or_both_is_a_tie_and_told(tmp_path) -> None:
    says = iter(["A", "B", "A or B", "Hm.", "A", "B", "tie", "tie"])
    with served(lambda *_: next(says)) as (url, _):
        found = judge(url, at_once=1, pairs=4).win_rate(tmp_path / "v.json", ROWS, ["a"] * 6, ["b"] * 6, 6)
    assert found["rate"] == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)
    assert (found["unclear"], found["pairs"]) == (0.25, 4)
    with served(lambda *_: "As a judge, I decline.") as (url, _), pytest.raises(ValueError, match="never said A, B"):
        judge(url).win_rate(tmp_path / "other.json", ROWS, ["a"] * 6, ["b"] * 6, 6)


@given(st.sampled_from("AB"), st.text("ab .,!\n", max_size=6), st.text("ab .,!\n", max_size=6))
def test_a_letter_is_read_wherever_it_stands_alone(letter, before, after) -> None:
    assert score(f"{before} {letter} {after}") == {"A": 1.0, "B": 0.0}[letter]
    assert score(f"{before} A {after} B") is None
    assert score(f"{before} Tie {after}") == 0.5
    assert score(before) is None


def test_one_that_is_not_there_is_told_before_anything_is_written(tmp_path) -> None:
    given = config(tmp_path, judge=JudgeSettings("umpire", "http://127.0.0.1:9/v1"))
    with pytest.raises(OSError, match=r"the judge at http://127.0.0.1:9/v1/ does not answer .* or leave judge out"):
        evaluate(given, chat_model())
    assert not (tmp_path / "cells").exists()
    with served(longer) as (url, _), pytest.raises(ValueError, match=r"serves umpire, not referee: set judge\.model"):
        evaluate(config(tmp_path, judge=JudgeSettings("referee", url)), chat_model())
    for wrong, message in (({"model": ""}, "needs a model"), ({"pairs": 1}, "pairs must be at least 2")):
        with pytest.raises(ValueError, match=message):
            JudgeSettings(**{"model": "umpire"} | wrong)


def config(place: Path, **changes) -> EvaluateConfig:
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "reward.py").write_text("def longer(prompts, completions):\n    return [len(c) for c in completions]\n")
    given = {
        "rewards": {"long": f"{place / 'reward.py'}:longer"}, "seeds": [0, 1], "max_new_tokens": 6,
        "settings": {"unsteered": {}, "cool": {"temperature": 0.5}},
    }  # fmt: skip
    places = [str(place / name) for name in ("prompts.jsonl", "out.json", "cells")]
    return EvaluateConfig(*places, **given | changes)


def test_evaluate_says_how_often_each_setting_is_preferred(tmp_path) -> None:
    with served(longer) as (url, asked):
        given = config(tmp_path, judge=JudgeSettings("umpire", url))
        results = evaluate(given, chat_model())
        count = len(asked)
        assert evaluate(given, chat_model())["settings"] == results["settings"]
    assert len(asked) == count == 2 * 12
    files = (tmp_path / "cells" / f"{name}.json" for name in ("cool", "unsteered"))
    own, plain = (json.loads(file.read_text())["texts"] for file in files)
    won = [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(own, plain, strict=True)]
    assert results["settings"]["cool"]["win_rate"]["rate"] == pytest.approx(sum(won) / 12)
    assert "win_rate" not in results["settings"]["unsteered"]
    table = (tmp_path / "out.md").read_text()
    assert "| preferred |" in table
    assert "by umpire, asked in both orders" in table


def test_pareto_asks_about_the_answers_that_count(tmp_path) -> None:
    """Of the best of n, the best."""
    rows = [{"id": str(i), "prompt": f"w{i} w{i + 1}"} for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text(
        "def long(prompts, completions):\n    return [len(c) for c in completions]\n"
        "def short(prompts, completions):\n    return [-len(c) for c in completions]\n"
    )
    with served(longer) as (url, _):
        given = ParetoConfig(
            str(tmp_path / "p.jsonl"), str(tmp_path / "out.json"), str(tmp_path / "cells"),
            {name: f"{tmp_path / 'r.py'}:{name}" for name in ("long", "short")}, {"best": {"samples": 4}}, steps=1,
            seeds=[0], max_new_tokens=6, resamples=20, judge=JudgeSettings("umpire", url),
        )  # fmt: skip
        results = pareto(given, chat_model())
    rates = {cell["weights"]["long"]: cell["win_rate"]["rate"] for cell in results["cells"].values()}
    assert rates[1.0] > 0.6 > 0.4 > rates[0.0]
    assert "| preferred |" in (tmp_path / "out.md").read_text()
    assert results["config"]["judge"]["model"] == "umpire"
