"""The settings of Algorithm 1: defaults of a run, and what each iteration changes of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from mavis_logits import MavisConfig
from mavis_logits.core.chat import ChatTemplate
from mavis_logits.models import DEFAULT_MODEL

from ..base.settings import from_mapping
from ..fitting.head_config import TrainHeadConfig
from ..fitting.model_config import TrainModelConfig
from ..measure.schedule import TargetKl
from ..measure.validation import ValidationConfig
from ..sampling.config import CollectConfig, PolicyConfig

TRAINERS: dict[str, type[TrainModelConfig] | type[TrainHeadConfig]] = {
    "model": TrainModelConfig,
    "head": TrainHeadConfig,
}
# Section F.4: what the paper changes after iteration 0. Settings of the run and of an iteration come before these.
LATER_TREES = {"layers": 4, "root_children": 2, "children": 3}
LATER_TRAINING: dict[str, dict[str, Any]] = {"model": {"learning_rate": 4e-5, "warmup_steps": 0}, "head": {}}
# Fields of the nested configs that are set elsewhere, and where.
_OWN = {
    "collect": {"prompts", "model", "dtype", "device", "chat_template", "store", "policy"},
    "train": {"objectives", "model", "device", "seed", "zeta", "store", "states", "output", "iteration"},
    "policy": {"beta"},
}


@dataclass(frozen=True)
class IterationConfig:
    """What one iteration changes of the run's defaults.

    Attributes:
        zeta: KL penalty multiplier of equation 6 that V^i is trained with; None for the run's, and 0 in iteration 0,
            whose trees are the reference's own.
        beta: strength of the policy that V^i guides: it is validated so, and samples the next iteration's trees; None
            for the run's.
        policy: other fields of `MavisConfig` for that policy, such as top_k and normalize.
        collect: fields of `CollectConfig` for this iteration's trees, such as limit, layers and children.
        train: fields of the trainer's config, such as learning_rate, epochs and warmup_steps; `initial: null` begins
            anew, where Algorithm 1 goes on from the value function of the iteration before.
        skip_prompts: leave out so many prompts at the top of the file, to sample from others than earlier iterations.
        mix: train on the trees of so many earlier iterations too; 0 on this one's alone, as in the paper.
        trees: folder of an existing store in place of new trees; it is labelled where it has no rewards yet.
        states: folder of hidden states of `trees`, for value heads.
        value_function: folder or Hub id of an existing V^i in place of training.
    """

    zeta: float | None = None
    beta: float | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    collect: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    skip_prompts: int = 0
    mix: int = 0
    trees: str | None = None
    states: str | None = None
    value_function: str | None = None

    def __post_init__(self) -> None:
        for name in ("skip_prompts", "mix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.states is not None and self.trees is None:
            raise ValueError(f"states: {self.states} are those of given trees: give trees too, or leave it out")


@dataclass(frozen=True)
class IterateConfig:
    """Policy iteration (Algorithm 1): collect, label, train and validate, iteration by iteration.

    Attributes:
        prompts: JSON-lines file with `id` and `prompt` to sample trees from.
        output: folder of the run: a folder for each iteration, `iterate.json` (what is done), `iterations.json` and
            `report.md` (what was found).
        objectives: what the value functions predict; one in the paper, several have one output each.
        rewards: by objective, its reward as for `mavis label`; those that are no objectives are only measured.
        iterations: one entry each, the first for iteration 0.
        validation: on what policies are validated.
        kind: "model": value models, the paper's kind; "head": value heads.
        model: base model, the reference policy.
        chat_template: "auto" or "none", as for `mavis collect`.
        policy: fields of `MavisConfig` for the guided policies: top_k, normalize, weights (equal by default), ...
        beta: strength of the guided policies, where an iteration does not give its own.
        collect: fields of `CollectConfig` for all iterations. Iterations after the first have the tree shape of
            section F.4 unless it is given.
        train: fields of `TrainModelConfig` or `TrainHeadConfig` for all iterations. Value models after the first have
            the learning rate and warm-up of section F.4 unless they are given.
        zeta: KL penalty multiplier of iterations after the first.
        early_stop: stop when the guided policy no longer improves on the validation prompts.
        patience: iterations without an improvement over the best one after which to stop.
        tolerance: an improvement is a gain of more than this many standard errors, prompt by prompt.
        kl_weight: nats count this much against rewards in that comparison.
        target_kl: find every iteration's beta and zeta for this bound (section 3.3), in place of those given here.
        reuse: folder of another run; its stages with the same settings, resting on the same ones, are taken from there.
        dtype: of the base model's weights.
        device: where to run; None for a GPU if there is one.
        seed: of the whole run; iteration i samples with this plus i, unless `collect` has a seed.
    """

    prompts: str
    output: str
    objectives: list[str]
    rewards: dict[str, str | dict[str, Any]]
    iterations: list[IterationConfig]
    validation: ValidationConfig
    kind: Literal["model", "head"] = "model"
    model: str = DEFAULT_MODEL
    chat_template: ChatTemplate = "auto"
    policy: dict[str, Any] = field(default_factory=dict)
    beta: float = 5.0
    collect: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    zeta: float = 0.0
    early_stop: bool = True
    patience: int = 1
    tolerance: float = 0.0
    kl_weight: float = 0.0
    target_kl: TargetKl | None = None
    reuse: str | None = None
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in TRAINERS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, TRAINERS))}, got {self.kind!r}")
        if not self.iterations:
            raise ValueError("iterations is empty: give an entry for each, e.g. `- beta: 5.0`")
        if not self.objectives or not set(self.objectives) <= set(self.rewards):
            raise ValueError(
                f"objectives are {self.objectives}, rewards are given for {sorted(self.rewards)}: name at least one "
                "objective, and a reward for each"
            )
        if self.patience < 1 or self.tolerance < 0 or self.kl_weight < 0:
            raise ValueError(
                "patience must be at least 1, tolerance and kl_weight at least 0, got "
                f"{self.patience}, {self.tolerance} and {self.kl_weight}"
            )
        for part, own in _OWN.items():
            own = own | {"dtype"} if part == "train" and self.kind == "head" else own
            places = {part: getattr(self, part)}
            places |= {f"iterations[{i}].{part}": getattr(it, part) for i, it in enumerate(self.iterations)}
            for where, settings in places.items():
                for key in own & settings.keys():
                    raise ValueError(f"{where} has {key!r}, which the run sets itself: use the setting of its own")
        self._check_iterations()

    def _check_iterations(self) -> None:
        """What is wrong with any iteration is found before the first."""
        searched = [i for i, it in enumerate(self.iterations) if it.zeta is not None or it.beta is not None]
        if self.target_kl is not None and searched:
            raise ValueError(f"target_kl finds beta and zeta, but iterations {searched} give their own: leave them out")
        for i in range(len(self.iterations)):
            policy = PolicyConfig("", self.policy_settings(i - 1, self.beta_of(i - 1))) if i else None
            self.collect_config(i, "", policy)
            self.train_config(i, [""], None, "", None, self.zeta_of(i))
            settings = MavisConfig.from_dict(self.policy_settings(i, self.beta_of(i)))
            if self.kind == "model" and settings.top_k is None:
                raise ValueError("policy: top_k null scores the whole vocabulary, which only value heads can; give k")
            unknown = set(settings.weights or ()) - set(self.objectives)
            if unknown:
                raise ValueError(f"policy: weights name {sorted(unknown)}; the objectives are {self.objectives}")

    def beta_of(self, i: int) -> float:
        """Strength of the policy that V^i guides."""
        beta = self.iterations[i].beta
        return self.beta if beta is None else beta

    def zeta_of(self, i: int) -> float:
        """KL penalty multiplier that V^i is trained with."""
        zeta = self.iterations[i].zeta
        return zeta if zeta is not None else self.zeta if i else 0.0

    def weights(self) -> dict[str, float]:
        """Of the objectives, in the policies and in the reward that they are validated by."""
        given = self.policy.get("weights")
        return dict(given) if given else dict.fromkeys(self.objectives, 1 / len(self.objectives))

    def policy_settings(self, i: int, beta: float) -> dict[str, Any]:
        """Fields of `MavisConfig` of the policy that V^i guides."""
        return {"weights": self.weights(), **self.policy, **self.iterations[i].policy, "beta": beta}

    def collect_config(
        self, i: int, store: str, policy: PolicyConfig | None, prompts: str | None = None
    ) -> CollectConfig:
        """How iteration i samples its trees."""
        given = {"seed": self.seed + i} | (LATER_TREES if i else {}) | self.collect | self.iterations[i].collect
        shared = {name: getattr(self, name) for name in ("model", "chat_template", "dtype", "device")}
        places = {"prompts": prompts or self.prompts, "store": store}
        config = from_mapping(CollectConfig, given | shared | places, f"iterations[{i}].collect")
        return config if policy is None else replace(config, policy=policy)

    def train_config(
        self, i: int, stores: list[str], states: list[str] | None, output: str, initial: str | None, zeta: float
    ) -> TrainModelConfig | TrainHeadConfig:
        """How iteration i trains its value function."""
        given = LATER_TRAINING[self.kind] | self.train if i else self.train
        run = {"store": stores, "objectives": self.objectives, "output": output, "zeta": zeta, "iteration": i}
        # Said outright: without a GPU, Trainer computes in bfloat16 only where it is told to use the CPU.
        run |= {"device": self.device or ("cuda" if torch.cuda.is_available() else "cpu"), "seed": self.seed}
        if self.kind == "head":
            run |= {"model": self.model, "states": states, "dtype": self.dtype}
        defaults = {"initial": initial} | ({"backbone": self.model} if self.kind == "model" else {})
        content = defaults | given | self.iterations[i].train | run
        return from_mapping(TRAINERS[self.kind], content, f"iterations[{i}].train")
