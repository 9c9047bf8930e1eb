"""`mavis calibrate`: units of value in which one strength tilts equally far towards every objective."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chat_model import chat_model
from mavis_logits import MavisConfig, cli
from mavis_logits.steering.policy import Policy
from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_model import ValueModel
from mavis_training.calibrate import CalibrateConfig, calibrate, set_tilt_scale, strength
from mavis_training.fitting.efficiency import log_prob_weights
from mavis_training.fitting.foreseen import parts_of
from mavis_training.fitting.states import tree_states
from mavis_training.measure.validation import ValidationConfig, Validator
from mavis_training.sampling.config import PolicyConfig
from mavis_training.trees.data import load_trees
from mavis_training.trees.packing import pack
from random_trees import make_store, random_tree

WANTED = 2.0


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A chat model and prompts."""
    folder = tmp_path_factory.mktemp("calibrate")
    model, tokenizer = chat_model()
    model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    lines = [" ".join(f"w{(7 * i + j) % 40}" for j in range(5)) for i in range(40)]
    (folder / "prompts.txt").write_text("\n".join(lines))
    return folder


def make_head(folder: Path, *sizes: float, **config) -> Path:
    """A head whose outputs differ between tokens by `sizes`, in standard deviations of their rewards."""
    model, _ = chat_model()
    torch.manual_seed(0)
    config.setdefault("settings", {"top_k": None})
    scale = [3.0 * 2**i for i in range(len(sizes))]
    head = ValueHead.for_model(model, [f"o{i}" for i in range(len(sizes))], width=16, reward_scale=scale, **config)
    with torch.no_grad():
        head.out.weight.normal_()
        head.out.weight.mul_(torch.tensor(sizes)[:, None])
    head.save_pretrained(folder)
    return folder


def settings(place: Path, head: Path, **changes) -> CalibrateConfig:
    given_settings = {
        "prompts": str(place / "prompts.txt"), "model": str(place / "chat"), "max_new_tokens": 12, "kl": WANTED,
        "limit": None, "batch_size": 40, "seeds": [0, 1],
    } | changes  # fmt: skip
    return CalibrateConfig(str(head), **given_settings)


