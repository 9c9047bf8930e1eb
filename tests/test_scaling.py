"""The study of data and learning rules: a thinned tree is the tree of its first branches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scaling
from mavis_training.trees.data import LabelledTree
from mavis_training.trees.packing import pack
from mavis_training.trees.targets import node_targets
from random_trees import random_tree


@pytest.mark.parametrize("seed", range(8))
def test_a_thinned_tree_is_that_of_its_first_branches(seed: int) -> None:
    tree = random_tree(seed)
    rewards = np.arange(float(len(tree.leaves())))[:, None]
    item = LabelledTree(tree, rewards, node_targets(tree, rewards))
    layout = pack(tree)
    states = {id(item): torch.from_numpy(layout.input_ids).float()[:, None]}  # a token's state is the token itself
    small = scaling.thinned(item, 1, states)
    first = int(np.flatnonzero(tree.parent == -1)[0])
    expected = [leaf for leaf in tree.leaves() if tree.path(int(leaf))[0] == first]
    found = small.tree.leaves()
    assert [small.tree.completion(leaf).tolist() for leaf in found] == [tree.completion(x).tolist() for x in expected]
    assert small.rewards[:, 0].tolist() == [rewards[tree.leaves().tolist().index(leaf), 0] for leaf in expected]
    assert states[id(small)][:, 0].long().tolist() == pack(small.tree).input_ids.tolist()


def test_twice_the_prompts_add_what_the_line_says() -> None:
    def gained(prompts: int, gain: float, branches: int = 4) -> dict[str, object]:
        return {"rule": "plain", "prompts": prompts, "branches": branches, "objectives": {"kind": {"gain": gain}}}

    runs = {str(n): gained(250 * 2**n, 0.1 + 0.03 * n) for n in range(4)}
    runs["fewer branches"] = gained(8000, 9.9, branches=1)  # another study
    (line,) = scaling.doublings({"runs": runs}, ["kind"])[1:]
    assert line == "Twice the prompts, plain, 250 to 2,000: +0.030 on average (kind +0.030), by least squares."
    assert scaling.doublings({"runs": {name: runs[name] for name in "01"}}, ["kind"]) == []
