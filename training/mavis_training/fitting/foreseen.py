"""What a head is foreseen to gain when it steers, and what log pi_ref is to count for beside it, by held-out trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from mavis_logits.backbone import Backbone
from mavis_logits.values.value_head import ValueHead

from ..trees.data import PAIRS, LabelledTree
from ..trees.packing import pack
from ..trees.tree_store import TreeStore
from .efficiency import log_prob_weights, log_probs, sample_actions, sharpened, steering_efficiency, steering_parts
from .states import tree_states

Found = Mapping[str, Mapping[str, float]]  # by objective, of `steering`

_TREES = 64  # that are looked at, unless said otherwise
_ACTIONS = 8  # drawn from the reference at each of their states


def steering_by_reference(
    head: ValueHead,
    model: PreTrainedModel,
    validation: Sequence[LabelledTree],
    of_tree: Mapping[int, Tensor],
    of_reference: Mapping[int, tuple[float, float] | None],
    seed: int,
    most: int = _TREES,
) -> dict[tuple[float, float], dict[str, dict[str, float]]]:
    """`steering` on held-out trees, of stores at several temperatures each by itself, by temperature and nucleus."""
    found: dict[tuple[float, float], dict[str, dict[str, float]]] = {}
    for how in dict.fromkeys(of_reference.values()):
        own = [(item, of_tree[id(item)]) for item in validation if of_reference[id(item)] == how]
        if how is not None and own:
            found[how] = steering(head, model, own, seed, *how, most=most)
    return found


def steering(
    head: ValueHead,
    model: PreTrainedModel,
    trees: Sequence[tuple[LabelledTree, Tensor]],
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    most: int = _TREES,
) -> dict[str, dict[str, float]]:
    """`steering_efficiency` of a head on up to `most` trees, each with the states `[P + N, d]` that it reads, of the
    reference at a temperature and nucleus; empty if none has the two branches at its prompt which that takes.

    The `gain` is that of the values with `log_prob_weight` of log pi_ref beside them, `gain_of_values` theirs alone.
    """
    branching = [(item, states) for item, states in trees if (item.tree.parent == -1).sum() > 1][:most]
    if not branching:
        return {}
    parts = parts_of(head, model, branching, seed, temperature, top_p)
    weights, rewards = log_prob_weights(parts), [item.rewards for item, _ in branching]
    alone, found = (
        steering_efficiency(sharpened(parts, own), rewards, head.config.objectives)
        for own in (np.zeros_like(weights), weights)
    )
    return {
        name: {
            "gain": found[name]["gain"], "gain_of_values": alone[name]["gain"],
            "calibration": alone[name]["calibration"], "log_prob_weight": float(weight),
        }
        for name, weight in zip(head.config.objectives, weights, strict=True)
    }  # fmt: skip


def parts_of(
    head: ValueHead,
    model: PreTrainedModel,
    trees: Sequence[tuple[LabelledTree, Tensor]],
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """`steering_parts` of a head's values and log pi_ref together, tree by tree; arguments as for `steering`."""
    embedding = Backbone.of(model).output_embedding
    generator = torch.Generator(embedding.device).manual_seed(seed)
    parts = []
    for item, states in trees:
        layout = pack(item.tree)
        final = states if head.config.layer is None else tree_states(model, layout)
        drawn = sample_actions(embedding, final, _ACTIONS, generator, temperature, top_p)
        before, tokens = torch.from_numpy(layout.previous), torch.from_numpy(layout.input_ids[layout.new])
        candidates = torch.cat([tokens[:, None], drawn[before]], dim=1)
        likely = log_probs(embedding, final[before], candidates, temperature, top_p)
        parts.append(steering_parts(head, item, states, drawn, likely))
    return parts


def log_prob_weight_of(
    foreseen: Mapping[tuple[float, float], Found], objectives: Sequence[str]
) -> list[float] | dict[str, list[float]] | None:
    """`ObjectivesMixin.log_prob_weight` by what `steering_by_reference` found; None if that is nothing."""
    at: dict[str, list[Found]] = {}
    for (temperature, _), found in foreseen.items():
        if found:
            at.setdefault(f"{temperature:g}", []).append(found)
    weights = {temperature: _mean_weight(every, objectives) for temperature, every in at.items()}
    return next(iter(weights.values()), None) if len(weights) < 2 else weights


def _mean_weight(every: Sequence[Found], objectives: Sequence[str]) -> list[float]:
    """[M] over nuclei at one temperature."""
    return [float(f"{np.mean([found[name]['log_prob_weight'] for found in every]):.4g}") for name in objectives]


def reference_of(store: TreeStore) -> tuple[float, float] | None:
    """Temperature and nucleus at which its trees were sampled from the reference; None if they were not."""
    found = store.metadata.sampling
    if store.metadata.policy or PAIRS in found:
        return None
    return float(found.get("temperature", 1.0)), float(found.get("top_p", 1.0))
