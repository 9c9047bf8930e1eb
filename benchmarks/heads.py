"""A study of value heads: variants trained on one tree store and compared, on held-out trees, at equal KL divergence.

    python benchmarks/heads.py --store runs/smollm2/trees --states runs/smollm2/states --folds 0 1 2

Every run (a variant on a fold) is kept in `docs/results/heads.json`, and a table in `heads.md`, as soon as it is done;
a rerun makes only those that are missing there. Fold f holds out the quarter of the prompts whose hash is f modulo 4.
Variants that did not earn a place in the package are the small subclasses below.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mavis_logits.backbone import Backbone
from mavis_logits.models import load_chat_model
from mavis_logits.values.value_head import ValueHead, ValueHeadConfig
from mavis_training.base.files import read_json, write_json
from mavis_training.fitting.efficiency import baselines, sample_actions, steering_efficiency, steering_parts
from mavis_training.fitting.head_fitting import Samples, StateValue, bootstrapped, fit, gather, sample_loss
from mavis_training.fitting.metrics import validation_metrics
from mavis_training.fitting.states import compute_states, read_states
from mavis_training.train_head import TrainHeadConfig, predict
from mavis_training.trees.data import LabelledTree, load_trees, reward_units
from mavis_training.trees.packing import pack, packed_inputs
from mavis_training.trees.targets import stable_hash

LAST = -1  # layer
ACTIONS = 8  # of the reference per state, in `steering_efficiency`


class Dueling(ValueHead):
    """V(s) + A(s, a), two networks; each is fitted to what is left of the reward."""

    def __init__(self, config: ValueHeadConfig) -> None:
        super().__init__(config)
        self.value = StateValue(config)

    def forward(self, hidden: Tensor, candidates: Tensor | None = None) -> Tensor:
        value = self.value(hidden)[:, None]
        if self.training:  # the advantage learns beside a value that learns from the reward alone
            value = value.detach()
        return value + super().forward(hidden, candidates) - self.config.reward_units(hidden.device)[0]

    def loss(self, samples: Samples, rows: Tensor) -> Tensor:
        hidden = samples.states[samples.before[rows]].float()
        _, scale = self.config.reward_units(hidden.device)
        error = (self.value(hidden) - samples.targets[rows]) / scale
        return sample_loss(self, samples, rows) + (error.square().mean() if self.training else 0.0)


class Factorised(ValueHead):
    """V(s) + u(h) . g(e_a): one matrix product scores the whole vocabulary."""

    rank = 64

    def __init__(self, config: ValueHeadConfig) -> None:
        super().__init__(config)
        self.value = StateValue(config)
        self.state = nn.Linear(config.hidden_size, self.rank * len(config.objectives))
        self.action = nn.Linear(config.embedding_size, self.rank, bias=False)
        nn.init.zeros_(self.state.weight)

    def forward(self, hidden: Tensor, candidates: Tensor | None = None) -> Tensor:
        normal = [nn.functional.layer_norm(x, x.shape[-1:]) for x in (hidden, self._embedding[0][candidates].float())]
        state = self.state(self.dropout(normal[0])).view(len(hidden), -1, self.rank)
        product = torch.einsum("smr,skr->skm", state, self.action(normal[1])) / self.rank**0.5
        return self.value(hidden)[:, None] + self.config.reward_units(hidden.device)[1] * product


class Ensemble(ValueHead):
    """Three heads that learn apart, from different beginnings and dropout, and are averaged."""

    def __init__(self, config: ValueHeadConfig) -> None:
        super().__init__(config)
        self.others = nn.ModuleList(ValueHead(config) for _ in range(2))

    def bind(self, model: Any, check: bool = True) -> ValueHead:
        for other in self.others:
            other.bind(model, check=False)
        return super().bind(model, check)

    def each(self, hidden: Tensor, candidates: Tensor | None) -> Tensor:
        """What every head says, `[3, R, k, M]`."""
        return torch.stack([super().forward(hidden, candidates), *(other(hidden, candidates) for other in self.others)])

    def forward(self, hidden: Tensor, candidates: Tensor | None = None) -> Tensor:
        return self.each(hidden, candidates).mean(dim=0)

    def loss(self, samples: Samples, rows: Tensor) -> Tensor:
        if not self.training:
            return sample_loss(self, samples, rows)
        said = self.each(samples.states[samples.before[rows]].float(), samples.tokens[rows][:, None])[:, :, 0]
        _, scale = self.config.reward_units(self.device)
        return ((said - samples.targets[rows]) / scale).square().mean(dim=(1, 2)).sum()


class Ranking(ValueHead):
    """Beside regression, which of two siblings has the higher value: Bradley-Terry at the states where trees branch."""

    pairs_per_step = 256

    def loss(self, samples: Samples, rows: Tensor) -> Tensor:
        regression = sample_loss(self, samples, rows)
        if not self.training:
            return regression
        first, second = self._pairs(samples)
        drawn = torch.randint(len(first), (self.pairs_per_step,))
        first, second = first[drawn], second[drawn]
        _, scale = self.config.reward_units(self.device)
        tokens = torch.stack([samples.tokens[first], samples.tokens[second]], dim=1)
        said = self(samples.states[samples.before[first]].float(), tokens) / scale
        higher = torch.sign(samples.targets[first] - samples.targets[second])
        return regression + 0.1 * nn.functional.softplus(-higher * (said[:, 0] - said[:, 1])).mean()

    def _pairs(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Samples of the same state but different tokens, each with the next one of that state."""
        if not hasattr(self, "_found"):
            order = torch.argsort(samples.before, stable=True)
            first, second = order[:-1], order[1:]
            same = samples.before[first] == samples.before[second]
            same &= samples.tokens[first] != samples.tokens[second]
            self._found = first[same], second[same]
        return self._found


