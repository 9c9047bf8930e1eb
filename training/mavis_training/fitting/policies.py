"""Value heads taught by tuned policies: what these make likelier at every state of stored trees, token by token.

A policy that was tuned with a KL penalty holds optimal soft values, log pi / pi_ref = Q / eta + c (equation 1), but
asking it takes a forward pass a token. Over a stored tree one pass tells what it says at all states, of as many tokens
as are wanted, where a reward is one number for a whole answer: a head learns in minutes to say the same from the base
model's own state, and steers at plain speed. The rewards of the trees can teach it beside the policies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from mavis_logits.backbone import Backbone
from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_policy import ValuePolicy

from ..trees.data import LabelledTree
from ..trees.packing import Layout, pack, packed_inputs
from ..trees.tree import Tree
from .efficiency import leaf_shares
from .head_fitting import minimise, steps_of
from .metrics import Prediction, validation_metrics
from .paths import path_loss

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


@dataclass(frozen=True)
class Answers:
    """The answers of a tree of N new tokens, over the states of a `Taught`.

    Attributes:
        states: numbers of the first of the tree's states, and of the one behind its last.
        at: `[N]`, at which of the tree's states each token was chosen.
        slot: `[N]`, which of the k tokens of `Taught.tokens` it is; k for all others.
        on_path: float32 `[leaves, N]`, 1 for the tokens of each answer.
        rewards: float32 `[leaves, M]`, in standard deviations.
        tree: it.
    """

    states: tuple[int, int]
    at: Tensor
    slot: Tensor
    on_path: Tensor
    rewards: Tensor
    tree: Tree


def tree_logits(model: PreTrainedModel, layout: Layout) -> Tensor:
    """Logits after every token of a packed tree, `[P + N, V]`; gradients flow.

    A model that cannot read a packed tree reads it path by path.
    """
    backbone = Backbone.of(model)

    def read(**inputs: Tensor) -> Tensor:
        return backbone.logits(**send_to_device(inputs, model.device), use_cache=False, every=True)[0]

    if backbone.trees.kind == "packed" and backbone.why_not_handed_on(model.device) is None:
        return read(**packed_inputs([layout], backbone.windows, backbone.decoder.dtype))
    ids = torch.from_numpy(layout.input_ids)
    return layout.by_path(lambda where: read(input_ids=ids[where][None]))


def likelihoods(model: PreTrainedModel, layout: Layout) -> Tensor:
    """log pi over the vocabulary after every token that a new token follows (`Layout.before`), float32 `[S, V]`."""
    every = tree_logits(model, layout)
    return every[torch.from_numpy(layout.before()).to(every.device)].float().log_softmax(dim=-1)


@torch.inference_mode()
def said_by_policies(
    tree: Tree, base: PreTrainedModel, policies: Mapping[str, ValuePolicy], count: int
) -> dict[str, Tensor]:
    """`tokens`, `reference` and `ratios` of a tree, as `Taught` has them, of the tokens likeliest to all on average."""
    layout = pack(tree)
    reference = likelihoods(base, layout)
    tuned = [likelihoods(policy.backbone, layout) for policy in policies.values()]
    total = reference.exp()
    for one in tuned:
        total += one.exp()
    tokens = total.topk(min(count, total.shape[1]), dim=1).indices
    said = reference.gather(1, tokens)
    ratios = torch.stack([one.gather(1, tokens) - said for one in tuned], dim=2)
    return {"tokens": tokens.int().cpu(), "reference": said.half().cpu(), "ratios": ratios.half().cpu()}


def gather_taught(parts: Sequence[tuple[Tree, Tensor, Mapping[str, Tensor]]]) -> Taught:
    """All states of some trees: each with the states `[P + N, d]` that the head reads, and `said_by_policies`."""
    at, offset = [], 0
    for tree, states, _ in parts:
        at.append(torch.from_numpy(pack(tree).before()) + offset)
        offset += len(states)
    said = {name: torch.cat([own[name] for _, _, own in parts]) for name in ("tokens", "reference", "ratios")}
    return Taught(torch.cat([states for _, states, _ in parts]), torch.cat(at), **said)


def taught_loss(head: ValueHead, taught: Taught, rows: Tensor) -> Tensor:
    """KL divergence of each policy from the reference tilted by the head, averaged over the states `rows` and policies.

    Tokens other than the k are left alone by the head, and one to the policies.
    """
    return _divergence(taught, rows, _tilted(head, taught, rows))


def _divergence(taught: Taught, rows: Tensor, said: Tensor) -> Tensor:
    """KL divergence of the policies from `said`, log-probabilities `[n, k + 1, M or 1]`, averaged."""
    wanted = _whole(_plain(taught, rows) + taught.ratios[rows].float()).to(said.device)
    return (wanted.exp() * (wanted - said)).sum(dim=1).mean()


def _tilted(head: ValueHead, taught: Taught, rows: Tensor) -> Tensor:
    """log of pi_ref exp(values), normalised: `[n, k + 1, M]`, all other tokens last, which have no value."""
    hidden = taught.states[taught.at[rows]].to(head.device).float()
    values = head(hidden, taught.tokens[rows].long().to(head.device))
    reference = _whole(_plain(taught, rows)).to(head.device)
    return (reference + nn.functional.pad(values, (0, 0, 0, 1))).log_softmax(dim=1)


def _plain(taught: Taught, rows: Tensor) -> Tensor:
    """log pi_ref of the k tokens, float32 `[n, k, 1]`."""
    return taught.reference[rows].float()[:, :, None]


def _whole(said: Tensor) -> Tensor:
    """log-probabilities `[n, k, ...]` with what they leave to all other tokens behind them, `[n, k + 1, ...]`."""
    rest = (1 - said.exp().sum(dim=1, keepdim=True)).clamp(min=1e-6).log()
    return torch.cat([said, rest], dim=1).log_softmax(dim=1)


def answers_of(taught: Taught, trees: Sequence[LabelledTree], deviations: NDArray[np.float64]) -> list[Answers]:
    """The answers of the trees that `taught` has the states of, in their order; rewards over `deviations` `[M]`."""
    found, first = [], 0
    for item in trees:
        tree, layout = item.tree, pack(item.tree)
        at, slot = _chosen_at(taught, first, layout)
        on_path = torch.from_numpy(layout.ancestry[tree.leaves()][:, layout.node[layout.new]]).float()
        rewards = torch.from_numpy(item.rewards / deviations).float()
        last = first + len(layout.before())
        found.append(Answers((first, last), at, slot, on_path, rewards, tree))
        first = last
    return found


def _chosen_at(taught: Taught, first: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """For every new token of a tree, `[N]` both: the state, of the tree's, that it was chosen at, and which of the k
    tokens it is; k for all others. The tree's states are `taught`'s from `first` on."""
    at = torch.from_numpy(np.searchsorted(layout.before(), layout.previous))
    same = taught.tokens[first + at] == torch.from_numpy(layout.input_ids[layout.new])[:, None]
    return at, torch.where(same.any(dim=1), same.int().argmax(dim=1), same.shape[1])


def rewarded_loss(head: ValueHead, taught: Taught, answers: Sequence[Answers], etas: Tensor, share: float) -> Tensor:
    """`taught_loss` summed over an answer, and `share` times path consistency with the rewards themselves.

    A teacher's adapter has seen some rewards and says what it makes of them at every token without noise; the rewards
    of all trees are noisy, and are the thing itself. The head is a policy like its teachers, of the same eta.

    Args:
        head: in nats.
        taught: of some trees.
        answers: of a few of these trees.
        etas: of the teachers, `[M]` (equation 1), for rewards in standard deviations.
        share: of the rewards.
    """
    rows = torch.cat([torch.arange(*own.states) for own in answers])
    tilted = _tilted(head, taught, rows)
    made_likelier = tilted - _whole(_plain(taught, rows)).to(tilted)
    of_trees = made_likelier.split([last - first for first, last in (own.states for own in answers)])
    missed = [
        path_loss(own.on_path.to(said) @ said[own.at, own.slot], own.rewards, own.tree, etas.to(said))
        for own, said in zip(answers, of_trees, strict=True)
    ]
    tokens = len(rows) / sum(len(own.on_path) for own in answers)
    return tokens * _divergence(taught, rows, tilted) + share * torch.stack(missed).mean()


def fit_taught(head: ValueHead, training: Taught, validation: Taught, config: TrainHeadConfig) -> list[float]:
    """Minimise `taught_loss` over minibatches of states; as `minimise`."""
    return minimise(
        head, len(training), config.batch_size, lambda rows: taught_loss(head, training, rows),
        lambda: mean_taught_loss(head, validation, config.batch_size), config, "head", "states",
    )  # fmt: skip


def fit_rewarded(
    head: ValueHead,
    taught: Sequence[tuple[Taught, Sequence[Answers]]],
    etas: Tensor,
    config: TrainHeadConfig,
) -> tuple[list[float], int]:
    """Minimise `rewarded_loss` over minibatches of trees of about `config.batch_size` states; as `minimise`, and the
    steps that all epochs take.

    Args:
        head: what to train.
        taught: what there is of the training and of the validation trees.
        etas: of the teachers.
        config: how.
    """
    (training, trees), (validation, held_out) = taught
    each = max(1, round(config.batch_size * len(trees) / len(training)))  # trees of a step

    def loss(kept: Taught, chosen: Sequence[Answers]) -> Tensor:
        return rewarded_loss(head, kept, chosen, etas, config.reward_share)

    @torch.inference_mode()
    def mean() -> float:
        head.eval()
        parts = [held_out[i : i + each] for i in range(0, len(held_out), each)]
        return sum(float(loss(validation, part)) * len(part) for part in parts) / len(held_out)

    history = minimise(
        head, len(trees), each, lambda rows: loss(training, [trees[i] for i in rows]), mean, config, "head", "trees"
    )
    return history, steps_of(config, len(trees), each)


@torch.inference_mode()
def mean_taught_loss(head: ValueHead | None, taught: Taught, batch_size: int) -> float:
    """The loss over all states, without dropout; None: that of values that say nothing."""
    total = 0.0
    for rows in torch.arange(len(taught)).split(batch_size):
        said = _whole(_plain(taught, rows)) if head is None else _tilted(head.eval(), taught, rows)
        total += float(_divergence(taught, rows, said)) * len(rows)
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
    taught = gather_taught([(tree, states, said)])
    every = torch.arange(len(taught))
    ratios = _tilted(head.eval(), taught, every).cpu() - _whole(_plain(taught, every))
    return ratios[_chosen_at(taught, 0, pack(tree))].double().numpy()


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
