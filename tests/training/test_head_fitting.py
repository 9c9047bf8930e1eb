from __future__ import annotations

import numpy as np
import pytest
import torch

from mavis_logits.values.value_head import ValueHead
from mavis_training.fitting.head_fitting import Samples, bootstrapped, gather
from mavis_training.train_head import TrainHeadConfig
from mavis_training.trees.data import LabelledTree
from mavis_training.trees.packing import pack
from mavis_training.trees.targets import node_targets
from random_trees import random_tree
from tiny_models import tiny_llama


def test_samples_are_the_tokens_of_kept_nodes():
    tree = random_tree(4)
    rewards = np.arange(float(len(tree.leaves())))[:, None]
    item, layout = LabelledTree(tree, rewards, node_targets(tree, rewards)), pack(tree)
    kept = np.arange(len(tree)) % 2 == 0
    states = torch.arange(len(layout)).float()[:, None]
    samples = gather([(item, kept, states), (item, kept, states)])
    half = len(samples) // 2
    assert half == tree.length[kept].sum()
    after = samples.states[samples.after][half:, 0].long().numpy()
    assert kept[layout.node[after]].all()
    np.testing.assert_array_equal(layout.input_ids[after], samples.tokens[half:])
    np.testing.assert_array_equal(item.targets[layout.node[after]], samples.targets[half:])
    # The state before a token is the one that the token's position follows in its own completion.
    before = samples.states[samples.before][half:, 0].long().numpy()
    np.testing.assert_array_equal(layout.position_ids[before] + 1, layout.position_ids[after])
    assert layout.visible()[after, before].all()


def noisy_samples(seed: int, count: int = 1500) -> tuple[Samples, torch.Tensor]:
    """Rewards that are mostly noise; what is not noise is in the state after the token."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2 * count, 16, generator=generator)
    before, after = torch.arange(count), torch.arange(count, 2 * count)
    truth = states[after, :1]
    targets = truth + 2 * torch.randn(count, 1, generator=generator)
    return Samples(states, before, after, torch.randint(50, (count,), generator=generator), targets), truth


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_bootstrapped_targets_are_nearer_to_the_truth(share):
    head = ValueHead.for_model(tiny_llama(), ["a"], width=32, reward_scale=[2.0])
    config = TrainHeadConfig("s", ["a"], "o", bootstrap=share, epochs=4, batch_size=64, warmup_steps=5, device="cpu")
    training, truth = noisy_samples(0)
    targets = bootstrapped(head, training, noisy_samples(1)[0], config).targets
    error, before = (targets - truth).square().mean(), (training.targets - truth).square().mean()
    assert error < (1 - 0.7 * share) * before


def test_bad_input():
    with pytest.raises(ValueError, match=r"bootstrap must be from 0 to 1, got 1\.5"):
        TrainHeadConfig("s", ["a"], "o", bootstrap=1.5)
