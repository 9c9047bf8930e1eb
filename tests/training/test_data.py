from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mavis_training.trees.data import load_trees, recipe_of, split_by_prompt
from random_trees import make_store, random_tree


def of_seeds(folder, seeds, **metadata):
    """A store of random trees, each leaf's reward its tree's seed."""
    rewards = {"a": lambda tree: [tree.columns["rank"]] * len(tree.leaves())}
    return make_store(folder, [random_tree(seed) for seed in seeds], rewards, **metadata)


def test_several_stores_are_one_set_in_which_a_prompt_may_occur_twice(tmp_path):
    of_seeds(tmp_path / "first", range(20))
    of_seeds(tmp_path / "second", range(10, 30), policy={"beta": 5.0})
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    stores, trees = load_trees(folders, ["a"], zeta=0.0)
    assert [str(store.folder) for store in stores] == folders
    assert [item.rewards[0, 0] for item in trees] == [*range(20), *range(10, 30)]
    training, validation = split_by_prompt(trees, 0.3)
    assert {t.tree.prompt_id for t in training}.isdisjoint(t.tree.prompt_id for t in validation)
    assert len(training) + len(validation) == 40


def test_one_store_is_read_by_its_name_alone(tmp_path):
    of_seeds(tmp_path / "only", range(3))
    one, several = (load_trees(name, ["a"], 0.0) for name in (str(tmp_path / "only"), [str(tmp_path / "only")]))
    assert [item.tree for item in one[1]] == [item.tree for item in several[1]]


def test_the_recipe_tells_data_but_no_places(tmp_path):
    stores = [of_seeds(tmp_path / "first", [0]), of_seeds(tmp_path / "second", [1], policy={"beta": 5.0})]
    settings = {
        "store": ["x"], "output": "y", "model": str(tmp_path), "initial": str(tmp_path / "iteration-0"),
        "trainer": {"deepspeed": str(tmp_path / "zero2.json"), "bf16": True}, "zeta": 0.1,
    }  # fmt: skip
    recipe = recipe_of(settings, stores)
    assert recipe["data"]["policy"] == {"beta": 5.0}
    assert [data["policy"] for data in recipe["earlier_data"]] == [{}]
    assert recipe["model"] == "tiny"
    assert recipe["initial"] == "iteration-0"
    assert recipe["trainer"] == {"deepspeed": "zero2.json", "bf16": True}
    assert str(tmp_path) not in str(recipe)
    assert "earlier_data" not in recipe_of(settings, stores[:1])


def test_the_prompts_target_penalises_all_that_follows_it(tmp_path):
    of_seeds(tmp_path / "only", range(5))
    whole, onward = (load_trees(str(tmp_path / "only"), ["a"], 0.3, p)[1] for p in ("completion", "continuation"))
    for one, other in zip(whole, onward, strict=True):
        assert np.abs(one.targets - other.targets).max() > 0.01
        np.testing.assert_allclose(one.root_target, other.root_target, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tokenizer_fingerprint": "0" * 16}, "tokenizer_fingerprint differ, "), ({"model": "huge"}, "model differ")],
)
def test_stores_of_another_language_are_refused_by_name(tmp_path, changes, message):
    of_seeds(tmp_path / "first", [0])
    of_seeds(tmp_path / "second", [1], **changes)
    with pytest.raises(ValueError, match=rf"first and .*second cannot be trained on together: their {message}"):
        load_trees([str(tmp_path / "first"), str(tmp_path / "second")], ["a"], 0.0)


def test_bad_input(tmp_path):
    folder = str(of_seeds(tmp_path / "first", [0]).folder)
    of_seeds(tmp_path / "second", [1])
    with pytest.raises(ValueError, match="one or several different folders"):
        load_trees([folder, folder + "/"], ["a"], 0.0)
    with pytest.raises(ValueError, match="one or several different folders"):
        load_trees([], ["a"], 0.0)
    (tmp_path / "second" / "trees-00000.reward-a.h5").unlink()
    with pytest.raises(ValueError, match=r"second has no complete rewards for \['a'\]"):
        load_trees([folder, str(tmp_path / "second")], ["a"], 0.0)
    with pytest.raises(OSError, match="is not a tree store"):
        load_trees([folder, str(tmp_path / "third")], ["a"], 0.0)


def test_one_prompt_under_several_ids_is_on_one_side_and_told(tmp_path):
    trees = [dataclasses.replace(random_tree(i), prompt=f"Prompt {i // 2}" + " " * (i % 2)) for i in range(60)]
    store = make_store(tmp_path / "s", trees, {"a": lambda tree: [0.0] * len(tree.leaves())})
    with pytest.warns(UserWarning, match="30 of 30 prompts stand under several ids, such as 'p0' and 'p1'"):
        _, items = load_trees(str(store.folder), ["a"], 0.0)
    sides = [{item.tree.prompt.strip() for item in side} for side in split_by_prompt(items, 0.3)]
    assert sides[0].isdisjoint(sides[1])


def test_two_stores_of_the_same_trees_are_refused(tmp_path):
    for name, seeds in (("first", range(4)), ("second", range(2, 6))):
        of_seeds(tmp_path / name, seeds)
    with pytest.raises(ValueError, match=r"2 of 4 trees of .*second are those of .*first.*another seed"):
        load_trees([str(tmp_path / "first"), str(tmp_path / "second")], ["a"], 0.0)
