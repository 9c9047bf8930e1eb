"""Value heads taught by tuned policies: what these make likelier at every state of stored trees, token by token.

A policy that was tuned with a KL penalty holds optimal soft values, log pi / pi_ref = Q / eta + c (equation 1), but
asking it takes a forward pass a token. Over a stored tree one pass tells what it says at all states, of as many tokens
as are wanted, where a reward is one number for a whole answer: a head learns in minutes to say the same from the base
model's own state, and steers at plain speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from mavis_logits.backbone import Backbone
from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_policy import ValuePolicy

from ..trees.data import LabelledTree
from ..trees.packing import Layout, pack, packed_inputs
from ..trees.tree import Tree
from .efficiency import leaf_shares
from .head_fitting import minimise
from .metrics import Prediction, validation_metrics

if TYPE_CHECKING:
    from .head_config import TrainHeadConfig


@dataclass(frozen=True)
class Taught:
    """S states, the k tokens that are likeliest at each, and what M policies say of these.

    Attributes:
        states: bfloat16 `[S', d]`, that the head reads, of all tokens of all trees.
        at: `[S]`, which of them each is.
        tokens: int32 `[S, k]`.
        reference: float16 `[S, k]`, log pi_ref of these.
        ratios: float16 `[S, k, M]`, log pi / pi_ref.
    """

    states: Tensor
    at: Tensor
    tokens: Tensor
    reference: Tensor
    ratios: Tensor

    def __len__(self) -> int:
        return len(self.at)


def likelihoods(model: PreTrainedModel, layout: Layout) -> Tensor:
    """log pi over the vocabulary after every token of a packed tree that a new token follows, `[S, V]` in float32.

    They are in packed order; `numpy.unique(layout.previous)` says which tokens.
    """
    backbone = Backbone.of(model)
    inputs = send_to_device(packed_inputs([layout], backbone.windows, backbone.decoder.dtype), model.device)
    every = backbone.logits(**inputs, use_cache=False, every=True)[0]
    where = torch.from_numpy(np.unique(layout.previous)).to(every.device)
    return every[where].float().log_softmax(dim=-1)


@torch.inference_mode()
def said_by_policies(
    tree: Tree, base: PreTrainedModel, policies: Mapping[str, ValuePolicy], count: int
) -> dict[str, Tensor]:
    """`tokens`, `reference` and `ratios` of a tree, as `Taught` has them, of the tokens likeliest to all on average."""
    layout = pack(tree)
    reference = likelihoods(base, layout)
    tuned = [likelihoods(policy.backbone, layout) for policy in policies.values()]
    mean = torch.stack([reference, *tuned]).exp_().mean(dim=0) if tuned else reference
    tokens = mean.topk(min(count, mean.shape[1]), dim=1).indices
    said = reference.gather(1, tokens)
    ratios = torch.stack([one.gather(1, tokens) - said for one in tuned], dim=2)
    return {"tokens": tokens.int().cpu(), "reference": said.half().cpu(), "ratios": ratios.half().cpu()}


def gather_taught(parts: Sequence[tuple[Tree, Tensor, Mapping[str, Tensor]]]) -> Taught:
    """All states of some trees: each with the states `[P + N, d]` that the head reads, and `said_by_policies`."""
    at, offset = [], 0
    for tree, states, _ in parts:
        at.append(torch.from_numpy(np.unique(pack(tree).previous)) + offset)
        offset += len(states)
    said = {name: torch.cat([own[name] for _, _, own in parts]) for name in ("tokens", "reference", "ratios")}
    return Taught(torch.cat([states for _, states, _ in parts]), torch.cat(at), **said)


def taught_loss(head: ValueHead, taught: Taught, rows: Tensor) -> Tensor:
    """KL divergence of each policy from the reference tilted by the head, averaged over the states `rows` and policies.

    Tokens other than the k are left alone by the head, and one to the policies.
    """
    tilted, wanted = _tilted(head, taught, rows), _wanted(taught, rows, head.device)
    return (wanted.exp() * (wanted - tilted)).sum(dim=1).mean()


def _tilted(head: ValueHead, taught: Taught, rows: Tensor) -> Tensor:
    """log of pi_ref exp(values), normalised: `[n, k + 1, M]`, all other tokens last."""
    hidden = taught.states[taught.at[rows]].to(head.device).float()
    values = head(hidden, taught.tokens[rows].long().to(head.device))
    reference = taught.reference[rows].float().to(head.device)
    rest = _rest(reference)[:, None, None].expand(-1, 1, values.shape[2])
    return torch.cat([reference[:, :, None] + values, rest], dim=1).log_softmax(dim=1)


def _wanted(taught: Taught, rows: Tensor, device: torch.device) -> Tensor:
    """log pi of every policy, likewise."""
    said = (taught.reference[rows].float()[:, :, None] + taught.ratios[rows].float()).to(device)
    return torch.cat([said, _rest(said)[:, None]], dim=1).log_softmax(dim=1)


def _rest(said: Tensor) -> Tensor:
    """log of what the second dimension's probabilities leave to other tokens."""
    return (1 - said.exp().sum(dim=1)).clamp(min=1e-6).log()


