"""Dry runs: exact scaling, and calibrations on a tiny model against what the real run then does."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from collecting import config as collect_config
from collecting import write_inputs
from mavis_training import cli
from mavis_training.base.ranks import join
from mavis_training.collect import collect
from mavis_training.estimates.calibrate import Calibration, Counts, Sample, spread
from mavis_training.estimates.estimate import Estimate, dry_run, estimate, human_bytes, human_time, scale, table
from mavis_training.estimates.iteration import dry_run as dry_run_of_any
from mavis_training.iterate import IterateConfig, IterationConfig, TargetKl, ValidationConfig
from mavis_training.iteration.stages import StageLog
from mavis_training.label import LabelConfig, label
from mavis_training.train_head import TrainHeadConfig, train_head
from mavis_training.train_model import LoraSettings, TrainModelConfig
from mavis_training.trees.tree_store import TreeStore
from random_trees import random_tree

REWARDS = {"low": "text_rewards:low"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The base model, 40 prompts, and a labelled store of a tree for each."""
    folder = tmp_path_factory.mktemp("files")
    write_inputs(folder, 40)
    collect(collect_config(folder, "trees", prompts_per_shard=8))
    label(LabelConfig(str(folder / "trees"), REWARDS))
    return folder


def entries(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_scaling_is_exact():
    sample = Sample(amount=4, seconds=2.0, bytes=100.0, fixed_seconds=10.0, fixed_bytes=7.0)
    assert scale("x", "trees", 40, sample, tokens=50) == Estimate("x", 40, "trees", 30.0, 1007.0, 50)
    assert scale("x", "trees", 40, sample, tokens=50, repeat=3) == Estimate("x", 40, "trees", 70.0, 1007.0, 150)
    assert scale("x", "trees", 0, sample, tokens=50) == Estimate("x", 0, "trees", 0.0, 0.0, 0.0)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0, 1e3), st.floats(0, 1e9))
def test_scaling_is_linear(a, b, seconds, size):
    sample = Sample(3, seconds, size)
    one, two, both = (scale("x", "trees", amount, sample) for amount in (a, b, a + b))
    assert one.seconds + two.seconds == pytest.approx(both.seconds)
    assert one.bytes + two.bytes == pytest.approx(both.bytes)


def test_counts():
    tree = random_tree(0)
    counts = Counts.of([tree, tree])
    tokens, prompt = 2 * len(tree.tokens), 2 * len(tree.prompt_tokens)
    assert counts == Counts(2, 2 * len(tree.leaves()), tokens, tokens + prompt)
    assert counts.for_trees(1) == Counts.of([tree])
    assert counts + counts == counts.for_trees(4)


def test_a_sample_is_spread_over_all():
    assert spread(range(100), 5) == [0, 24, 49, 74, 99]
    assert spread([1, 2], 5) == [1, 2]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0 s"), (89, "89 s"), (720, "12 min"), (12_600, "3.5 h"), (363_000, "4.2 days")]
)
def test_times_are_readable(seconds, shown):
    assert human_time(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 B"), (12_300, "12 kB"), (3_400_000, "3.4 MB"), (1.2e9, "1.2 GB"), (5e12, "5000.0 GB")]
)
def test_sizes_are_readable(size, shown):
    assert human_bytes(size) == shown


def test_the_table_warns_of_a_full_disk():
    def shown(free):
        console = Console(width=100, file=io.StringIO())
        console.print(
            table([Estimate("collect", 10, "trees", 60, 2e6, 1234), Estimate("b", 1, "x", 600, 3e6)], "o", free)
        )
        return console.file.getvalue()

    assert re.search(r"collect\s*│\s*10 trees\s*│\s*1,234\s*│\s*60 s\s*│\s*2\.0 MB", shown(10**7))
    assert re.search(r"together\s*│.*│\s*11 min\s*│\s*5\.0 MB", shown(10**7))
    assert "make room" in shown(4_999_999)
    assert "make room" not in shown(5_000_000)


