"""Learning rules that look at whole completions: sums of advantages along the paths of a tree.

What steers is G, the sum along a completion of advantages A(s, a) = Q(s, a) - E Q(s, .), the expectation over actions
of the reference: tilting by beta Q moves a completion to pi_ref exp(beta G), up to normalisation (`efficiency`).
Regressing every position on the final reward (equation 6) lets each token claim all of it; these rules hold the sum to
it.

    "sums"   E (R - b - G)^2: all leaves of a tree at once, whose paths share prefixes
    "gain"   - Cov(R, G) / sqrt(sum of variances): the reward gained for the KL divergence spent, itself
    "pairs"  - log sigmoid(G_i - G_j) for completions of one prompt with R_i > R_j: Bradley-Terry
    "balance"  Var(log pi / pi_ref - beta R) within a tree, pi being tilted by beta Q: path consistency, which is 0
             where Q are the soft values of the optimal policy (equation 1), learnt from the reference's completions
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mavis_logits.values.value_head import ValueHead

from ..trees.data import LabelledTree
from ..trees.packing import pack
from ..trees.tree import Tree
from .efficiency import baselines, leaf_shares
from .head_fitting import minimise

if TYPE_CHECKING:
    from .head_config import Rule, TrainHeadConfig

_TREES_PER_STEP = 16


@dataclass(frozen=True)
class Paths:
    """T positions of one or several trees, and the L completions that they make up.

    Attributes:
        hidden: bfloat16 `[T, d]`, the state before each position.
        tokens: `[T, 1 + J]`, the token taken there, and J that the reference would choose.
        targets: `[T, M]`, of equation 6, in reward units.
        node: `[T]`, the node of each position, from 0 to n - 1.
        path: `[L, D]`, nodes from the prompt to the end of each completion; n where there are fewer than D.
        rewards: `[L, M]`.
        centred: `[L, M]`, rewards less a baseline each, which shares no token with the completion.
        share: `[L]`, its weight; the weights of one tree sum to 1.
        tree: `[L]`, which tree it is of.
    """

    hidden: Tensor
    tokens: Tensor
    targets: Tensor
    node: Tensor
    path: Tensor
    rewards: Tensor
    centred: Tensor
    share: Tensor
    tree: Tensor

    @property
    def nodes(self) -> int:
        """n."""
        return int(self.node.max()) + 1


def paths_of(item: LabelledTree, states: Tensor, actions: Tensor) -> Paths:
    """The paths of one tree.

    Args:
        item: a tree of N new tokens whose prompt has at least two children.
        states: bfloat16 `[P + N, d]`, in packed order.
        actions: int32 `[P + N, J]`, of the reference at each of them.

    Raises:
        ValueError: the prompt has one child only, so that there is no baseline.
    """
    tree, layout = item.tree, pack(item.tree)
    previous, count = torch.from_numpy(layout.previous), len(tree)
    node = layout.node[layout.new]
    leaves = tree.leaves()
    found = [tree.path(int(leaf)) for leaf in leaves]
    path = np.full((len(leaves), max(map(len, found))), count)
    for row, nodes in zip(path, found, strict=True):
        row[: len(nodes)] = nodes
    taken = torch.from_numpy(layout.input_ids[layout.new])[:, None]
    return Paths(
        hidden=states[previous],
        tokens=torch.cat([taken, actions[previous].long()], dim=1),
        targets=torch.from_numpy(item.targets[node]).float(),
        node=torch.from_numpy(node),
        path=torch.from_numpy(path),
        rewards=torch.from_numpy(item.rewards).float(),
        centred=torch.from_numpy(item.rewards - baselines(tree, item.rewards)).float(),
        share=torch.from_numpy(leaf_shares(tree)).float(),
        tree=torch.zeros(len(leaves), dtype=torch.long),
    )


def together(parts: Sequence[Paths]) -> Paths:
    """Several trees as one."""
    joined: dict[str, list[Tensor]] = {field.name: [] for field in fields(Paths)}
    offset, most = 0, max(part.path.shape[1] for part in parts)
    total = sum(part.nodes for part in parts)
    for number, part in enumerate(parts):
        path = torch.where(part.path < part.nodes, part.path + offset, total)
        path = nn.functional.pad(path, (0, most - path.shape[1]), value=total)
        own = {"node": part.node + offset, "path": path, "tree": torch.full_like(part.tree, number)}
        for name, tensors in joined.items():
            tensors.append(own.get(name, getattr(part, name)))
        offset += part.nodes
    return Paths(**{name: torch.cat(tensors) for name, tensors in joined.items()})


def along(head: ValueHead, paths: Paths, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a head says of completions, in standard deviations of the reward.

    Returns:
        the sum of advantages G and of within-step variances along each completion, and the log-ratio log pi / pi_ref
        of the policy that is tilted by `strength` Q, `[L, M]` each; and the value of every token taken, `[T, M]`.
    """
    _, scale = head.config.reward_units(head.device)
    said = head(paths.hidden.to(head.device).float(), paths.tokens.to(head.device))
    taken, drawn = said[:, 0], said[:, 1:]
    advantage, variance = (taken - drawn.mean(dim=1)) / scale, (drawn / scale).var(dim=1)
    partition = (strength * drawn / scale).logsumexp(dim=1) - math.log(drawn.shape[1])  # E exp(beta Q), by the draws
    ratio = strength * taken / scale - partition
    node, path = paths.node.to(head.device), paths.path.to(head.device)
    sums = advantage.new_zeros(3, paths.nodes + 1, advantage.shape[1])
    sums = sums.index_add(1, node, torch.stack([advantage, variance, ratio]))
    total = sums[:, path].sum(dim=2)
    return total[0], total[1], total[2], taken


