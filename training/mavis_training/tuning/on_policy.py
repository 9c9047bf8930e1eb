"""Path consistency over answers that the policy samples itself, anew at every step: reinforcement learning on trees.

Over answers of pi itself, the gradient of the variance of eta log pi / pi_ref - R is 2 eta (K - 1) / K times that of
RLOO (Ahmadian et al., 2024), K answers to a prompt being compared, with R - eta log pi / pi_ref for the reward: the
objective of equation 1. (Richter et al., 2020, have shown it of this loss, VarGrad.) So it learns where the policy is,
which the reference's own trees hardly reach, and spends on it what trees cost: the prompt and what answers begin alike
are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.prompts import encode_prompts
from ..label import label_trees
from ..rewards.load import load_reward
from ..rivals.adapters import merged
from ..sampling.config import CollectConfig
from ..sampling.reference import eos_token_ids
from ..sampling.rollout import sample_trees
from ..trees.data import LabelledTree
from ..trees.packing import pack
from ..trees.targets import node_targets
from ..trees.tree import Tree
from .examples import combined_item
from .paths import TreeTrainer, token_likelihoods, tree_rows

if TYPE_CHECKING:
    from .config import TuneConfig

_LONGEST_PROMPT = 512
Label = Callable[[list[Tree]], list[LabelledTree]]  # with the one weighted reward, in standard deviations


class OnPolicyTrainer(TreeTrainer):
    """Tunes on trees that it samples from the policy as it is; a batch is a list of prompt rows.

    Args:
        sample: trees of some rows, by a seed, from a model.
        label: what these are worth.
        rest: of `TreeTrainer`.
    """

    def __init__(self, *, sample: Callable[..., list[Tree]], label: Label, **rest: Any) -> None:
        super().__init__(**rest)
        self.sample, self.label = sample, label
        self.said: dict[str, list[float]] = {"reward": [], "kl": []}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One step on fresh answers; gradients tree by tree, so that memory holds one."""
        policy = self.accelerator.unwrap_model(model)
        seed = (self.args.seed * 1_000_003 + self.state.global_step) * self.args.world_size + self.args.process_index
        policy.eval()
        with merged(policy) as plain:
            trees = self.sample(plain, inputs["rows"], seed)
        with torch.no_grad(), self.accelerator.autocast(), policy.disable_adapter():
            trees = [by_reference(policy, tree) for tree in trees]
        labelled = self.label(trees)
        for item in labelled:
            self.said["reward"].append(float(item.rewards.mean()))
            self.said["kl"].append(float((item.tree.logp_gen - item.tree.logp_ref).mean()))  # one node an answer
        self.state.num_input_tokens_seen += sum(len(tree.tokens) for tree in trees)  # goes into checkpoints
        losses = []
        for row in tree_rows(labelled):
            step = {"trees": [(row["tree"], row["rewards"])], "share": 1 / len(trees)}
            losses.append(super().training_step(model, step, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """A tree's share of the step's mean."""
        return inputs["share"] * super().compute_loss(model, inputs)

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """With the mean reward, and the KL divergence by log pi / pi_ref of the answers (nats), since the last time."""
        logs = logs | {name: round(float(np.mean(values)), 4) for name, values in self.said.items() if values}
        self.said = {name: [] for name in self.said}
        super().log(logs, *rest, **named)


def sampler(
    config: TuneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> Callable[..., list[Tree]]:
    """(model, prompt rows, seed) -> their trees, of `generations` answers from the root each.

    Raises:
        ValueError: a prompt of no tokens, or of too many.
    """
    ids = encode_prompts(rows, tokenizer, _LONGEST_PROMPT, config.chat_template)
    tokens = {row["id"]: own for row, own in zip(rows, ids, strict=True)}
    eos = eos_token_ids(model.generation_config, tokenizer)
    shape = CollectConfig(
        str(config.prompts), "", max_new_tokens=config.max_new_tokens, layers=1, root_children=config.generations,
        two_layers=False,
    )  # fmt: skip

    def sample(policy: PreTrainedModel, some: Sequence[dict[str, Any]], seed: int) -> list[Tree]:
        prompts = [tokens[row["id"]] for row in some]
        return sample_trees(policy, some, prompts, eos, shape, seed, config.temperature)

    return sample


def labeller(config: TuneConfig, tokenizer: PreTrainedTokenizerBase, deviations: Mapping[str, float]) -> Label:
    """What gives trees the weighted reward of each of their answers.

    Raises:
        ValueError, OSError: as `mavis label`.
    """
    rewards = {name: load_reward(config.rewards[name], config.device or "cpu") for name in config.weights}

    def label(trees: list[Tree]) -> list[LabelledTree]:
        found = [label_trees(trees, reward, name, tokenizer) for name, reward in rewards.items()]
        every: list[NDArray[np.float64]] = [np.stack(own, axis=1) for own in zip(*found, strict=True)]
        items = [LabelledTree(tree, own, node_targets(tree, own)) for tree, own in zip(trees, every, strict=True)]
        return [combined_item(item, config.weights, deviations) for item in items]

    return label


def by_reference(model: PreTrainedModel, tree: Tree) -> Tree:
    """The tree with log pi_ref as `model` has it."""
    layout, said = pack(tree), token_likelihoods(model, tree)
    sums = said.new_zeros(len(tree)).index_add(0, torch.from_numpy(layout.node[layout.new]).to(said.device), said)
    tree.logp_ref = sums.double().numpy(force=True)
    return tree


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of prompt rows."""
    return {"rows": list(rows)}
