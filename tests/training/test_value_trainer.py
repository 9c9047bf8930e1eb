from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mavis_logits.backbone import Backbone
from mavis_logits.values.value_model import ValueModel
from mavis_training.fitting.batches import TrainingSet
from mavis_training.fitting.trainer_arguments import training_arguments
from mavis_training.fitting.value_trainer import TRAINABLE_WEIGHTS, Validation, ValueTrainer, value_loss
from mavis_training.train_model import LoraSettings, TrainModelConfig, lora_config, train_model
from mavis_training.trees.packing import packed_inputs, term_inputs
from mavis_training.trees.targets import kept_nodes
from random_trees import make_store, random_tree
from test_batches import labelled
from tiny_models import tiny_llama

TREES = [labelled(seed) for seed in range(6)]


def make_trainer(tmp_path, tokens_per_batch=None, rank=0, **changes):
    """A trainer of a tiny value model by plain SGD, so that its weights tell what gradients it had."""
    settings = {
        "learning_rate": 0.1, "warmup_steps": 0, "optimizer": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0,
        "device": "cpu", "lora": LoraSettings(rank, dropout=0.0), "epochs": 1, "drop_leaves": 0.5,
    } | changes  # fmt: skip
    config = TrainModelConfig("store", ["a", "b"], str(tmp_path / "out"), **settings)
    backbone = tiny_llama()
    lora = lora_config(config.lora, backbone)
    model = ValueModel.from_backbone(backbone, ["a", "b"], lora=lora, reward_scale=[0.7, 1.9])
    torch.manual_seed(3)
    torch.nn.init.normal_(model.head.weight)
    kept = [kept_nodes(item.tree, config.drop_leaves, 0) for item in TREES]
    every_token = config.targets == "tokens"
    return ValueTrainer(
        model,
        training_arguments(config),
        TrainingSet(TREES, kept, config.packing, every_token),
        Validation(TREES, kept, every_token),
        config.packing,
        tokens_per_batch,
    )


def trained(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], **({"rtol": 1e-3, "atol": 1e-5} | tolerance))


def test_a_step_is_one_average_whatever_its_batches_and_packing(tmp_path):
    whole = make_trainer(tmp_path / "whole", batch_size=len(TREES))
    start = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    wanted = trained(whole)
    assert whole.state.global_step == 1
    assert any((start[name] - weight).abs().max() > 1e-3 for name, weight in wanted.items())
    assert_same(wanted, trained(make_trainer(tmp_path / "parts", batch_size=4, gradient_accumulation=2)))
    budget = make_trainer(tmp_path / "budget", tokens_per_batch=100, gradient_accumulation=len(TREES))
    assert_same(wanted, trained(budget))
    nodes = make_trainer(tmp_path / "nodes", packing="nodes", batch_size=16, gradient_accumulation=100)
    assert_same(wanted, trained(nodes))
    assert nodes.state.global_step == budget.state.global_step == 1
    assert nodes.state.num_input_tokens_seen > 2 * budget.state.num_input_tokens_seen


@pytest.mark.parametrize(("packing", "size"), [("trees", 1), ("nodes", 2)])
def test_batches_are_of_similar_length_and_come_in_random_order(tmp_path, packing, size):
    trainer = make_trainer(tmp_path, packing=packing, batch_size=size, drop_leaves=0.0)
    dealt = [batch["attention_mask"].shape[-1] for batch in trainer.get_train_dataloader()]
    lengths = sorted(trainer.train_dataset.lengths)
    assert sorted(dealt) == [max(lengths[i : i + size]) for i in range(0, len(lengths), size)]
    assert dealt not in (sorted(dealt), sorted(dealt, reverse=True))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # its newest name differs
