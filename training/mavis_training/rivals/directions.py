"""Activation steering: the difference of mean hidden states between good and bad answers, added while decoding.

(Turner et al., 2023; Rimsky et al., 2024.) What many users reach for first: no training, one vector, plain speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mavis_logits.backbone import Backbone

from ..fitting.states import tree_states
from ..trees.data import LabelledTree
from ..trees.packing import pack

FILE = "direction.safetensors"


@torch.no_grad()
def contrast(model: PreTrainedModel, trees: Sequence[LabelledTree], objective: int, layer: int) -> Tensor:
    """Mean state over the answers of more than their tree's mean reward less that over the others, [d] in float32.

    Args:
        model: the base model.
        trees: of it.
        objective: index of the reward.
        layer: whose states they are.

    Raises:
        ValueError: no tree has answers of different rewards.
    """
    sums = torch.zeros(2, Backbone.of(model).output_embedding.shape[1])
    counts = np.zeros(2)
    for item in trees:
        rewards = item.rewards[:, objective]
        if rewards.std() == 0:
            continue
        layout = pack(item.tree)
        states = tree_states(model, layout, layer).float()
        for leaf, reward in zip(item.tree.leaves(), rewards, strict=True):
            own = states[torch.from_numpy(np.isin(layout.node, item.tree.path(int(leaf))))]
            side = int(reward > rewards.mean())
            sums[side] += own.mean(dim=0)
            counts[side] += 1
    if not counts.all():
        raise ValueError("no tree has answers of different rewards: there are no two sides to tell apart")
    means = sums / torch.from_numpy(counts).float()[:, None]
    return means[1] - means[0]


def save_direction(folder: Path, vector: Tensor, layer: int, model: str) -> None:
    """Write a vector, with the layer and the model that it is of."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"layer": str(layer), "model": model}
    save_file({"direction": vector.float().contiguous(), "layer": torch.tensor(layer)}, folder / FILE, metadata)


def load_direction(folder: str) -> tuple[Tensor, int]:
    """The vector in a folder, and its layer.

    Raises:
        OSError: there is none, or it is damaged.
    """
    path = Path(folder, FILE)
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    return found["direction"], int(found["layer"])


@contextmanager
def directed(model: PreTrainedModel, strengths: Mapping[str, float]) -> Iterator[None]:
    """Within, the states of layers of `model` are moved along directions, all tokens' alike.

    Args:
        model: the base model.
        strengths: by folder.

    Raises:
        ValueError: a direction of another width.
        OSError: one that cannot be read.
    """
    width = Backbone.of(model).output_embedding.shape[1]
    with ExitStack() as stack:
        for folder, strength in strengths.items():
            vector, layer = load_direction(folder)
            if vector.shape != (width,):
                raise ValueError(f"the direction {folder} has {vector.shape[0]} numbers, the model's states {width}")
            added = strength * vector.to(model.device)
            stack.callback(Backbone.of(model).layers[layer - 1].register_forward_hook(_adding(added)).remove)
        yield


def _adding(vector: Tensor):  # type: ignore[no-untyped-def]
    def hook(module: torch.nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        if isinstance(output, Tensor):
            return output + vector.to(output)
        return (output[0] + vector.to(output[0]), *output[1:])

    return hook
