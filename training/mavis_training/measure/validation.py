"""Validation of a policy: what it writes to held-out prompts, its rewards and its divergence from the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.backbone.fingerprint import Identity
from mavis_logits.core.chat import ChatTemplate

from ..base.files import read_json, write_json
from ..base.prompts import encode_prompts, read_prompts
from ..base.settings import check_sampling
from ..rewards.load import Reward, RewardSpec, load_reward, reward_digest
from ..sampling.config import PolicyConfig
from ..sampling.reference import contexts, require_room
from .completions import (
    Completions,
    Protocol,
    complete_all,
    completions_origin,
    prompts_digest,
    read_completions,
    sampled_at,
    write_completions,
)
from .judging import judge
from .schedule import Measurement
from .settings import steerings
from .summary import Rewards, summarise

RESULT_FILE = "validation.json"
COMBINED = "combined"
Base = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class ValidationConfig:
    """On what policies are validated.

    Attributes:
        prompts: JSON-lines file with `id` and `prompt`, none of them trained on.
        limit: at most this many of them, from the top of the file.
        seeds: each prompt is answered once per seed.
        max_new_tokens: T.
        batch_size: prompts side by side.
        temperature, top_p: of the reference, which is sampled from or tilted.
    """

    prompts: str
    limit: int | None = 100
    seeds: list[int] = field(default_factory=lambda: [0])
    max_new_tokens: int = 128
    batch_size: int = 32
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"validation.{name} must be at least 1, got {getattr(self, name)}")
        check_sampling(self.temperature, self.top_p)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"validation.seeds must be one or several different numbers, got {self.seeds}")


class Validator:
    """Measures policies on the same prompts with the same seeds.

    Args:
        config: on what.
        rewards: what every objective's reward is loaded from.
        weights: by objective, of the combined reward.
        base: loads the base model and its tokenizer, when first needed.
        device: where reward models run.
        chat_template: how prompts are put, as for `mavis collect`.

    Raises:
        ValueError: prompts that cannot be used.
        OSError: the file of prompts cannot be read.
    """

    def __init__(
        self,
        config: ValidationConfig,
        rewards: Mapping[str, RewardSpec],
        weights: Mapping[str, float],
        base: Callable[[], Base],
        device: str = "cpu",
        chat_template: ChatTemplate = "auto",
    ) -> None:
        self.config, self.weights, self.base = config, dict(weights), base
        self.rewards: dict[str, Any] = dict(rewards)
        self.device, self.chat_template = device, chat_template
        self.rows = read_prompts(config.prompts, config.limit)
        self._loaded: dict[str, Reward] = {}

    def load(self, spec: RewardSpec) -> Reward:
        """A reward, loaded once."""
        key = json.dumps(spec, sort_keys=True)
        if key not in self._loaded:
            self._loaded[key] = load_reward(spec, self.device)
        return self._loaded[key]

    def settings(self) -> dict[str, Any]:
        """What shapes a measurement, beside the policy."""
        of = {name: reward_digest(spec) for name, spec in self.rewards.items()}
        config = asdict(self.config)
        sampled = sampled_at(config.pop("temperature"), config.pop("top_p"))
        return config | sampled | {
            "rewards": self.rewards, "weights": self.weights, "rewards_are": of,
            "prompts_read": prompts_digest(self.rows),
        }  # fmt: skip

    def measure(self, folder: Path, policy: PolicyConfig | None, plain: Measurement | None = None) -> Measurement:
        """Measure a policy, and keep completions, rewards and result in `folder`; what lies there is not done again.

        Args:
            folder: for `completions.json`, `completions.rewards.json` and `validation.json`.
            policy: None for the reference alone.
            plain: the measurement of the reference, in whose standard deviations gains are given; None for its own.

        Raises:
            ValueError: value functions that do not fit the model, a reward that fails, or completions of another
                policy in `folder`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for spec in self.rewards.values():  # what is wrong with a reward is found before anything is sampled
            self.load(spec)
        done = self._complete(folder / "completions.json", policy)
        every_row = self.rows * len(self.config.seeds)
        rewards = judge(folder / "completions.rewards.json", done, every_row, self.rewards, self.load)
        write_json(folder / RESULT_FILE, self._result(done, rewards, plain))
        return self.read(folder)

    def read(self, folder: Path) -> Measurement:
        """The measurement that `measure` kept.

        Raises:
            OSError: there is none.
            ValueError: it is damaged.
        """
        content = read_json(folder / RESULT_FILE)
        rewards = {name: np.array(values) for name, values in content["rewards"].items()}
        by_prompt = self._by_prompt(rewards[COMBINED]), self._by_prompt(np.array(content["log_ratios"]))
        return Measurement(*by_prompt, content["summary"], rewards)

    def _by_prompt(self, values: Any) -> Any:
        """`[S * P]` to `[P]`, the mean over seeds."""
        return values.reshape(-1, len(self.rows)).mean(axis=0)

    def _complete(self, path: Path, policy: PolicyConfig | None) -> Completions:
        seeds = self.config.seeds
        setting = {} if policy is None else {"strategy": "sampling", **policy.settings}
        model, tokenizer = self.base()
        shared = {name: getattr(self.config, name) for name in ("seeds", "max_new_tokens", "batch_size")}
        shared |= sampled_at(self.config.temperature, self.config.top_p)
        shared |= {"chat_template": self.chat_template, "model": Identity(model).fingerprint}
        origin = completions_origin(setting, self.rows, None if policy is None else policy.value_functions, **shared)
        if not path.exists():
            prompts = encode_prompts(self.rows, tokenizer, 10**6, self.chat_template)
            steering = None
            if policy is not None:
                steering = steerings({"policy": setting}, policy.value_functions, model, tokenizer)["policy"]
            protocol = Protocol(
                seeds, self.config.max_new_tokens, self.config.batch_size, self.config.temperature, self.config.top_p,
                self.chat_template,
            )  # fmt: skip
            require_room(self.rows, prompts, self.config.max_new_tokens, contexts(model, steering))
            with tqdm(total=len(seeds) * len(self.rows), desc="validate", unit="prompt") as progress:
                done = complete_all(model, tokenizer, self.rows, protocol, steering, setting, progress.update)
            write_completions(path, origin, done)
        return read_completions(path, origin, "output", fresh=False)

    def _result(self, done: Completions, rewards: Rewards, plain: Measurement | None) -> dict[str, Any]:
        combined = sum(weight * rewards[name] for name, weight in self.weights.items())
        rewards = rewards | {COMBINED: np.asarray(combined)}
        reference = rewards if plain is None else plain.by_objective
        summary = summarise(done, rewards, reference, len(self.rows))
        return {
            "summary": summary,
            "prompt_ids": done.prompt_ids,
            "rewards": {name: values.tolist() for name, values in rewards.items()},
            "log_ratios": done.log_ratios,
        }