def spent(place: Path, head: Path, objective: str, folder: Path) -> float:
    """Nats that steering towards one objective spends, by the settings that the head recommends, on other seeds."""
    recommended = json.loads((head / "config.json").read_text())["settings"]
    policy = {name: value for name, value in recommended.items() if name != "temperature"}
    on = ValidationConfig(str(place / "prompts.txt"), None, [5, 6], 12, 40, recommended["temperature"])
    model, tokenizer = chat_model()
    rewards = {objective: "length.py:length"}
    (folder / "length.py").write_text("def length(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    rewards = {objective: f"{folder / 'length.py'}:length"}
    validator = Validator(on, rewards, {objective: 1.0}, lambda: (model, tokenizer))
    return validator.measure(folder / objective, PolicyConfig(str(head), {**policy, "weights": {objective: 1.0}})).kl


def test_afterwards_one_strength_spends_the_same_for_all(place, tmp_path) -> None:
    head = make_head(tmp_path / "head", 0.05, 0.3)
    found = calibrate(settings(place, head))
    assert found["o0"].beta > 1.5 * found["o1"].beta
    for objective in ("o0", "o1"):
        assert spent(place, head, objective, tmp_path) == pytest.approx(WANTED, rel=0.35)
    before = json.loads((head / "config.json").read_text())
    again = calibrate(settings(place, head))  # units that are there already make no difference
    after = json.loads((head / "config.json").read_text())
    assert {name: one.beta for name, one in again.items()} == {name: one.beta for name, one in found.items()}
    assert (before["tilt_scale"], before["settings"]) == (after["tilt_scale"], after["settings"])


def test_a_head_with_units_is_loaded_and_steers_by_them(place, tmp_path) -> None:
    head = make_head(tmp_path / "head", 1.0, 1.0, tilt_scale=[2.0, 5.0])
    loaded = ValueHead.from_pretrained(head)
    torch.testing.assert_close(loaded.units, torch.tensor([[0.0, 0.0], [3.0, 6.0], [2.0, 5.0]]))


@given(st.lists(st.floats(0.05, 50), min_size=1, max_size=4), st.none() | st.floats(0.1, 20), st.integers(0, 10**6))
def test_one_strength_in_units_is_each_ones_own_in_standard_deviations(
    betas: list[float], wanted: float | None, seed: int
) -> None:
    deviations = torch.rand(len(betas), generator=torch.Generator().manual_seed(seed)) + 0.1
    model, _ = chat_model()
    head = ValueHead.for_model(model, [f"o{i}" for i in range(len(betas))], width=8, reward_scale=deviations.tolist())
    set_tilt_scale([head.config], betas, wanted)
    assert wanted is None or head.config.settings["beta"] == wanted
    common = torch.tensor(head.config.settings["beta"])
    every = MavisConfig(normalize="standard")
    for i, beta in enumerate(betas):
        weights = torch.eye(len(betas))[i]
        in_units = Policy(every, weights, common, head.units[2])
        by_deviation = Policy(every, weights, torch.tensor(beta), head.units[1])
        x = torch.zeros(1)
        torch.testing.assert_close(
            in_units.beta * in_units.weights_of(x), by_deviation.beta * by_deviation.weights_of(x), rtol=1e-3, atol=1e-6
        )


@given(st.floats(0.01, 30), st.floats(0.5, 20))
def test_the_strength_is_found_where_the_square_law_holds(size: float, kl: float) -> None:
    found = strength(lambda beta: (beta * size) ** 2, kl)
    assert found is not None
    assert found.kl == pytest.approx(kl, rel=0.1)


@given(st.floats(0.3, 3), st.floats(0.5, 20), st.floats(1.0, 2.5))
def test_the_strength_is_found_where_more_is_spent_more_slowly(size: float, kl: float, power: float) -> None:
    """As far from the reference, where log pi_ref counts beside the values."""
    found = strength(lambda beta: (beta * size) ** power, kl)
    assert found is not None
    assert found.kl == pytest.approx(kl, rel=0.1)


@given(st.floats(0.3, 3), st.floats(0.5, 20), st.floats(1.0, 4.0))
def test_the_strength_is_neared_under_other_laws(size: float, kl: float, power: float) -> None:
    first = (4 * size) ** power
    found = strength(lambda beta: (beta * size) ** power, kl)
    assert found is not None
    assert abs(math.log(found.kl / kl)) <= max(
        -math.log(0.9), 0.5 * abs(math.log(first / kl))
    )  # within a tenth is near


def test_values_that_differ_nowhere_are_refused_and_nothing_is_written(place, tmp_path) -> None:
    head = make_head(tmp_path / "head", 0.1, 0.0)
    before = (head / "config.json").read_text()
    with pytest.raises(ValueError, match="steering towards 'o1' changes nothing"):
        calibrate(settings(place, head))
    assert (head / "config.json").read_text() == before


def test_settings_under_which_units_cancel_are_refused(place, tmp_path) -> None:
    head = make_head(tmp_path / "head", 1.0, settings={"normalize": "minmax"})
    with pytest.raises(ValueError, match="the unit of a value does not matter"):
        calibrate(settings(place, head))


def make_trees(folder: Path, **metadata) -> str:
    """Trees whose reward, under the name of the head's objective, is what their answers' likelihood is."""
    trees = [random_tree(seed) for seed in range(30)]
    rewards = {"o0": lambda tree: [tree.logp_ref[tree.path(leaf)].sum() for leaf in tree.leaves()]}
    return str(make_store(folder, trees, rewards, model="chat", **metadata).folder)


def test_what_log_pi_ref_counts_for_is_found_first_and_steered_by(place, tmp_path) -> None:
    head, trees = make_head(tmp_path / "head", 0.3), make_trees(tmp_path / "trees")
    calibrate(settings(place, head, store=trees, trees=20))
    config = json.loads((head / "config.json").read_text())
    model, _ = chat_model()
    loaded = ValueHead.from_pretrained(head).bind(model).float().eval()
    _, items = load_trees(trees, ["o0"], 0.0, most=20)
    states = [(item, tree_states(model, pack(item.tree), None)) for item in items]
    (expected,) = log_prob_weights(parts_of(loaded, model, states, 0))
    assert config["log_prob_weight"] == [pytest.approx(expected, rel=1e-3)]
    assert spent(place, head, "o0", tmp_path) == pytest.approx(WANTED, rel=0.35)


def test_stores_of_several_temperatures_give_a_table(place, tmp_path) -> None:
    head = make_head(tmp_path / "head", 0.3)
    cold = {"max_new_tokens": 12, "temperature": 0.5}
    stores = [make_trees(tmp_path / "trees"), make_trees(tmp_path / "cold", sampling=cold)]
    calibrate(settings(place, head, store=stores, trees=20))
    config = json.loads((head / "config.json").read_text())
    model, _ = chat_model()
    loaded = ValueHead.from_pretrained(head).bind(model).float().eval()
    _, items = load_trees(stores[0], ["o0"], 0.0, most=20)
    states = [(item, tree_states(model, pack(item.tree), None)) for item in items]
    expected = {at: log_prob_weights(parts_of(loaded, model, states, 0, float(at)))[0] for at in ("1", "0.5")}
    assert config["log_prob_weight"] == {at: [pytest.approx(own, rel=1e-3)] for at, own in expected.items()}
    assert expected["1"] != pytest.approx(expected["0.5"], rel=0.05)
    assert spent(place, head, "o0", tmp_path) == pytest.approx(WANTED, rel=0.35)


def test_trees_that_a_policy_sampled_are_refused_and_nothing_is_written(place, tmp_path) -> None:
    head = make_head(tmp_path / "head", 0.3)
    before = (head / "config.json").read_text()
    trees = make_trees(tmp_path / "trees", policy={"beta": 2.0})
    with pytest.raises(ValueError, match="was not sampled from the base model alone: name a store that no policy"):
        calibrate(settings(place, head, store=trees))
    assert (head / "config.json").read_text() == before


def test_trees_beside_a_value_model_are_refused(place, tmp_path) -> None:
    ValueModel.from_backbone(chat_model()[0], objectives=["o0"]).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is no value head"):
        calibrate(settings(place, tmp_path / "model", store=make_trees(tmp_path / "trees")))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kl": 0.0}, "kl must be a positive number"), ({"beta": 0.0}, "beta must be a positive number"),
     ({"seeds": []}, "seeds must not be empty"), ({"temperature": 0.0}, "temperature"), ({"trees": 0}, "trees"),
     ({"store": []}, "store is empty")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(place, tmp_path, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        settings(place, tmp_path, **change)


@pytest.mark.parametrize("scale", [[1.0], [1.0, 0.0], [1.0, math.inf]])
def test_units_that_are_none_are_refused(scale) -> None:
    model, _ = chat_model()
    with pytest.raises(ValueError, match="tilt_scale"):
        ValueHead.for_model(model, ["a", "b"], width=8, tilt_scale=scale)


def test_the_command_tells_what_it_found(place, tmp_path, capsys) -> None:
    head = make_head(tmp_path / "head", 0.05, 0.15)
    words = ["calibrate", "--value_function", str(head), "--prompts", str(place / "prompts.txt"), "--kl", "2",
             "--model", str(place / "chat"), "--max_new_tokens", "8", "--limit", "20"]  # fmt: skip
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "o0: " in shown
    assert "for all of them" in shown
