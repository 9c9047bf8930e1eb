"""The demo: what it compares, how it computes means and errors, what it prints and draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from chat_model import chat_model
from mavis_logits import MavisLogitsProcessor, ValueHead
from mavis_training.demo import demo
from mavis_training.demo import report as report

OBJECTIVES = demo.OBJECTIVES["model"]


@pytest.fixture
def measured() -> list[demo.Measured]:
    """Two prompts, three seeds; the reward of an objective rises with its weight."""
    random = np.random.default_rng(0)
    result = []
    for setting in demo.weightings(OBJECTIVES, beta=5.0, top_k=15):
        rewards = {
            name: random.normal(size=(3, 2)) + 10 * setting.beta * setting.weights.get(name, 0.0) for name in OBJECTIVES
        }
        answers = [[f"[answer] of {setting.name}", "other"]] * 3
        result.append(demo.Measured(setting, answers, rewards, np.full((3, 2), setting.beta)))
    return result


def rendered(renderable: RenderableType, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_settings_isolate_each_effect() -> None:
    unsteered, cut, first, both, second = demo.weightings(("a", "b"), beta=3.0, top_k=7)
    assert not unsteered.weights
    assert cut.beta == 0.0
    assert "7" in cut.name
    assert [first.weights, both.weights, second.weights] == [
        {"a": 1.0, "b": 0.0},
        {"a": 0.5, "b": 0.5},
        {"a": 0.0, "b": 1.0},
    ]
    assert {first.beta, both.beta, second.beta} == {3.0}


@pytest.mark.parametrize("width", [200, 60])
def test_answers_are_shown_as_written_at_any_width(measured: list[demo.Measured], width: int) -> None:
    shown = rendered(report.side_by_side("Why [so]?", measured, 0, width), width)
    assert "Why [so]?" in shown
    assert shown.count("[answer]") == len(measured) - 1  # the cut without steering is in the table only


def test_the_table_has_every_setting_and_says_what_kl_is(measured: list[demo.Measured]) -> None:
    shown = rendered(report.table(measured, OBJECTIVES))
    for one in measured:
        assert one.setting.name in shown
    assert "2 prompts x 3 samples" in shown
    assert "KL says" in shown


def test_the_reading_names_the_gain_of_each_objective(measured: list[demo.Measured]) -> None:
    text = report.reading(measured, OBJECTIVES)
    for name in OBJECTIVES:
        assert f"all the weight on {name}" in text
    assert "+" in text


def test_the_figure_is_a_png(measured: list[demo.Measured], tmp_path: Path) -> None:
    report.draw(measured, OBJECTIVES, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_run_is_written_as_json(measured: list[demo.Measured], tmp_path: Path) -> None:
    report.write_results(tmp_path / "demo.json", ["a", "b"], measured, {"beta": 5.0, "out": "demo.png"})
    content = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert content["prompts"] == ["a", "b"]
    assert content["options"] == {"beta": 5.0}
    assert [one["name"] for one in content["settings"]] == [one.setting.name for one in measured]
    assert content["settings"][2]["rewards"]["helpful"]["mean"] == pytest.approx(measured[2].rewards["helpful"].mean())


def test_the_closing_shows_python(tmp_path: Path) -> None:
    shown = rendered(report.closing("demo.png", "folder", ("a", "b"), {"beta": 6.0, "normalize": "none"}))
    assert "MavisLogitsProcessor.from_pretrained" in shown
    assert "weights={'a': 0.5, 'b': 0.5}, beta=6.0, normalize='none', model=model)" in shown
    assert "demo.png" in shown


def test_progress_counts_up(measured: list[demo.Measured]) -> None:
    with report.progress(Console(quiet=True), total=3) as advance:
        advance("one", 1)


@pytest.mark.parametrize(("beta", "top_k"), [(4.0, 5), (0.0, 50)])
def test_measuring_answers_judges_and_sums_the_divergence(beta: float, top_k: int) -> None:
    model, tokenizer = chat_model()
    head = ValueHead.for_model(model, ["helpful"], width=8)
    mavis = MavisLogitsProcessor(head, beta=beta, top_k=top_k, model=model, trace=True)
    judges = {"helpful": lambda prompts, completions, **columns: [float(len(text)) for text in completions]}
    stage = demo.Stage(model, tokenizer, ["w5 w6", "w7"], judges, seeds=2, max_new_tokens=4, temperature=0.7)
    ticks: list[int] = []
    for processor in (None, mavis):
        one = demo.measure(stage, demo.Setting("x"), processor, lambda _, steps: ticks.append(steps))
        assert [len(texts) for texts in one.answers] == [2, 2]
        assert one.rewards["helpful"].tolist() == [[len(text) for text in texts] for texts in one.answers]
        moved = processor is not None and beta > 0
        assert np.all(one.kl > 0) if moved else np.allclose(one.kl, 0, atol=1e-5)
    assert sum(ticks) == 2 * stage.seeds * stage.max_new_tokens


def test_how_to_steer_depends_on_what_steers_unless_it_is_said() -> None:
    head, model = demo.read_options([]), demo.read_options(["--kind", "model", "--beta", "2"])
    assert (head.beta, head.top_k, head.normalize, head.objectives) == (5.6, 200, "standard", ("concise", "formal"))
    assert (model.beta, model.top_k, model.normalize, model.objectives) == (2.0, 15, "minmax", ("helpful", "humour"))


@pytest.mark.parametrize(
    "options",
    [["--objectives", "formal", "formal"], ["--objectives", "formal", "funny"],
     ["--kind", "model", "--objectives", "formal", "helpful"]],
)  # fmt: skip
def test_objectives_are_two_that_there_are_values_for(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.read_options(options)
    assert "--objectives must be two of helpful, harmless, humour" in capsys.readouterr().err


@pytest.mark.parametrize("objective", demo.REWARDS)
def test_every_objective_has_a_reward_in_the_repository(objective: str) -> None:
    path, colon, function = demo.reward_spec(objective).partition(":")
    assert Path(path).exists()
    assert bool(colon) == bool(function)


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--seeds", "0"], ["--kind", "other"], ["--top-k", "x"]):
        with pytest.raises(SystemExit):
            demo.main(options)
    assert "invalid" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head", "model"])
def test_the_whole_demo_runs(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--kind",
        kind,
        "--limit",
        "4",
        "--seeds",
        "1",
        "--max-new-tokens",
        "8",
        "--out",
        str(tmp_path / "d.png"),
    ]
    assert demo.main(options) == 0
    assert (tmp_path / "d.png").is_file()
    assert "Mean reward" in capsys.readouterr().out