def rule_loss(head: ValueHead, paths: Paths, rule: Rule, anchor: float, strength: float = 3.0) -> Tensor:
    """A rule's loss over some trees, averaged over objectives, and `anchor` times equation 6 beside it.

    Equation 6 keeps the level of the values, which no sum of advantages knows of. `strength` is beta of the rule
    "balance", for values in standard deviations of the reward.
    """
    _, scale = head.config.reward_units(head.device)
    sums, variances, ratios, taken = along(head, paths, strength)
    centred = paths.centred.to(sums) / scale
    share = paths.share.to(sums)[:, None]
    trees = int(paths.tree[-1]) + 1
    if rule == "sums":
        loss = (share * (centred - sums).square()).sum() / (trees * sums.shape[1])
    elif rule == "gain":
        covariance, variance = ((share * x).sum(dim=0) / trees for x in (centred * sums, variances))
        loss = -(covariance / (variance + 1e-6).sqrt()).mean()
    elif rule == "balance":
        residual = ratios - strength * paths.rewards.to(sums) / scale
        tree = paths.tree.to(head.device)
        mean = sums.new_zeros(trees, sums.shape[1]).index_add(0, tree, share * residual)  # minus log Z of the prompt
        loss = (share * (residual - mean[tree]).square()).sum() / (trees * sums.shape[1] * strength**2)
    else:
        first, second = _pairs(paths)
        higher = torch.sign(paths.rewards[first] - paths.rewards[second]).to(sums)
        losses = nn.functional.softplus(-higher * (sums[first] - sums[second])) * higher.abs()
        loss = losses.sum() / higher.abs().sum().clamp(min=1.0)
    position = ((taken - paths.targets.to(taken)) / scale).square().mean()
    return loss + anchor * position


def _pairs(paths: Paths) -> tuple[Tensor, Tensor]:
    """Pairs of completions of one tree, each once: `[pairs]` both."""
    same = paths.tree[:, None] == paths.tree
    return torch.nonzero(torch.triu(same, diagonal=1), as_tuple=True)  # type: ignore[return-value]


def fit_paths(
    head: ValueHead,
    training: Sequence[Paths],
    validation: Sequence[Paths],
    config: TrainHeadConfig,
) -> list[float]:
    """Minimise a rule over minibatches of trees; as `minimise`.

    Args:
        head: what to train.
        training, validation: trees.
        config: rule, anchor, learning rate, epochs and so on.

    Returns:
        Loss on the validation trees after each epoch.
    """
    return minimise(
        head,
        len(training),
        _TREES_PER_STEP,
        lambda rows: rule_loss(head, together([training[i] for i in rows]), config.rule, config.anchor),
        lambda: mean_rule_loss(head, validation, config.rule, config.anchor),
        config,
        config.rule,
        "trees",
    )


def path_loss(ratios: Tensor, rewards: Tensor, tree: Tree, eta: Tensor | float) -> Tensor:
    """Variance of eta log pi / pi_ref - R over the answers of a tree, siblings counting alike.

    Args:
        ratios: log pi / pi_ref [leaves], or of M policies [leaves, M].
        rewards: likewise, in standard deviations.
        tree: that they are of.
        eta: of equation 1; one for each of M policies, [M].

    Returns:
        [], or [M].
    """
    share = torch.from_numpy(leaf_shares(tree)).to(ratios)
    missed = eta * ratios - rewards.to(ratios)
    return share @ (missed - share @ missed).square()


@torch.inference_mode()
def mean_rule_loss(head: ValueHead, trees: Sequence[Paths], rule: Rule, anchor: float) -> float:
    """The loss over all trees, without dropout."""
    head.eval()
    parts = [trees[i : i + 4 * _TREES_PER_STEP] for i in range(0, len(trees), 4 * _TREES_PER_STEP)]
    return sum(float(rule_loss(head, together(part), rule, anchor)) * len(part) for part in parts) / len(trees)


@torch.inference_mode()
def ordered_right(head: ValueHead, trees: Sequence[Paths]) -> dict[str, float]:
    """By objective, of the pairs of completions of one prompt with different rewards, the share whose sums of
    advantages are in the order of the rewards; 0.5 is chance."""
    head.eval()
    right, every = np.zeros(len(head.config.objectives)), np.zeros(len(head.config.objectives))
    for paths in trees:
        sums, first, second = along(head, paths)[0].cpu(), *_pairs(paths)
        higher = torch.sign(paths.rewards[first] - paths.rewards[second])
        agree = torch.sign(sums[first] - sums[second]) == higher
        right += (agree & (higher != 0)).sum(dim=0).numpy()
        every += (higher != 0).sum(dim=0).numpy()
    return dict(zip(head.config.objectives, (right / np.maximum(1, every)).tolist(), strict=True))
