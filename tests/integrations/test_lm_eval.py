"""A steered model in lm-eval, where that is installed: likelihoods of choices and generated answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from chat_model import save_chat_and_head
from mavis_logits.decoding.likelihoods import steered_log_probs
from mavis_logits.integrations import lm_eval as ours

CHOICES = [("w1 w2 w3", " w4"), ("w1 w2 w3", " w5 w6"), ("w7", " w8")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model and a head of it."""
    folder = tmp_path_factory.mktemp("lm_eval")
    save_chat_and_head(folder)
    return folder


def steered(place: Path, **given: Any) -> ours.SteeredLM:
    settings = {"values": str(place / "head"), "beta": 6.0, "top_k": 8, "unscored": "expected", "normalize": "none"}
    return ours.SteeredLM(pretrained=str(place / "chat"), batch_size=2, device="cpu", **{**settings, **given})


def likelihoods(model: ours.SteeredLM) -> list[float]:
    requests = [Instance("loglikelihood", {}, choice, n) for n, choice in enumerate(CHOICES)]
    return [float(total) for total, _ in model.loglikelihood(requests, disable_tqdm=True)]


def test_likelihoods_of_choices_are_those_of_the_steered_policy(place: Path) -> None:
    model = steered(place, weights="ones=1")
    found = likelihoods(model)
    for (context, choice), total in zip(CHOICES, found, strict=True):
        before = model.tok_encode(context)
        ids = model.tok_encode(context + choice)
        log_probs = steered_log_probs(model.strategy, torch.tensor([ids]))[0]
        own = sum(float(log_probs[place - 1, ids[place]]) for place in range(len(before), len(ids)))
        assert total == pytest.approx(own, abs=1e-4)
    assert found != pytest.approx(likelihoods(steered(place, weights={"twos": 1.0})), abs=1e-2)
    plain = [x for x, _ in ours.HFLM(pretrained=str(place / "chat"), device="cpu").loglikelihood(
        [Instance("loglikelihood", {}, choice, n) for n, choice in enumerate(CHOICES)], disable_tqdm=True)]  # fmt: skip
    assert likelihoods(steered(place, beta=0.0)) == pytest.approx(plain, abs=1e-4)
    assert found != pytest.approx(plain, abs=1e-2)


def test_generated_answers_are_steered(place: Path) -> None:
    model = steered(place)
    request = Instance("generate_until", {}, ("w1 w2", {"until": ["w3"], "max_gen_toks": 6}), 0)
    assert isinstance(model.generate_until([request], disable_tqdm=True)[0], str)
    assert 1 <= model.strategy.stats.tokens <= 6


def test_bad_arguments_are_named(place: Path) -> None:
    with pytest.raises(ValueError, match="unknown argument 'betta' of SteeredLM; did you mean 'beta'"):
        steered(place, betta=3.0)
    with pytest.raises(ValueError, match="did you mean 'ones'"):
        steered(place, weights="onse=1")
    with pytest.raises(ValueError, match="no probability to tokens beyond the top 8"):
        likelihoods(steered(place, unscored="drop"))


def test_the_command_line_is_that_of_lm_eval(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "w1 w2", "gold": 0}\n{"question": "w3", "gold": 1}\n')
    (tmp_path / "own.yaml").write_text(f"""
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: ["w4", "w5"]
metric_list: [{{metric: acc}}]
""")
    given = {"pretrained": str(place / "chat"), "values": str(place / "head"), "beta": 4, "unscored": "keep"}
    task = ["lm_eval", "--tasks", "own", "--include_path", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*task, "--model_args", json.dumps(given)])
    ours.main()
    assert "|own" in capsys.readouterr().out
