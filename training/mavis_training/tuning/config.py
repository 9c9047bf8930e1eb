"""How to tune an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mavis_logits.core.chat import ChatTemplate
from mavis_logits.models import DEFAULT_MODEL

from ..base.settings import check_sampling
from ..fitting.settings import LoraSettings, TrainerSettings
from ..rewards.load import split_spec

Method = Literal["dpo", "pairs", "sft", "paths", "rloo", "grpo", "on_policy", "direction"]
ON_PATHS = ("paths", "on_policy")
TRL_ONLINE = ("rloo", "grpo")
ONLINE = (*TRL_ONLINE, "on_policy")
BETA = {"dpo": 0.1, "pairs": 0.1, "paths": 1 / 3, "rloo": 0.05, "grpo": 0.05, "on_policy": 0.1}


@dataclass(frozen=True)
class TuneConfig(TrainerSettings):
    """What to tune the base model for, how, and on what.

    Attributes:
        method: "dpo": on pairs of answers of the trees, the better against the worse, by TRL; "pairs": by the same
            loss, all pairs of a tree read in one pass (`tuning.paths`), in a fraction of the time; "paths": path
            consistency over all answers of a tree; "sft": on the best answer of each tree; "rloo", "grpo": by
            reinforcement learning on prompts, by TRL; "on_policy": by path consistency over answers that the policy
            samples itself, RLOO's gradient in a fraction of the time (`tuning.on_policy`); "direction": no training,
            the difference of mean hidden states of better and worse answers (`rivals.directions`).
        output: folder for the adapter, or for the direction.
        weights: lambda by objective: rewards count in standard deviations, by these shares (MORLHF for several).
        store: labelled trees, one store or several: what all but "rloo", "grpo" and "on_policy" learn from; these take
            the rewards' standard deviations from there, and are measured on those held out.
        prompts: JSON-lines file of the prompts that these three answer.
        rewards: by objective, for these three, as for `mavis label`.
        trees: at most this many of the store's trees, a sample by prompt; None for all.
        answers: of each of these that are learnt from, of as many first branches as may be; None for all. Time goes
            into tokens: a few answers of many prompts teach more than many of a few.
        pairs: of every tree, for "dpo" and "pairs": the best with the worst, the second with the second last, ...
        beta: of the KL penalty, eta of equation 1: in DPO's loss, of the policy that "paths" aims at (rewards being in
            standard deviations), of the one that "on_policy" does, on the rewards of "rloo" and "grpo". None for 0.1,
            1/3, 0.1 and 0.05.
        steps: optimizer steps on prompts, of `batch_size` answers each, whatever `epochs` says.
        generations: answers to each prompt side by side.
        max_new_tokens: T of these.
        temperature: that they are sampled at.
        layer: of "direction".
        model: base model, by Hub id or folder.
        chat_template: as in collecting.
        initial: folder of a policy that `mavis tune` wrote for the same weights, to go on from: "paths" with trees that
            it has sampled itself, steered (Algorithm 1), or with more of the reference's; "on_policy" from where it
            steers, at its `strength`. `lora` must be of its rank and scale, and may adapt more layers; the units of its
            rewards are kept.
        lora: of the adapter.
        trl: further arguments of TRL's config by name; they override what is set here.
    """

    method: Method
    output: str
    weights: dict[str, float]
    store: str | list[str] | None = None
    prompts: str | None = None
    rewards: dict[str, str | dict[str, Any]] = field(default_factory=dict)
    trees: int | None = None
    answers: int | None = field(default=None, kw_only=True)
    pairs: int = 2
    beta: float | None = None
    steps: int = 100
    generations: int = 8
    max_new_tokens: int = 48
    temperature: float = 1.0
    layer: int = 10
    model: str = DEFAULT_MODEL
    chat_template: ChatTemplate = "auto"
    initial: str | None = None
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=16, alpha=32, dropout=0.05))
    learning_rate: float = field(default=1e-4, kw_only=True)
    batch_size: int = field(default=16, kw_only=True)
    warmup_steps: int = field(default=5, kw_only=True)
    trl: dict[str, Any] = field(default_factory=dict)

    @property
    def eta(self) -> float:
        """`beta`, or what stands for it."""
        return BETA.get(self.method, 0.0) if self.beta is None else self.beta

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {self.method!r}")
        if not isinstance(self.weights, Mapping) or not any(self.weights.values()):
            raise ValueError(f"weights must give a share to an objective, such as {{helpful: 1.0}}, got {self.weights}")
        for name in ("pairs", "steps", "generations", "max_new_tokens", "batch_size", "layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.trees is not None and self.trees < 2:
            raise ValueError(f"trees must be at least 2, got {self.trees}")
        if self.answers is not None and self.answers < 2:
            raise ValueError(f"answers must be at least 2, which are compared with each other, got {self.answers}")
        if self.beta is not None and (self.beta < 0 or (self.method in ON_PATHS and not self.beta)):
            raise ValueError(f"beta must not be negative, nor 0 for {' and '.join(ON_PATHS)}, got {self.beta}")
        if self.method != "direction" and self.lora.rank < 1:
            raise ValueError("lora.rank must be at least 1: what is tuned is an adapter")
        if self.initial is not None and self.method not in ON_PATHS:
            raise ValueError(
                f"initial is for {' and '.join(ON_PATHS)}, got it for {self.method}: TRL would take that policy, not "
                "the base model, for the reference of equation 1"
            )
        check_sampling(self.temperature, 1.0)
        if self.method in ONLINE:
            missing = sorted(set(self.weights) - set(self.rewards))
            if self.prompts is None or missing:
                raise ValueError(
                    f"{self.method} samples answers itself: give prompts, and rewards for {', '.join(self.weights)}"
                    + (f" ({', '.join(missing)} have none)" if missing else "")
                )
            for spec in self.rewards.values():
                split_spec(spec)
            if self.generations < 2 or self.batch_size % self.generations:
                raise ValueError(
                    f"generations must be at least 2 and batch_size a multiple of it, got {self.generations} and "
                    f"{self.batch_size}: answers to one prompt are compared within a batch"
                )
        elif self.store is None:
            raise ValueError(f"{self.method} learns from labelled trees: give store, as `mavis collect` writes it")