def fit_taught(head: ValueHead, training: Taught, validation: Taught, config: TrainHeadConfig) -> list[float]:
    """Minimise `taught_loss` over minibatches of states; as `minimise`."""
    return minimise(
        head, len(training), config.batch_size, lambda rows: taught_loss(head, training, rows),
        lambda: mean_taught_loss(head, validation, config.batch_size), config, "head", "states",
    )  # fmt: skip


@torch.inference_mode()
def mean_taught_loss(head: ValueHead | None, taught: Taught, batch_size: int) -> float:
    """The loss over all states, without dropout; None: that of values that say nothing."""
    total = 0.0
    for rows in torch.arange(len(taught)).split(batch_size):
        if head is None:
            wanted, reference = _wanted(taught, rows, torch.device("cpu")), taught.reference[rows].float()
            said = torch.cat([reference, _rest(reference)[:, None]], dim=1).log_softmax(dim=1)[:, :, None]
            total += float((wanted.exp() * (wanted - said)).sum(dim=1).mean()) * len(rows)
        else:
            total += float(taught_loss(head.eval(), taught, rows)) * len(rows)
    return total / len(taught)


@torch.inference_mode()
def head_ratios(head: ValueHead, tree: Tree, states: Tensor, said: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """log pi / pi_ref of every new token of a tree, `[N, M]` in packed order; pi is the reference tilted by the head.

    Args:
        head: in nats.
        tree: of N new tokens.
        states: `[P + N, d]`, that the head reads.
        said: of `said_by_policies`.
    """
    layout, taught = pack(tree), gather_taught([(tree, states, said)])
    every, previous = torch.arange(len(taught)), np.unique(layout.previous)
    reference = taught.reference.float()
    plain = torch.cat([reference, _rest(reference)[:, None]], dim=1).log_softmax(dim=1)[:, :, None]
    ratios = _tilted(head.eval(), taught, every).cpu() - plain
    row = torch.from_numpy(np.searchsorted(previous, layout.previous))
    same = taught.tokens[row] == torch.from_numpy(layout.input_ids[layout.new])[:, None]
    slot = torch.where(same.any(dim=1), same.int().argmax(dim=1), taught.tokens.shape[1])  # the last: all others
    return ratios[row, slot].double().numpy()


def ratio_metrics(
    trees: Sequence[LabelledTree], ratios: Sequence[NDArray[np.float64]], objectives: Sequence[str]
) -> dict[str, Any]:
    """`validation_metrics` of what was made likelier up to every token of held-out trees.

    Ratios tell answers to a prompt from each other, not prompts: rewards and what is said of them are both taken less
    their means over the answers to a prompt, so that R2 is the share of the variance *within* prompts.

    Args:
        trees: of the reference, their rewards in standard deviations.
        ratios: per tree, eta log pi / pi_ref of every new token, `[N, M]` in packed order.
        objectives: names of the M rewards.
    """
    predictions = []
    for item, own in zip(trees, ratios, strict=True):
        tree = item.tree
        starts, ends = tree.offsets(), tree.offsets() + tree.length
        along = np.zeros_like(own)
        for node, parent in enumerate(tree.parent):  # parents come first
            before = along[ends[parent] - 1] if parent >= 0 else 0.0
            along[starts[node] : ends[node]] = before + np.cumsum(own[starts[node] : ends[node]], axis=0)
        leaves, share = tree.leaves(), leaf_shares(tree)
        level, mean = share @ along[ends[leaves] - 1], share @ item.rewards
        centred = LabelledTree(tree, item.rewards - mean, item.targets - mean)
        predictions.append(Prediction(centred, along - level, None))
    return validation_metrics(predictions, objectives)
