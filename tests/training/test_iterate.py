"""Policy iteration on a tiny model: whole runs and interrupted ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from collecting import assert_alike
from iterating import SHARED, TRAINING, TREES, make, write_inputs
from mavis_logits import ValueHead, ValueModel
from mavis_training import iterate as module
from mavis_training import train_head
from mavis_training.iterate import IterationConfig, TargetKl, iterate
from mavis_training.measure import validation
from mavis_training.trees.tree_store import Shard, TreeStore
from test_ranks import finish, launch


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("files"))


def final_state(output: Path) -> dict[str, Any]:
    """All that a run found, without how long it took: results, every tree and reward, every weight."""
    results = json.loads((output / "iterations.json").read_text())
    state: dict[str, Any] = {"reference": results["reference"], "best": results["best"], "stopped": results["stopped"]}
    for i, row in enumerate(results["iterations"]):
        for place in ("seconds", "store", "value_function", "reused"):
            row.pop(place)
        state[f"row {i}"] = row
        folder = output / f"iteration-{i}"
        trees = list(TreeStore.open(folder / "trees"))
        state[f"trees {i}"] = {tree.prompt_id: tree.tokens.tolist() for tree in trees}
        assert len(state[f"trees {i}"]) == len(trees)
        state[f"rewards {i}"] = [r.tolist() for r in TreeStore.open(folder / "trees").rewards("low")]
        weights = sorted((folder / "value").glob("*.safetensors"))
        state[f"value {i}"] = [path.read_bytes() for path in weights]
        assert weights
        state[f"validation {i}"] = json.loads((folder / "validation.json").read_text())
    return state


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """An uninterrupted run of three iterations for each kind: its config and results."""
    runs = {}
    for kind in TRAINING:
        config = make(files, tmp_path_factory.mktemp(kind) / "run", kind)
        runs[kind] = config, iterate(config)
    return runs


@pytest.mark.parametrize("kind", TRAINING)
def test_a_run_of_three_iterations(finished, kind):
    config, results = finished[kind]
    output = Path(config.output)
    assert json.loads((output / "iterations.json").read_text()) == json.loads(json.dumps(results))
    assert [row["zeta"] for row in results["iterations"]] == [0.0, 0.02, 0.01]
    assert [row["beta"] for row in results["iterations"]] == [5.0, 5.0, 3.0]
    assert results["reference"]["kl"] == 0
    assert results["iterations"][results["best"]]["measured"]["low"]["gain_sd"] > 0.3
    for i, row in enumerate(results["iterations"]):
        assert row["trees"] == 24
        assert row["tokens"] > 100
        assert row["measured"]["kl"] > 0
        assert set(row["seconds"]) == {"collect", "label", "train", "validate"}
        store = TreeStore.open(output / f"iteration-{i}" / "trees")
        moved = max(abs(tree.logp_gen - tree.logp_ref).max() for tree in store)
        assert moved == 0 if i == 0 else moved > 0.1
        assert store.metadata.policy.get("settings", {}).get("beta") == (None if i == 0 else 5.0)
        function = {"head": ValueHead, "model": ValueModel}[kind].from_pretrained(row["value_function"])
        assert function.config.iteration == i
    report = (output / "report.md").read_text()
    assert report.count("\n|") >= 5
    assert f"Best: iteration {results['best']}" in report


@pytest.mark.parametrize("kind", TRAINING)
def test_a_finished_run_is_not_done_again(finished, kind, monkeypatch):
    config, results = finished[kind]
    for name in ("collect", "label", "train_head", "train_model", "load_chat_model"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("nothing is left to do"))
    assert iterate(config) == results


class Killed(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


def killing(function, when, calls):
    """`function`, killed at call number `when` of all in `calls`: before it, or after it and before its record."""

    def call(*args, **kwargs):
        calls.append(function)
        if len(calls) == when + 1 and when % 2 == 0:
            raise Killed
        result = function(*args, **kwargs)
        if len(calls) == when + 1:
            raise Killed
        return result

    return call


@pytest.mark.parametrize("kind", TRAINING)
def test_a_killed_run_ends_in_the_same_state(finished, files, tmp_path, kind, monkeypatch):
    """Killed in every stage of two iterations, one after the other; the third iteration is added afterwards."""
    config, _ = finished[kind]
    output = tmp_path / "run"
    interrupted = replace(config, output=str(output), iterations=config.iterations[:2])
    original = {name: getattr(module, name) for name in ("collect", "label", "train_head", "train_model")}
    measure, kills = module.Validator.measure, 0
    while True:
        calls: list[Any] = []
        for name, function in original.items():
            monkeypatch.setattr(module, name, killing(function, kills % 2, calls))
        monkeypatch.setattr(module.Validator, "measure", killing(measure, kills % 2, calls))
        try:
            iterate(interrupted)
        except Killed:
            kills += 1
        else:
            break
    assert kills >= 9
    monkeypatch.undo()
    iterate(replace(interrupted, iterations=config.iterations))
    assert final_state(output) == final_state(Path(config.output))


def test_a_kill_within_a_stage(finished, tmp_path, monkeypatch):
    """Killed while trees are sampled, shards labelled and completions judged."""
    config, _ = finished["head"]
    output = tmp_path / "run"
    config_here = replace(config, output=str(output))
    for owner, name in (
        (TreeStore, "write"),
        (Shard, "write_rewards"),
        (validation, "judge"),
        (train_head, "write_json"),
    ):
        monkeypatch.setattr(owner, name, killing(getattr(owner, name), 1, []))
        with pytest.raises(Killed):
            iterate(config_here)
        monkeypatch.undo()
    iterate(config_here)
    assert final_state(output) == final_state(Path(config.output))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"collect": TREES | {"limit": 20}}, r"iteration-0/trees was begun with limit = 24, this run has 20"),
        ({"train": TRAINING["head"] | SHARED | {"learning_rate": 0.5}}, "iteration-0/value .*learning_rate = 0.01"),
        ({"train": TRAINING["head"] | SHARED | {"epochs": 3}}, r"iteration-0/value .*epochs = 8, this run has 3"),
        ({"policy": {"top_k": 7}}, r"iteration-0/validation.json was begun with policy.top_k = 12"),
        ({"rewards": {"low": "text_rewards:high"}}, r"validation.json was begun with rewards.low = 'text_rewards:low'"),
        ({"seed": 3}, "iteration-0/trees was begun with seed = 0"),
    ],
)
def test_changed_settings_of_finished_stages_are_refused(finished, change, message):
    config, _ = finished["head"]
    with pytest.raises(ValueError, match=message):
        iterate(replace(config, **change))
    changed = [config.iterations[0], replace(config.iterations[1], zeta=0.5), *config.iterations[2:]]
    with pytest.raises(ValueError, match=r"iteration-1/value was begun with zeta = 0.02, this run has 0.5"):
        iterate(replace(config, iterations=changed))


def test_a_run_that_differs_in_zeta_shares_what_comes_before(finished, tmp_path, monkeypatch):
    config, results = finished["head"]
    iterations = [config.iterations[0], replace(config.iterations[1], zeta=0.5)]
    other = replace(config, output=str(tmp_path / "other"), iterations=iterations, reuse=config.output)
    monkeypatch.setattr(module, "collect", lambda *a: pytest.fail("both iterations' trees are there"))
    found = iterate(other)["iterations"]
    assert found[0]["measured"] == results["iterations"][0]["measured"]
    assert found[0]["reused"] == ["collect", "label", "train", "validate"]
    assert found[1]["reused"] == ["collect", "label"]
    assert found[1]["store"] == results["iterations"][1]["store"]
    assert not (tmp_path / "other" / "iteration-0").exists()
    assert found[1]["measured"]["kl"] != results["iterations"][1]["measured"]["kl"]


def test_existing_trees_and_value_functions(files, finished, tmp_path, monkeypatch):
    """Iteration 0 for a new objective by labelling alone; iteration 1 from given trees, if of the same policy."""
    config, results = finished["head"]
    store = tmp_path / "trees"
    shutil.copytree(Path(config.output) / "iteration-0" / "trees", store)
    shutil.copytree(Path(config.output) / "iteration-1" / "trees", tmp_path / "later")
    monkeypatch.setattr(module, "collect", lambda *a: pytest.fail("the trees are given"))
    relabelled = make(
        files, tmp_path / "high", objectives=["high"], rewards={"high": "text_rewards:high"},
        iterations=[IterationConfig(trees=str(store), states=str(tmp_path / "states"))],
    )  # fmt: skip
    assert iterate(relabelled)["iterations"][0]["measured"]["high"]["gain_sd"] > 0.3
    assert TreeStore.open(store).objectives() == ["high", "low"]
    assert list((tmp_path / "states").iterdir())

    value = results["iterations"][0]["value_function"]
    given = [
        IterationConfig(trees=str(store), value_function=value),
        IterationConfig(trees=str(tmp_path / "later"), zeta=0.02),
    ]
    found = iterate(make(files, tmp_path / "given", iterations=given))["iterations"]
    assert found[0]["value_function"] == value
    assert found[1]["measured"] == results["iterations"][1]["measured"]
    other_policy = [replace(given[0], beta=1.0), given[1]]
    with pytest.raises(
        ValueError, match=r"later was sampled under the policy .*'beta': 5.0.*this iteration's is .*1.0"
    ):
        iterate(make(files, tmp_path / "refused", iterations=other_policy))


def test_early_stop_ends_the_run(files, tmp_path):
    config = make(files, tmp_path / "run", early_stop=True, tolerance=100.0)
    results = iterate(config)
    assert len(results["iterations"]) == 2
    assert results["stopped"].startswith("iteration 1 is not better than iteration 0")
    assert "Stopped: iteration 1" in (tmp_path / "run" / "report.md").read_text()
    assert iterate(config) == results


def test_a_target_kl_schedule(files, tmp_path):
    """Beta rises in iteration 0; zeta brings the divergence down in iteration 1, which ends within the bound."""
    target = TargetKl(kl=4.0, betas=[1.0, 4.0, 12.0], zetas=[0.0, 0.05, 0.5], tolerance=0.0)
    config = make(files, tmp_path / "run", iterations=[IterationConfig(), IterationConfig()], target_kl=target)
    results = iterate(config)
    first, second = results["iterations"]
    assert first["zeta"] == 0
    assert [row["beta"] for row in first["tried"]] == target.betas[: len(first["tried"])]
    assert first["beta"] in target.betas
    zetas = [row for row in second["tried"] if "zeta" in row]
    assert second["zeta"] in [row["zeta"] for row in zetas]
    assert all(row["beta"] == first["beta"] for row in zetas)
    chosen = next(row for row in zetas if row["zeta"] == second["zeta"])
    assert chosen["kl"] <= 4.0 or all(row["kl"] > 4.0 for row in zetas)
    folder = tmp_path / "run" / "iteration-1"
    validation = json.loads((folder / "validation.json").read_text())
    assert validation["summary"] == second["measured"]
    head = ValueHead.from_pretrained(folder / "value")
    assert head.config.recipe["zeta"] == second["zeta"]
    assert "Tried in iteration 1" in (tmp_path / "run" / "report.md").read_text()
    assert iterate(config) == results


def test_several_objectives_share_a_value_function(files, tmp_path):
    config = make(
        files,
        tmp_path / "run",
        objectives=["low", "high"],
        rewards={name: f"text_rewards:{name}" for name in ("low", "high")},
        iterations=[IterationConfig(), IterationConfig()],
        policy={"top_k": 12, "weights": {"low": 1.0, "high": 0.25}},
    )
    row = iterate(config)["iterations"][1]["measured"]
    assert row["combined"]["reward"] == pytest.approx(row["low"]["reward"] + row["high"]["reward"] / 4)
    assert row["low"]["gain_sd"] > 0.2
    assert "combined" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_two_processes_share_a_run(files, tmp_path):
    """What two ranks find is what one does; the files are written once."""
    config = make(files, tmp_path / "one", iterations=[IterationConfig(), IterationConfig(zeta=0.02)])
    results = iterate(config)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(dataclasses.asdict(replace(config, output=str(tmp_path / "two")))))
    finish(launch(2, "iterate", config=recipe))
    found = json.loads((tmp_path / "two" / "iterations.json").read_text())
    for i, (ours, theirs) in enumerate(zip(found["iterations"], results["iterations"], strict=True)):
        assert ours["trees"] == theirs["trees"]
        assert ours["measured"]["kl"] == pytest.approx(theirs["measured"]["kl"], rel=0.05)
        assert_alike(tmp_path / "two" / f"iteration-{i}" / "trees", tmp_path / "one" / f"iteration-{i}" / "trees")
    assert not list(tmp_path.rglob("*.tmp"))