class Advantage(ValueHead):
    """Learns how values differ within a step and nothing else.

    With A = Q(s, a) - E Q(s, .), the expectation over actions of the reference, E (R - b) A is the covariance of A
    with the true advantage for every baseline b that does not depend on the action. So E (A^2 - 2 (R - b) A) is least
    where A is the true advantage, and what depends on the prompt alone, most of a reward's variance, is not learnt.
    """

    centred = True
    actions: Tensor  # [S', J] of the reference at every state of the samples in use

    def loss(self, samples: Samples, rows: Tensor) -> Tensor:
        before = samples.before[rows]
        drawn = samples.actions[before].long()  # type: ignore[attr-defined]
        tokens = torch.cat([samples.tokens[rows][:, None], drawn], dim=1)
        _, scale = self.config.reward_units(self.device)
        said = self(samples.states[before].float(), tokens) / scale
        advantage, variance = said[:, 0] - said[:, 1:].mean(dim=1), said[:, 1:].var(dim=1)
        return (variance - 2 * samples.targets[rows] / scale * advantage).mean()


class TwoStates(ValueHead):
    """Reads the states of two layers, one after the other."""

    def __init__(self, config: ValueHeadConfig) -> None:
        config.hidden_size *= 2
        super().__init__(config)


@dataclass(frozen=True)
class ActionSamples(Samples):
    """Samples with actions of the reference, `[S', J]`, at every state."""

    actions: Tensor


@dataclass(frozen=True)
class Variant:
    """What differs from the base line: settings of `TrainHeadConfig`, the kind of head, the share of the prompts, and
    after which decoder layers the states are taken (the last is what enters the output embedding)."""

    settings: dict[str, Any] = field(default_factory=dict)
    kind: type[ValueHead] = ValueHead
    prompts: float = 1.0
    layers: tuple[int, ...] = (LAST,)


BASE = {"dropout": 0.1, "bootstrap": 0.0, "weight_decay": 0.05}
REGULARISED = {"dropout": 0.5, "weight_decay": 1.0}
VARIANTS = {
    "base line": Variant(),
    "six passes": Variant({"epochs": 6}),
    "regularised": Variant(REGULARISED),
    "bootstrap 0.5": Variant({"bootstrap": 0.5}),
    "bootstrap 1": Variant({"bootstrap": 1.0}),
    "bootstrap 0.5, regularised": Variant(REGULARISED | {"bootstrap": 0.5}),
    "width 128": Variant({"width": 128}),
    "two layers": Variant({"num_layers": 2}),
    "value and advantage apart": Variant(kind=Dueling),
    "factorised": Variant(kind=Factorised),
    "three heads averaged": Variant(kind=Ensemble),
    "three heads averaged, regularised": Variant(REGULARISED, kind=Ensemble),
    "ranking of siblings": Variant(kind=Ranking),
    "advantage": Variant(kind=Advantage),
    "advantage, regularised": Variant(REGULARISED, kind=Advantage),
    "advantage, bootstrap 0.5": Variant({"bootstrap": 0.5}, kind=Advantage),
    "states of layer 5": Variant(layers=(5,)),
    "states of layer 10": Variant(layers=(10,)),
    "states of layer 15": Variant(layers=(15,)),
    "states of layer 20": Variant(layers=(20,)),
    "states of layers 20 and 30": Variant(kind=TwoStates, layers=(20, LAST)),
    "states of layer 10, bootstrap 0.5, regularised": Variant(REGULARISED | {"bootstrap": 0.5}, layers=(10,)),
    "half of the prompts": Variant(prompts=0.5),
    "a quarter of the prompts": Variant(prompts=0.25),
}


