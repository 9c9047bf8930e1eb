"""Policy iteration: which settings arrive where, when it stops, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chat_model import chat_model
from iterating import TREES, make, write_inputs
from mavis_training import iterate as module
from mavis_training.collect import CollectConfig, collect
from mavis_training.iterate import IterationConfig, TargetKl, iterate, why_stop
from mavis_training.measure.schedule import Measurement
from mavis_training.trees.tree_store import TreeStore


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("files"))


@pytest.fixture
def asked(monkeypatch):
    """The configs that collecting, labelling and training were asked for, in order, in a run that goes on."""
    seen: list[Any] = []
    for name in ("collect", "label", "train_head", "train_model"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda config, *a, f=function, **k: seen.append(config) or f(config, *a, **k))
    return seen


def test_overrides_arrive_where_they_belong(files, tmp_path, asked):
    trees = {"max_new_tokens": 6, "layers": 2}
    config = make(
        files,
        tmp_path / "run",
        collect=TREES | {"limit": 12},
        zeta=0.3,
        beta=2.0,
        seed=5,
        iterations=[
            IterationConfig(policy={"normalize": "none"}),
            IterationConfig(beta=4.0, collect=trees | {"limit": 16}, skip_prompts=12, mix=3, train={"epochs": 1}),
            IterationConfig(zeta=0.1, skip_prompts=28, train={"initial": None, "learning_rate": 0.02}, mix=1),
        ],
    )
    iterate(config)
    collected = [c for c in asked if isinstance(c, CollectConfig)]
    assert [(c.limit, c.max_new_tokens, c.root_children, c.seed) for c in collected] == [
        (12, 8, 2, 5), (16, 6, 2, 6), (12, 8, 2, 7)
    ]  # fmt: skip
    assert collected[0].policy is None
    assert [c.policy.settings for c in collected[1:]] == [
        {"weights": {"low": 1.0}, "top_k": 12, "normalize": "none", "beta": 2.0},
        {"weights": {"low": 1.0}, "top_k": 12, "beta": 4.0},
    ]
    ids = [TreeStore.open(c.store).prompt_ids() for c in collected]
    assert ids == [{f"p{i}" for i in span} for span in (range(12), range(12, 28), range(28, 40))]
    trained = [c for c in asked if hasattr(c, "zeta")]
    assert [(c.zeta, c.epochs, c.learning_rate, c.iteration) for c in trained] == [
        (0.0, 8, 0.01, 0), (0.3, 1, 0.01, 1), (0.1, 8, 0.02, 2)
    ]  # fmt: skip
    folders = [str(tmp_path / "run" / f"iteration-{i}") for i in range(3)]
    assert [c.initial for c in trained] == [None, f"{folders[0]}/value", None]
    assert [c.store for c in trained] == [
        [f"{f}/trees" for f in stores] for stores in (folders[:1], folders[:2], folders[1:])
    ]
    assert trained[2].states == [f"{f}/states" for f in folders[1:]]


def test_the_papers_settings_after_iteration_0(files, tmp_path):
    """Section F.4, unless the run or the iteration says otherwise."""
    model = make(files, tmp_path, "model", collect={}, train={})
    shapes = [model.collect_config(i, "s", None) for i in range(2)]
    assert [(c.layers, c.root_children, c.children) for c in shapes] == [(5, 4, 2), (4, 2, 3)]
    rates = [model.train_config(i, ["s"], None, "o", None, 0.0) for i in range(2)]
    assert [(c.learning_rate, c.warmup_steps) for c in rates] == [(2e-5, 100), (4e-5, 0)]
    assert rates[1].backbone == model.model
    own = make(files, tmp_path, "model", collect={"layers": 3}, train={"warmup_steps": 7})
    assert own.collect_config(1, "s", None).layers == 3
    assert own.train_config(1, ["s"], None, "o", None, 0.0).warmup_steps == 7


def measured(*rewards: float) -> Measurement:
    return Measurement(np.array(rewards), np.ones(len(rewards)))


def test_when_to_stop(files, tmp_path):
    config = make(files, tmp_path, early_stop=True)
    a, better, worse = measured(1, 2, 3), measured(2, 3, 5), measured(1, 2, 2)
    assert why_stop([a], config) is None
    assert why_stop([a, better], config) is None
    assert why_stop([a, worse], config).startswith("iteration 1 is not better than iteration 0 (difference -0.333")
    patient = replace(config, patience=2)
    assert why_stop([a, worse], patient) is None
    assert why_stop([a, worse, better], patient) is None
    assert "iteration 3 is not better than iteration 1" in why_stop([a, better, worse, a], patient)
    assert why_stop([a, better], replace(config, tolerance=10.0)) is not None
    assert why_stop([a, worse], replace(config, early_stop=False)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "heads"}, "kind must be one of 'model', 'head'"),
        ({"iterations": []}, "iterations is empty"),
        ({"objectives": ["funny"]}, r"objectives are \['funny'\], rewards are given for \['low'\]"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"collect": {"layer": 3}}, r"iterations\[0\].collect has the unknown key 'layer': did you mean 'layers'"),
        ({"collect": {"layers": 0}}, r"iterations\[0\].collect: layers must be at least 1"),
        ({"collect": {"store": "x"}}, "collect has 'store', which the run sets itself"),
        ({"train": {"epoch": 3}}, r"iterations\[0\].train has the unknown key 'epoch': did you mean 'epochs'"),
        ({"train": {"epochs": "many"}}, r"iterations\[0\].train: .*epochs"),
        ({"train": {"zeta": 0.1}}, "train has 'zeta', which the run sets itself"),
        ({"policy": {"beta": 1.0}}, "policy has 'beta', which the run sets itself"),
        ({"policy": {"top": 1}}, "unknown setting 'top'; did you mean 'top_k'"),
        ({"policy": {"weights": {"funny": 1.0}}}, "weights name .*funny"),
        ({"kind": "model", "policy": {"top_k": None}, "train": {}}, "only value heads can"),
        ({"beta": -1.0}, "beta must be a finite number of at least 0"),
        ({"iterations": [IterationConfig(), IterationConfig(collect={"layers": -1})]}, r"iterations\[1\].collect"),
        ({"target_kl": TargetKl(3.0)}, r"target_kl finds beta and zeta, but iterations \[1, 2\] give their own"),
    ],
)
def test_bad_settings(files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(files, tmp_path, **changes)


def test_bad_files(files, tmp_path):
    with pytest.raises(ValueError, match="states: x are those of given trees"):
        IterationConfig(states="x")
    config = make(files, tmp_path / "run")
    same = replace(config.validation, prompts=config.prompts, limit=16)
    with pytest.raises(ValueError, match="16 prompts of iteration 0 are validation prompts too"):
        iterate(replace(config, validation=same))
    with pytest.raises(ValueError, match="has no prompts after the first 64"):
        iterate(replace(config, iterations=[IterationConfig(skip_prompts=64)]))
    with pytest.raises(ValueError, match="cannot be imported"):
        iterate(replace(config, rewards={"low": "text_rewards:nothing"}))
    assert not (tmp_path / "run" / "iteration-0").exists()  # a bad reward is found before anything is sampled
    with pytest.raises(FileNotFoundError, match="not a tree store"):
        iterate(make(files, tmp_path / "other", iterations=[IterationConfig(trees=str(tmp_path))]))
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        iterate(replace(config, reuse=str(tmp_path / "nothing")))


def test_trees_of_another_tokenizer_are_refused(files, tmp_path):
    base, tokenizer = chat_model()
    tokenizer.add_tokens(["w99"])
    sampling = CollectConfig(
        str(files / "prompts.jsonl"), str(tmp_path / "trees"), **TREES | {"limit": 2}, device="cpu"
    )
    collect(sampling, base, tokenizer)
    with pytest.raises(ValueError, match="use the same tokenizer"):
        iterate(make(files, tmp_path / "run", iterations=[IterationConfig(trees=str(tmp_path / "trees"))]))
