"""``mavis generate`` from the command line to the answer, on a tiny random model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chat_model import chat_model
from mavis_logits import MavisConfig, ValueHead, ValueModel, cli
from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.hub.make_bundle import make_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chat model, a value head with two objectives and a value model with one."""
    model, tokenizer = chat_model()
    fingerprint = tokenizer_fingerprint(tokenizer)
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    head = ValueHead.for_model(model, ["helpful", "humour"], width=8, tokenizer_fingerprint=fingerprint)
    head.save_pretrained(tmp_path / "head")
    small = ValueModel.from_backbone(model, ["short"], num_layers=1, tokenizer_fingerprint=fingerprint)
    small.save_pretrained(tmp_path / "small")
    return tmp_path


def generate(folder: Path, *options: str) -> int:
    common = ["--model", str(folder / "chat"), "--prompt", "w5 w6", "--max-new-tokens", "6"]
    return cli.main(["generate", *common, *options])


def test_it_answers_steered_and_unsteered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--values", str(folder / "head"), "--weights", "helpful=0.7,humour=0.3", "--beta", "2", "--unsteered"]
    assert generate(folder, *options) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert "steered: helpful 0.7, humour 0.3, beta 2" in shown.err
    assert "nats from the unsteered model" in shown.err


def test_one_seed_gives_one_answer_and_beta_0_over_everything_gives_the_models_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--values", str(folder / "head"), "--beta", "0", "--top-k", "50", "--unsteered", "--seed", "3"]
    assert generate(folder, *options) == 0
    unsteered, steered = capsys.readouterr().out.splitlines()
    assert unsteered == steered


def test_value_functions_mix_under_names_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--values", f"helpful={folder / 'head'}", f"brief={folder / 'small'}"]
    assert generate(folder, *values, "--weights", "brief=1") == 0
    assert "steered: helpful 0, brief 1" in capsys.readouterr().err


def test_what_the_value_functions_recommend_is_the_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = ValueHead.from_pretrained(folder / "head")
    head.config.settings = {"beta": 3.5, "top_k": 50, "normalize": "none", "temperature": 0.4}
    head.save_pretrained(folder / "head")
    assert generate(folder, "--values", str(folder / "head")) == 0
    recommended = capsys.readouterr()
    assert "beta 3.5" in recommended.err
    assert generate(folder, "--values", str(folder / "head"), "--temperature", "0.4", "--beta", "3.5") == 0
    assert capsys.readouterr().out == recommended.out
    assert generate(folder, "--values", str(folder / "head"), "--beta", "2") == 0
    assert "beta 2" in capsys.readouterr().err


def test_objectives_in_words_need_no_value_function(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(folder, "--words", "joke=w7 w8", "kind=w9") == 0
    assert "steered: joke 0.5, kind 0.5, beta 1.5" in capsys.readouterr().err
    assert generate(folder, "--words", "joke=w7 w8", "--values", str(folder / "head"), "--weights", "joke=1") == 0
    assert "steered: helpful 0, humour 0, joke 1" in capsys.readouterr().err


def test_a_page_shows_what_the_answer_was_chosen_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "page.html"
    assert generate(folder, "--values", str(folder / "head"), "--top-k", "4", "--trace", str(path)) == 0
    shown = capsys.readouterr()
    assert f"what each token was chosen from: {path}" in shown.err
    page = path.read_text(encoding="utf-8")
    assert "Objectives: helpful, humour." in page
    assert page.count('class="card"') == int(re.findall(r"--- (\d+) tokens", shown.err)[0])
    for word in shown.out.split():
        assert word in page


def test_a_bundle_brings_its_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [str(folder / "head"), str(folder / "small")]
    make_bundle(folder / "bundle", values, MavisConfig(weights={"short": 1.0}, beta=2.5))
    assert generate(folder, "--values", str(folder / "bundle")) == 0
    assert "steered: helpful 0, humour 0, short 1, beta 2.5" in capsys.readouterr().err
    assert generate(folder, "--values", str(folder / "bundle"), "--weights", "humour=1", "--beta", "3") == 0
    assert "steered: helpful 0, humour 1, short 0, beta 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "no/such/folder/page.html"], "--trace got no/such/folder/page.html; expected"),
        (["--trace", "."], "a file in a folder that exists"),
        (["--weights", "helpfull=1"], "did you mean 'helpful'"),
        (["--weights", "helpful=nan"], "finite"),
        (["--top-k", "0"], "top_k must be"),
        (["--beta", "-1"], "beta must be"),
        (["--prompt", " "], "is empty"),
    ],
)
def test_bad_input_is_a_message(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(folder, "--values", str(folder / "head"), *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_values_of_another_tokenizer_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = chat_model()
    other = ValueModel.from_backbone(model, ["a"], num_layers=1, tokenizer_fingerprint="another")
    other.save_pretrained(folder / "other")
    assert generate(folder, "--values", str(folder / "other")) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_missing_values_and_models_are_a_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(folder, "--values", str(folder / "nothing")) == 2
    assert cli.main(["generate", "--prompt", "w5", "--model", str(folder / "nothing")]) == 2
    assert capsys.readouterr().err.count("nothing") >= 2