@dataclass
class Data:
    """All trees, with the states, by layer, and the drawn actions of each."""

    model: Any
    trees: list[LabelledTree]
    states: dict[int, list[Tensor]]
    actions: list[Tensor]

    def states_after(self, layers: Sequence[int]) -> list[Tensor]:
        """Per tree, `[P + N, d]`, or the states of several layers side by side, each of them normalised."""
        if len(layers) == 1:
            return self.states[layers[0]]
        normal = ([nn.functional.layer_norm(x.float(), x.shape[-1:]) for x in self.states[layer]] for layer in layers)
        return [torch.cat(of_layers, dim=1).bfloat16() for of_layers in zip(*normal, strict=True)]


def read_data(arguments: argparse.Namespace) -> Data:
    """Trees, states of all layers that a variant asks for, and actions of the reference at each of them."""
    stores, trees = load_trees(arguments.store, arguments.objectives, 0.0)
    model = load_chat_model(arguments.model, torch.bfloat16)[0]
    states = []
    for store, folder in zip(stores, arguments.states, strict=True):
        compute_states(store, model, folder)
        states += read_states(store, folder)
    embedding, generator = Backbone.of(model).output_embedding, torch.Generator()
    actions = [
        sample_actions(embedding, tensor, ACTIONS, generator.manual_seed(i))
        for i, tensor in enumerate(tqdm(states, desc="actions of the reference", unit="tree"))
    ]
    inner = sorted({layer for name in arguments.variants for layer in VARIANTS[name].layers} - {LAST})
    return Data(model, trees, {LAST: states} | inner_states(model, trees, inner), actions)


@torch.inference_mode()
def inner_states(model: Any, trees: list[LabelledTree], layers: list[int]) -> dict[int, list[Tensor]]:
    """States after some decoder layers, bfloat16 `[P + N, d]` per tree."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for item in tqdm(trees if layers else [], desc="inner states", unit="tree"):
        backbone = Backbone.of(model)
        inputs = packed_inputs([pack(item.tree)], backbone.windows, model.dtype)
        states = backbone.decoder(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        for layer in layers:
            found[layer].append(states[layer][0].bfloat16())
    return found


def fold_of(item: LabelledTree) -> int:
    """The fold in which a tree is held out; 3 is never asked for by default."""
    return stable_hash(f"fold/{item.tree.prompt_id}") % 4


def run(data: Data, variant: Variant, fold: int, objectives: list[str]) -> dict[str, Any]:
    """Train one variant on all folds but one, and measure it on that one."""
    torch.manual_seed(fold)
    started = time.process_time()
    config = TrainHeadConfig("store", objectives, "output", epochs=2, drop_leaves=0.0, seed=fold, device="cpu")
    config = TrainHeadConfig(**{**asdict(config), **BASE, **variant.settings})
    states = data.states_after(variant.layers)
    index = range(len(data.trees))
    held_out = [i for i in index if fold_of(data.trees[i]) == fold]
    training = [i for i in index if fold_of(data.trees[i]) != fold and _share(data.trees[i]) < variant.prompts]
    centred = getattr(variant.kind, "centred", False)
    samples, validation = (_samples(data, states, part, centred) for part in (training, held_out))
    head = variant.kind.for_model(data.model, objectives, config.width, config.num_layers, config.dropout).float()
    mean, scale = reward_units([data.trees[i] for i in training])
    head.config.reward_mean, head.config.reward_scale = mean.tolist(), scale.tolist()
    if config.bootstrap:
        samples = bootstrapped(head, samples, validation, config)
    history = fit(head, samples, validation, config, getattr(variant.kind, "loss", sample_loss), "head")
    seconds = time.process_time() - started
    parts = [steering_parts(head, data.trees[i], states[i], data.actions[i]) for i in held_out]
    efficiency = steering_efficiency(parts, [data.trees[i].rewards for i in held_out], objectives)
    metrics = validation_metrics([predict(head, data.trees[i], states[i]) for i in held_out], objectives)
    return {
        "objectives": {name: efficiency[name] | metrics[name] for name in objectives},
        "validation_loss_by_epoch": history,
        "cpu_seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in head.parameters()),
        "trees": [len(training), len(held_out)],
        "settings": variant.settings
        | {"prompts": variant.prompts, "kind": variant.kind.__name__, "layers": variant.layers},
        "made": f"{platform.machine()}, torch {version('torch')}, {datetime.now(UTC):%Y-%m-%d}",
    }


def _samples(data: Data, states: list[Tensor], part: Sequence[int], centred: bool) -> ActionSamples:
    """Samples of some trees; with `centred`, their targets less the mean reward of the prompt's other branches."""
    trees = [data.trees[i] for i in part]
    if centred:
        trees = [replace(item, targets=item.targets - _baselines(item)) for item in trees]
    kept = [np.ones(len(item.tree), dtype=bool) for item in trees]
    samples = gather(list(zip(trees, kept, [states[i] for i in part], strict=True)))
    return ActionSamples(**vars(samples), actions=torch.cat([data.actions[i] for i in part]))


