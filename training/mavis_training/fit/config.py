"""What `mavis fit` is told."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mavis_logits.core.chat import ChatTemplate
from mavis_logits.models import DEFAULT_MODEL

from ..base.settings import check_sampling, from_mapping, torch_dtype
from ..fitting.head_config import TrainHeadConfig
from ..fitting.model_config import TrainModelConfig
from ..fitting.settings import LoraSettings
from ..rewards.load import split_spec, with_model
from ..tuning.config import TuneConfig

Kind = Literal["head", "model", "policy"]
Training = TrainHeadConfig | TrainModelConfig | TuneConfig
TRAINERS: dict[str, type[Training]] = {"head": TrainHeadConfig, "model": TrainModelConfig, "policy": TuneConfig}
_OWN = {"store", "objectives", "output", "states", "model", "device", "dtype", "seed", "fresh", "initial"}
_OWN |= {"method", "weights", "prompts", "rewards", "chat_template"}  # of tuning
_UNITS = {"h": 3600, "m": 60, "s": 1, "": 60}


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Make a value function for one's own rewards: collect, label, train, choose settings, measure, write a bundle.

    Attributes:
        prompts: JSON-lines file with `prompt` (and `id`), or a .txt file with one prompt a line.
        pairs: in place of prompts, JSON-lines file with `prompt`, `chosen` and `rejected`: a value head is trained on
            these answers, without rollouts and without a reward; rewards that are given are only measured.
        objective: name of what pairs teach.
        rewards: by objective, its reward as for `mavis label`: `file.py:function`, or a sequence classifier; or
            `words:INSTRUCTION`, what an instruction to the model itself makes likelier: it then steers at plain speed.
        output: folder: `bundle` (the value function with its settings and card), `report.html`, and `work`.
        model: the language model that is to be steered, by Hub id or folder.
        kind: "head": a value head on the model's own states, which costs nothing at decoding; "model": a value model;
            "policy": an adapter for each reward, tuned by path consistency (`mavis tune`), which steers furthest and
            costs a forward pass of the model more a token each.
        budget: of time for all of it, such as 30m, 2h or 1h30m; it decides how many trees are collected.
        kl: how far from the model steering may go, in nats an answer; "best": as far as the rewards rise.
        held_out: prompts to choose settings and to measure on; by default a part of `prompts`.
        temperature, top_p: at which the model is sampled and steered; by default its generation config's, else 0.7, 1.
        max_new_tokens: length of an answer.
        trees: at most so many, whatever the budget.
        train: fields of the training's own config (`mavis train-head`, `mavis train-model`, `mavis tune`).
        chat_template: "auto" or "none", as for `mavis collect`.
        dtype: of the model's weights.
        device: where to run; None for a GPU if there is one.
        seed: of everything.
        fresh: begin anew, in place of what `output` holds of another run.
    """

    prompts: str | None = None
    pairs: str | None = None
    objective: str = "preferred"
    rewards: dict[str, str | dict[str, Any]] = field(default_factory=dict)
    output: str
    model: str = DEFAULT_MODEL
    kind: Kind = "head"
    budget: str = "30m"
    kl: float | Literal["best"] = 5.0
    held_out: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int = 48
    trees: int | None = None
    train: dict[str, Any] = field(default_factory=dict)
    chat_template: ChatTemplate = "auto"
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    fresh: bool = False

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.pairs is None):
            raise ValueError("give either prompts, with a reward, or pairs of answers of which one was chosen")
        if self.pairs is None and not self.rewards:
            raise ValueError("rewards is empty: name at least one, as in --reward kind=rewards.py:kind")
        if self.pairs is not None and (self.kind != "head" or self.objective in self.rewards):
            raise ValueError(
                f"pairs train a value head for an objective of its own; got kind {self.kind!r}, and a reward for "
                f"{sorted(self.rewards)} beside the objective {self.objective!r}"
            )
        read = {name: with_model(spec, self.model, self.chat_template) for name, spec in self.rewards.items()}
        object.__setattr__(self, "rewards", read)
        for spec in read.values():
            split_spec(spec)
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        seconds(self.budget)
        if self.kl != "best" and not (isinstance(self.kl, int | float) and self.kl > 0):
            raise ValueError(f"kl must be a number of nats above 0, or 'best', got {self.kl!r}")
        check_sampling(*(1.0 if given is None else given for given in (self.temperature, self.top_p)))
        if self.max_new_tokens < 4:
            raise ValueError(f"max_new_tokens must be at least 4, got {self.max_new_tokens}")
        torch_dtype(self.dtype)
        self.trainings("store", "value", {})

    @property
    def objectives(self) -> list[str]:
        """What the value function is for."""
        return list(self.rewards) if self.pairs is None else [self.objective]

    @property
    def measured(self) -> dict[str, str | dict[str, Any]]:
        """The rewards that are measured; where there are none, how long answers are."""
        return self.rewards or {"words": "mavis_training.fit.plain:words"}

    @property
    def shown(self) -> list[tuple[str, str]]:
        """Which reward tells what steering towards which objective does."""
        return [(name, name if self.pairs is None else self.objective) for name in self.measured]

    def trainings(self, store: str, output: str, places: dict[str, Any]) -> list[Training]:
        """How the value functions are trained, on the trees in `store`: one for all objectives, or a policy for each.

        Args:
            store: folder of labelled trees.
            output: folder for the value function; those of policies are in it.
            places: further settings that are this run's to give.

        Raises:
            ValueError: `train` has an unknown field, or one that is given elsewhere.
        """
        taken = sorted(_OWN & self.train.keys())
        if taken:
            raise ValueError(f"train must not give {', '.join(taken)}: that is said by the run itself")
        own: dict[str, Any] = {"store": store, "seed": self.seed}
        own |= {"backbone": self.model} if self.kind == "model" else {"model": self.model, "dtype": self.dtype}
        own |= {} if self.pairs is None else {"rule": "pairs", "drop_leaves": 0.0, "bootstrap": 0.0}
        if self.kind != "policy":
            each: list[dict[str, Any]] = [{"output": output, "objectives": self.objectives}]
        else:
            own |= {
                "method": "paths", "lora": LoraSettings(16, 32, 0.0), "learning_rate": 3e-4, "batch_size": 8,
                "bf16": self.dtype == "bfloat16",
            }  # fmt: skip
            each = [{"output": f"{output}/{name}", "weights": {name: 1.0}} for name in self.objectives]
        return [from_mapping(TRAINERS[self.kind], own | one | places | self.train, "train") for one in each]


def seconds(budget: str) -> float:
    """A time such as 30m, 2h, 1h30m, 90s or 45 (minutes) in seconds.

    Raises:
        ValueError: it is none, or nothing.
    """
    text = str(budget).strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([hms]?)", text)
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not total or "".join(number + unit for number, unit in parts) != re.sub(r"\s", "", text):
        raise ValueError(f"budget must be a time such as 30m, 2h or 1h30m, got {budget!r}")
    return total


def told(span: float) -> str:
    """A time in words, for people."""
    if span < 90:
        return f"{max(1, round(span))} seconds"
    minutes = round(span / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