@pytest.mark.parametrize("rank", [0, 4])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, rank):
    plain = trained(make_trainer(tmp_path / "plain", rank=rank, batch_size=3))
    arguments = {"gradient_checkpointing": True}
    checkpointed = make_trainer(tmp_path / "checkpointed", rank=rank, batch_size=3, trainer=arguments)
    assert_same(plain, trained(checkpointed))
    assert checkpointed.model.backbone.layers[0].gradient_checkpointing


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("packing", ["trees", "nodes"])
def test_validation_loss_is_that_of_training(tmp_path, packing, every_token):
    targets = "tokens" if every_token else "nodes"
    trainer = make_trainer(tmp_path, packing=packing, targets=targets, batch_size=4)
    found = trainer.evaluate()
    sequences = TrainingSet(TREES, trainer.validation.kept, "trees", every_token)
    examples = [sequences[i] for i in range(len(TREES))]
    model = trainer.model.eval()
    inputs = packed_inputs(examples, Backbone.of(model.backbone).windows, torch.float32)
    with torch.inference_mode():
        wanted = value_loss(model(**inputs).values, term_inputs(examples), torch.tensor([0.7, 1.9])).item()
    assert found["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    assert found["eval_a/by_depth/1/r2"] == pytest.approx(trainer.metrics["a"]["by_depth"]["1"]["r2"])
    assert found["eval_b/by_fraction/0.5/within"] == pytest.approx(trainer.metrics["b"]["by_fraction"]["0.5"]["within"])
    assert not any(name.endswith(("nodes", "pairs")) for name in found)


def test_validation_may_leave_leaves_out(tmp_path):
    trainer = make_trainer(tmp_path)
    inner = [kept_nodes(item.tree, 1.0, 0) for item in TREES]
    values = [
        np.vstack([np.zeros((len(item.tree.prompt_tokens), 2)), np.zeros((len(item.tree.tokens), 2))]) for item in TREES
    ]
    scale = np.array([1.0, 1.0])
    without = Validation(TREES, inner, False).loss(values, scale)
    wanted = np.concatenate(
        [np.vstack([item.root_target, item.targets[kept]]) for item, kept in zip(TREES, inner, strict=True)]
    )
    assert without == pytest.approx((wanted**2).mean())
    assert without != pytest.approx(trainer.validation.loss(values, scale))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, rank=4)
    save_file({"head.weight": torch.zeros(2, 16)}, tmp_path / TRAINABLE_WEIGHTS)
    with pytest.raises(ValueError, match="is of another model"):
        trainer._load_from_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_chekpointing": True}, "did you mean 'gradient_checkpointing'"),
        ({"learning_rate": 1.0}, "use the setting 'learning_rate' beside trainer"),
        ({"optim": "adamw_torch"}, "use the setting 'optimizer'"),
        ({"remove_unused_columns": True}, "leave it out"),
    ],
)
def test_arguments_that_trainer_has_not_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainModelConfig("store", ["a"], "out", trainer=arguments)


@pytest.fixture
def config(tmp_path):
    """A labelled store, and how to train on it."""
    rewards = {"a": lambda tree: np.random.default_rng(tree.columns["rank"]).normal(size=len(tree.leaves()))}
    store = make_store(tmp_path / "trees", [random_tree(seed) for seed in range(24)], rewards)
    return TrainModelConfig(
        str(store.folder), ["a"], str(tmp_path / "value"), backbone=str(tmp_path / "backbone"),
        lora=LoraSettings(0), learning_rate=0.01, warmup_steps=0, tokens_per_batch=200, device="cpu",
        validation_share=0.3, validation_leaves=False,
    )  # fmt: skip


def test_loggers_get_metrics_by_depth_and_fraction(config):
    train_model(dataclasses.replace(config, trainer={"report_to": "tensorboard"}), tiny_llama())
    events = b"".join(path.read_bytes() for path in Path(config.output, "runs").rglob("events.out.tfevents.*"))
    assert b"eval/a/by_depth/1/r2" in events
    assert b"eval/a/by_fraction/0.5/correlation" in events
    assert not Path(config.output, "checkpoints").exists()
    metrics = json.loads(Path(config.output, "metrics.json").read_text())
    assert sorted(metrics["a"]["by_depth"]) == ["0", "1", "2", "3"]
    assert metrics["training_tokens"] > 0
    assert metrics["steps"] >= 2


LAUNCHED = """
import sys
from transformers import AutoModel
from mavis_training.cli import read_config
from mavis_training.train_model import TrainModelConfig, train_model
train_model(read_config(TrainModelConfig, sys.argv[1:], "train-model"), AutoModel.from_pretrained(sys.argv[-1]))
"""


@pytest.mark.slow
def test_two_processes_train_one_model(config, tmp_path):
    """Half the steps each with two trees' batches: the same average per step as one process accumulating two."""
    tiny_llama().model.save_pretrained(config.backbone)
    script = tmp_path / "train.py"
    script.write_text(LAUNCHED.replace("sys.argv[1:]", "sys.argv[1:-1]"))
    recipe = {k: v for k, v in dataclasses.asdict(config).items() if v is not None} | {"optimizer": "sgd"}
    steps = {}
    for processes, accumulation in ((2, 1), (1, 2)):
        folder = tmp_path / f"by-{processes}"
        own = recipe | {"output": str(folder), "gradient_accumulation": accumulation}
        path = tmp_path / f"by-{processes}.json"
        path.write_text(json.dumps(own))
        several = ["--multi_gpu" if processes > 1 else "--cpu"]  # accelerate's word for several processes, CPU or not
        launch = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        root = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": f"{root / 'src'}:{root / 'training'}", "OMP_NUM_THREADS": "1"}
        arguments = [str(script), "--config", str(path), config.backbone]
        subprocess.run([*launch, *arguments], check=True, env=environment, timeout=600)
        steps[processes] = json.loads((folder / "metrics.json").read_text())["steps"]
    assert steps[1] == steps[2]
    tokens = torch.arange(3, 12)[None]
    with torch.inference_mode():
        one, two = (ValueModel.from_pretrained(tmp_path / f"by-{n}")(tokens).values for n in (1, 2))
    torch.testing.assert_close(one, two, rtol=0.05, atol=0.02)