def _baselines(item: LabelledTree) -> np.ndarray:
    """`baselines` of every node: all leaves under one child of the prompt have the same."""
    by_node = np.zeros_like(item.targets)
    by_node[item.tree.leaves()] = baselines(item.tree, item.rewards)
    for node in range(len(item.tree) - 1, -1, -1):  # children come after their parents
        if item.tree.parent[node] >= 0:
            by_node[item.tree.parent[node]] = by_node[node]
    return by_node


def _share(item: LabelledTree) -> float:
    return stable_hash(f"share/{item.tree.prompt_id}") / 2**32


def table(runs: dict[str, dict[str, Any]], objectives: list[str]) -> str:
    """Markdown: per variant, means over the folds and, of the mean gain, the spread between them."""
    rows = [
        f"| variant | folds | {' | '.join(objectives)} | mean gain | CPU s | parameters |",
        f"|---|---|{'---|' * (len(objectives) + 3)}",
    ]
    for name, by_fold in runs.items():
        of = [[r["objectives"][o] for r in by_fold.values()] for o in objectives]
        cells = [
            ", ".join(f"{np.mean([x[key] for x in xs]):.2f}" for key in ("gain", "calibration", "r2")) for xs in of
        ]
        means = [np.mean([r["objectives"][o]["gain"] for o in objectives]) for r in by_fold.values()]
        spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
        seconds = np.mean([r["cpu_seconds"] for r in by_fold.values()])
        size = next(iter(by_fold.values()))["parameters"]
        folds = " ".join(by_fold)
        rows.append(
            f"| {name} | {folds} | {' | '.join(cells)} | {np.mean(means):.3f}{spread} | {seconds:.0f} | {size:,} |"
        )
    made = sorted({r["made"] for by_fold in runs.values() for r in by_fold.values()})
    rows += ["", f"Gain, calibration and R2 per objective (`mavis_training.fitting.efficiency`). {'; '.join(made)}."]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Make the runs that are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", nargs="+", default=["runs/smollm2/trees"], help="labelled trees of the reference")
    parser.add_argument(
        "--states", nargs="+", default=["runs/smollm2/states"], help="a folder for each store's hidden states"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--objectives", nargs="+", default=["helpful", "harmless", "humour"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--folds", nargs="+", type=int, choices=range(4), default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("docs/results/heads.json"))
    arguments = parser.parse_args()
    runs = read_json(arguments.output) if arguments.output.exists() else {}
    data: Data | None = None
    for fold in arguments.folds:
        for name in arguments.variants:
            if str(fold) in runs.get(name, {}):
                continue
            data = data or read_data(arguments)
            runs.setdefault(name, {})[str(fold)] = run(data, VARIANTS[name], fold, arguments.objectives)
            write_json(arguments.output, runs)
            arguments.output.with_suffix(".md").write_text(table(runs, arguments.objectives), encoding="utf-8")


if __name__ == "__main__":
    main()
