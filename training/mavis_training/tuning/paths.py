"""Tuning on whole trees: the optimal policy of equation 1 from rollouts of the reference alone.

*Path consistency*: where pi is optimal, log pi / pi_ref = R / eta - log Z(x) for every answer to a prompt x, so that
over the answers of one tree eta log pi / pi_ref - R does not vary. Its variance is the loss (VarGrad; of pairs of
answers it would be REBEL, the squared cousin of DPO). *Pairs*: DPO itself (Rafailov et al., 2023), to which rewards
only say which of two answers is the better.

All answers of a tree are learned from at once: they share prefixes in one packed sequence, and log pi_ref is in the
tree already, so that the reference is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..fitting.policies import ratio_metrics, tree_logits
from ..trees.data import LabelledTree
from ..trees.packing import pack
from ..trees.tree import Tree
from .examples import ranked_pairs

Loss = Callable[[Tensor, Tensor, Tree, float], Tensor]  # of log pi / pi_ref, rewards [leaves], their tree, eta


class TreeTrainer(Trainer):
    """Tunes on trees; a batch is a list of them with the rewards of their answers.

    Args:
        loss: of one tree, `path_loss` or `pair_loss`.
        eta: of equation 1, the KL penalty.
        rest: of `Trainer`.
    """

    def __init__(self, *, loss: Loss, eta: float, **rest: Any) -> None:
        super().__init__(**rest)
        self.loss, self.eta = loss, eta

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the trees of their losses."""
        found = []
        for tree, rewards in inputs["trees"]:
            with self.accelerator.autocast():  # the decoder is read past the wrapped `forward`, which has it
                ratios = answer_ratios(model, tree)  # type: ignore[arg-type]
            found.append(self.loss(ratios, rewards, tree, self.eta))
        return torch.stack(found).mean()

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # trees, whose tensors are made where they are read


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of `tree_rows`."""
    return {"trees": [(row["tree"], row["rewards"]) for row in rows]}


def tree_rows(trees: Sequence[LabelledTree]) -> list[dict[str, Any]]:
    """Rows of a data set: trees, and the one reward [leaves] that they are labelled with."""
    return [{"tree": item.tree, "rewards": torch.from_numpy(item.rewards[:, 0]).float()} for item in trees]


def answer_ratios(model: PreTrainedModel, tree: Tree) -> Tensor:
    """log pi / pi_ref of every answer of a tree, [leaves], at temperature 1.

    Args:
        model: pi; with adapters or without.
        tree: of the reference.
    """
    layout, said = pack(tree), token_likelihoods(model, tree)
    node = torch.from_numpy(layout.node[layout.new]).to(said.device)
    own = said.new_zeros(len(tree)).index_add(0, node, said)
    own = own - torch.from_numpy(np.asarray(tree.logp_ref)).to(own)
    on_path = torch.from_numpy(layout.ancestry[tree.leaves()][:, :-1]).to(own)
    return on_path @ own


def token_likelihoods(model: PreTrainedModel, tree: Tree) -> Tensor:
    """log pi of every new token of a tree of N, [N] in packed order, at temperature 1."""
    layout = pack(tree)
    every = tree_logits(model, layout)
    logits = every[torch.from_numpy(layout.previous).to(every.device)].float()
    taken = torch.from_numpy(layout.input_ids[layout.new]).to(logits.device)
    return logits.gather(1, taken[:, None])[:, 0] - logits.logsumexp(dim=1)


@torch.inference_mode()
def policy_metrics(model: PeftModel, trees: Sequence[LabelledTree], objective: str, eta: float) -> dict[str, Any]:
    """What a tuned policy foresees of held-out trees: `ratio_metrics`.

    Args:
        model: an adapter on the reference.
        trees: of the reference, with the one reward in standard deviations.
        objective: its name.
        eta: of equation 1, that it was tuned with.
    """
    ratios = []
    for item in trees:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            said = token_likelihoods(model, item.tree)  # type: ignore[arg-type]
            with model.disable_adapter():
                said = said - token_likelihoods(model, item.tree)  # type: ignore[arg-type]
        ratios.append(eta * said.double().cpu().numpy()[:, None])
    return ratio_metrics(trees, ratios, [objective])


def pair_loss(ratios: Tensor, rewards: Tensor, tree: Tree, beta: float) -> Tensor:
    """DPO's loss, -log sigmoid(beta (log pi / pi_ref of the better - of the worse)), over pairs of a tree's answers.

    Args:
        ratios: log pi / pi_ref [leaves].
        rewards: [leaves]; the best is paired with the worst, the second with the second last, and so on.
        tree: that they are of.
        beta: of the KL penalty.
    """
    better, worse = zip(*ranked_pairs(rewards.numpy(force=True), len(rewards)), strict=True)
    margin = ratios[list(better)] - ratios[list(worse)]
    return -nn.functional.logsigmoid(beta * margin).mean()
