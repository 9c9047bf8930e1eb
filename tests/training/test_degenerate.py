"""Trainings that cannot work are refused or say so: divergence, updates lost to rounding, too long a warmup."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mavis_training.fitting.soundness import fitting_warmup, require_finite
from mavis_training.train_head import TrainHeadConfig, train_head
from mavis_training.train_model import LoraSettings, TrainModelConfig, train_model
from random_trees import make_store, random_tree, share_of_low
from tiny_models import tiny_llama


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    return str(make_store(folder, [random_tree(i) for i in range(24)], {"low": share_of_low}).folder)


@pytest.fixture
def model(store, tmp_path):
    return TrainModelConfig(
        store, ["low"], str(tmp_path / "value"), lora=LoraSettings(0), learning_rate=0.01, warmup_steps=0, epochs=2,
        batch_size=4, validation_share=0.25, device="cpu",
    )  # fmt: skip


@pytest.fixture
def head(store, tmp_path):
    return TrainHeadConfig(
        store, ["low"], str(tmp_path / "head"), width=8, epochs=2, bootstrap=0.0, validation_share=0.25, batch_size=32,
        device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize(
    "trainer", [{}, {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}]
)
def test_a_value_model_that_diverges_is_not_saved(model, trainer):
    diverging = dataclasses.replace(model, learning_rate=1e18, trainer=trainer)
    with pytest.raises(ValueError, match="diverged and nothing of it was saved"):
        train_model(diverging, tiny_llama())
    assert not list(Path(model.output).glob("*.safetensors"))
    assert not Path(model.output, "metrics.json").exists()
    train_model(model, tiny_llama())  # the advice, in the same folder
    require_finite(json.loads(Path(model.output, "metrics.json").read_text()), "saved")


@pytest.mark.parametrize("bootstrap", [0.0, 0.5])
def test_a_head_that_diverges_is_not_saved(head, bootstrap):
    diverging = dataclasses.replace(head, learning_rate=1e18, warmup_steps=0, bootstrap=bootstrap, epochs=3)
    with pytest.raises(ValueError, match="diverged and nothing of it was saved"):
        train_head(diverging, tiny_llama())
    assert not list(Path(head.output).glob("*.safetensors"))
    train_head(head, tiny_llama())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_are_not_trained_as_they_are(model, dtype):
    with pytest.raises(ValueError, match="set dtype: float32 and bf16: true"):
        train_model(dataclasses.replace(model, dtype=dtype), tiny_llama().to(getattr(torch, dtype)))
    advised = dataclasses.replace(model, dtype="float32", bf16=True, epochs=1)
    trained = train_model(advised, tiny_llama())
    assert {p.dtype for p in trained.parameters()} == {torch.float32}


def test_an_adapter_and_its_head_are_float32_on_a_backbone_of_16_bits(model):
    config = dataclasses.replace(model, dtype="bfloat16", bf16=True, lora=LoraSettings(2, dropout=0.0), epochs=1)
    trained = train_model(config, tiny_llama().to(torch.bfloat16))
    assert {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(("wanted", "steps", "fitting"), [(100, 200, 100), (100, 199, 19), (100, 7, 0), (0, 1, 0)])
def test_a_warmup_fits_into_the_run(wanted, steps, fitting, capsys):
    assert fitting_warmup(wanted, steps, "run") == fitting
    assert ("too many for a run of" in capsys.readouterr().out) == (wanted != fitting)


def test_small_runs_record_the_warmup_that_they_took(model, head):
    trained = train_model(dataclasses.replace(model, warmup_steps=100), tiny_llama())
    steps = json.loads(Path(model.output, "metrics.json").read_text())["steps"]
    assert trained.config.recipe["warmup_steps"] == steps // 10
    recorded = json.loads(Path(model.output, "train_config.json").read_text())
    assert recorded["warmup_steps"] == steps // 10
    assert train_head(dataclasses.replace(head, warmup_steps=100), tiny_llama()).config.recipe["warmup_steps"] < 100