def test_collect(files, tmp_path, capsys):
    config = collect_config(files, "new", prompts_per_shard=8)
    config = dataclasses.replace(config, store=str(tmp_path / "new"))
    (step,) = dry_run(config)
    assert not (tmp_path / "new").exists()
    assert "40 trees" in capsys.readouterr().out
    real = collect(config)
    tokens = sum(len(tree.tokens) for tree in real)
    size = sum(shard.path.stat().st_size for shard in real.shards())
    assert step.amount == 40
    assert tokens / 2 < step.tokens < tokens * 2
    assert size / 2 < step.bytes < size * 2
    assert step.seconds > 0
    assert dry_run(config) == [Estimate("collect", 0, "trees", 0.0, 0.0)]
    rows = [{"id": f"q{i}", "prompt": "w1"} for i in range(3)]
    (files / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = dataclasses.replace(config, children=3, prompts=str(files / "more.jsonl"))
    with pytest.raises(ValueError, match="begun with sampling"):
        dry_run(other)


def test_label(files, tmp_path):
    before = entries(files / "trees")
    config = LabelConfig(str(files / "trees"), REWARDS | {"high": {"model": "text_rewards:high"}})
    done, todo = dry_run(config)
    assert done == Estimate("label low", 0, "completions", 0.0, 0.0)
    store = TreeStore.open(files / "trees")
    assert todo.amount == sum(len(tree.leaves()) for tree in store)
    assert todo.seconds > 0
    assert todo.bytes > 8 * todo.amount
    assert entries(files / "trees") == before
    with pytest.raises(ValueError, match="cannot be imported"):
        dry_run(LabelConfig(str(files / "trees"), {"funny": "text_rewards:nothing"}))


def test_train_head(files, tmp_path):
    config = TrainHeadConfig(
        str(files / "trees"), ["low"], str(tmp_path / "head"), str(files / "model"), width=16, epochs=4, batch_size=64,
        patience=9, warmup_steps=0, validation_share=0.2, device="cpu",
    )  # fmt: skip
    before = entries(files)
    states, train = dry_run(config)
    assert entries(files) == before
    assert not (tmp_path / "head").exists()
    trees = list(TreeStore.open(files / "trees"))
    assert states.tokens == pytest.approx(sum(len(t.tokens) + len(t.prompt_tokens) for t in trees))
    assert train.tokens == pytest.approx(4 * sum(len(t.tokens) for t in trees))
    assert train.amount == 160
    train_head(config)
    written = sum(path.stat().st_size for path in (tmp_path / "head" / "states").iterdir())
    assert written / 2 < states.bytes < written * 2
    own = sum(path.stat().st_size for path in (tmp_path / "head").iterdir() if path.is_file())
    assert own / 2 < train.bytes < own * 2
    assert dry_run(config)[0].tokens == 0  # the states are there now


def test_train_model(files, tmp_path):
    config = TrainModelConfig(
        str(files / "trees"), ["low"], str(tmp_path / "model"), backbone=str(files / "model"), num_layers=1,
        lora=LoraSettings(0), epochs=2.5, batch_size=4, warmup_steps=0, validation_share=0.2, device="cpu",
        trainer={"max_steps": 10**9},
    )  # fmt: skip
    (step,) = dry_run(config)
    assert not (tmp_path / "model").exists()
    tokens = sum(len(t.tokens) + len(t.prompt_tokens) for t in TreeStore.open(files / "trees"))
    assert step.tokens == pytest.approx(2.5 * tokens)
    assert step.bytes > 1000
    with pytest.raises(ValueError, match="no complete rewards for"):
        dry_run(dataclasses.replace(config, objectives=["high"]))


def test_iterate(files, tmp_path):
    rows = [{"id": f"v{i}", "prompt": f"w{i} w3"} for i in range(10)]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = IterateConfig(
        str(files / "prompts.jsonl"), str(tmp_path / "run"), ["low"], REWARDS,
        [IterationConfig(trees=str(files / "trees")), IterationConfig(mix=1), IterationConfig(collect={"limit": 20})],
        ValidationConfig(str(tmp_path / "validation.jsonl"), seeds=[0, 1], max_new_tokens=6),
        kind="head", model=str(files / "model"), policy={"top_k": 8},
        collect={"max_new_tokens": 8, "layers": 2}, train={"width": 8, "epochs": 2, "warmup_steps": 0}, device="cpu",
    )  # fmt: skip
    steps = dry_run_of_any(config)
    assert not (tmp_path / "run").exists()
    amounts = {step.what: step.amount for step in steps}
    assert list(amounts) == [
        "reference: validate",
        "iteration 0: label low", "iteration 0: hidden states", "iteration 0: train", "iteration 0: validate",
        "iteration 1: collect", "iteration 1: label low", "iteration 1: hidden states", "iteration 1: train",
        "iteration 1: validate",
        "iteration 2: collect", "iteration 2: label low", "iteration 2: hidden states", "iteration 2: train",
        "iteration 2: validate",
    ]  # fmt: skip
    assert amounts["reference: validate"] == amounts["iteration 2: validate"] == 20
    assert amounts["iteration 0: label low"] == 0
    assert (amounts["iteration 1: collect"], amounts["iteration 2: collect"]) == (40, 20)
    assert (amounts["iteration 1: train"], amounts["iteration 2: train"]) == (2 * 80, 2 * 20)
    log = StageLog(tmp_path / "run" / "iterate.json", join("cpu"))
    for stage in ("validation.json", "iteration-1/trees", "iteration-1/value"):
        log.run(stage, {}, [], dict)
    left = {step.what: step.amount for step in dry_run_of_any(config)}
    done = {what for what, amount in amounts.items() if amount and not left[what]}
    assert done == {
        "reference: validate", "iteration 1: collect", "iteration 1: hidden states", "iteration 1: train"
    }  # fmt: skip
    searched = dataclasses.replace(config, target_kl=TargetKl(1.0, [1.0, 2.0], [0.0, 0.1, 0.2]))
    assert {step.what: step.amount for step in dry_run_of_any(searched)}["iteration 1: validate"] == 20 * (2 + 3)


def test_no_dry_run_for_other_things(tmp_path):
    with pytest.raises(TypeError, match="no dry run for int"):
        estimate(3, Calibration(tmp_path))


def test_the_flag(files, tmp_path, capsys):
    argv = [f"--prompts={files / 'prompts.jsonl'}", f"--store={tmp_path / 'new'}", f"--model={files / 'model'}"]
    cli.collect([*argv, "--dry-run", "--max_new_tokens=4", "--layers=2", "--device=cpu"])
    assert "Dry run" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        cli.collect(["--help"])
    assert "--dry-run" in capsys.readouterr().out
