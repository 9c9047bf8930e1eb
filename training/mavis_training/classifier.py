"""A sequence classification model as a reward: what it reads, and which of its outputs counts."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ClassifierSettings:
    """How a classifier is read as a reward: reward = (output - mean) / scale.

    Attributes:
        pair: read (prompt, completion) as a pair of texts, or as two turns if its tokenizer has a chat template; False:
            the completion alone.
        template: what it reads instead, with `{prompt}`, `{completion}` or another column of the prompts in braces, as
            in "\\n\\nHuman: {prompt}\\n\\nAssistant: {completion}"; a list of two is a pair of texts.
        label: which label's output, by name or index; needed where there are several.
        output: "logit", or "probability" (softmax over several labels, sigmoid of a single one).
        max_length: tokens; a single text is cut at the end away from the completion, of a pair the longer one.
        mean: subtracted from the output.
        scale: then divided by this.
        batch_size: texts per forward.
    """

    pair: bool = True
    template: str | list[str] | None = None
    label: str | int | None = None
    output: Literal["logit", "probability"] = "logit"
    max_length: int = 512
    mean: float = 0.0
    scale: float = 1.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.output not in ("logit", "probability"):
            raise ValueError(f"output of a reward must be 'logit' or 'probability', got {self.output!r}.")
        for name in ("max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a reward must be at least 1, got {getattr(self, name)}.")
        if not self.scale:
            raise ValueError("scale of a reward must not be 0: the output is divided by it.")
        if self.template is not None:
            _check_template(self.texts)

    @property
    def texts(self) -> list[str]:
        """The templates: one for a single text, two for a pair."""
        if self.template is None:
            return ["{prompt}", "{completion}"] if self.pair else ["{completion}"]
        return [self.template] if isinstance(self.template, str) else self.template


class ClassifierReward:
    """One output of a sequence classification model, as a reward.

    Args:
        model: the classifier.
        tokenizer: its tokenizer.
        settings: what it reads, and which output counts.

    Raises:
        ValueError: the model has no such label, or several and none is chosen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: ClassifierSettings | None = None,
    ) -> None:
        self.settings = settings or ClassifierSettings()
        self.label = label_index(model, self.settings.label)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:  # decoder classifiers find the last token by it
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer = model.eval(), tokenizer
        self.tokenizer.padding_side = "right"  # encoders and decoder classifiers count positions from the left
        self.chat = self.settings.pair and self.settings.template is None and tokenizer.chat_template is not None
        texts = self.settings.texts
        if self.chat or (self.settings.template is not None and len(texts) == 1):
            ends = self.chat or _fields(texts[0])[-1] == "completion"
            self.tokenizer.truncation_side = "left" if ends else "right"

    @torch.inference_mode()
    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """Rewards of R (prompt, completion) texts, in order; batched by length."""
        columns = {**columns, "prompt": prompts, "completion": completions}
        missing = {name for text in self.settings.texts for name in _fields(text)} - columns.keys()
        if missing:
            raise ValueError(
                f"the template {self.settings.template!r} needs the columns {sorted(missing)}, the prompts have "
                f"{sorted(columns)}: name only these, or add the columns to the prompt file and collect anew."
            )
        rewards = torch.empty(len(completions))
        for rows in length_sorted_batches(prompts, completions, self.settings.batch_size):
            batch = {name: [values[i] for i in rows] for name, values in columns.items()}
            rewards[rows] = self._score(self.model(**self._encode(batch).to(self.model.device)).logits)
        return ((rewards - self.settings.mean) / self.settings.scale).tolist()

    def _score(self, logits: Tensor) -> Tensor:
        """`[R, labels]` -> `[R]`."""
        logits = logits.float().cpu()
        if self.settings.output == "probability":
            logits = logits.softmax(dim=1) if logits.shape[1] > 1 else logits.sigmoid()
        return logits[:, self.label]

    def _encode(self, batch: dict[str, list[Any]]) -> Any:
        options: dict[str, Any] = {"truncation": True, "max_length": self.settings.max_length, "padding": True}
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        if self.chat:
            turns = [
                [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
                for row in rows
            ]
            return self.tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt", **options)
        texts = [[text.format(**row) for row in rows] for text in self.settings.texts]
        return self.tokenizer(*texts, return_tensors="pt", **options)


def label_index(model: PreTrainedModel, label: str | int | None) -> int:
    """Which output of a classifier `label` is; the only one if None.

    Raises:
        ValueError: it has no such label, or several and none is given; the message lists them.
    """
    names = {i: str(model.config.id2label.get(i, f"LABEL_{i}")) for i in range(model.config.num_labels)}
    if label is None and len(names) == 1:
        return 0
    chosen = [i for i, name in names.items() if not isinstance(label, bool) and label in (i, name)]
    if len(chosen) == 1:
        return chosen[0]
    given = "no label is given" if label is None else f"the label given is {label!r}"
    listed = ", ".join(f"{i} ({name!r})" for i, name in names.items())
    raise ValueError(
        f"a reward is one number: this classifier has {len(names)} labels and {given}. Set label: to one of {listed}."
    )


def length_sorted_batches(prompts: Sequence[str], completions: Sequence[str], batch_size: int) -> list[list[int]]:
    """Indices in batches of texts of similar length, so that little is padding."""
    order = sorted(range(len(completions)), key=lambda i: len(prompts[i]) + len(completions[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _check_template(texts: list[str]) -> None:
    """Refuse a template that cannot be filled in, or that does not show the completion."""
    if not isinstance(texts, list) or len(texts) not in (1, 2) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"template of a reward must be one text, or a list of two (a pair), got {texts!r}.")
    try:
        fields = [name for text in texts for name in _fields(text)]
    except ValueError as error:
        raise ValueError(f"template {texts} of a reward: {error}; double the braces that are meant as such.") from error
    strange = [name for name in fields if not name.isidentifier()]
    if strange or "completion" not in fields:
        raise ValueError(
            f"template {texts} of a reward must hold {{completion}}, and in braces only {{prompt}} and names of other "
            f"columns; it has {fields or 'none'}. Double the braces that are meant as such."
        )


def _fields(text: str) -> list[str]:
    """The names in braces, in order."""
    return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
