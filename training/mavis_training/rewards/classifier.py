"""A sequence classification model as a reward: what it reads, and which of its outputs counts."""

from __future__ import annotations

import copy
import string
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

Conversation: TypeAlias = str | Sequence[Mapping[str, Any]]  # a text, or messages with role and content


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
    """One output of a sequence classification model, as a reward: for `mavis label`, and for TRL's trainers as it is.

    Conversations, which TRL hands over for conversational prompts, are read as a whole where the tokenizer's chat
    template is; in a text, `{prompt}` is what the user said last and `{completion}` what the assistant then said.

    Args:
        model: the classifier, which is put into eval mode; a `pad_token_id` that its config lacks is set.
        tokenizer: its tokenizer, which stays as it is.
        settings: what it reads, and which output counts.
        name: by which trainers log it; by default that of the model's folder or repository.

    Raises:
        ValueError: the model has no such label, or several and none is chosen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: ClassifierSettings | None = None,
        name: str | None = None,
    ) -> None:
        self.settings = settings or ClassifierSettings()
        self.label = label_index(model, self.settings.label)
        name = name or str(model.config.name_or_path).rstrip("/").rsplit("/", 1)[-1] or type(self).__name__
        self.__name__ = name if self.settings.label is None else f"{name}[{self.settings.label}]"
        self.tokenizer = _padding_as_the_model_knows_it(model, tokenizer)
        self.model = model.eval()
        self.tokenizer.padding_side = "right"  # encoders and decoder classifiers count positions from the left
        self.chat = self.settings.pair and self.settings.template is None and tokenizer.chat_template is not None
        texts = self.settings.texts
        if self.chat or (self.settings.template is not None and len(texts) == 1):
            ends = self.chat or _fields(texts[0])[-1] == "completion"
            self.tokenizer.truncation_side = "left" if ends else "right"

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Conversation], completions: Sequence[Conversation], **columns: Any
    ) -> list[float]:
        """Rewards of R (prompt, completion) texts or conversations, in order; batched by length.

        Of `columns` only those are looked at that the template names: TRL's trainers hand over much that is no column.

        Raises:
            ValueError: a column that the template names is missing or has not R entries.
        """
        given = {**columns, "prompt": prompts, "completion": completions}
        names = sorted({name for text in self.settings.texts for name in _fields(text)})
        self._check_columns(names, given, len(completions))
        rows = [dict(zip(names, row, strict=True)) for row in zip(*(given[name] for name in names), strict=True)]
        texts = [[text.format(**_as_texts(row)) for text in self.settings.texts] for row in rows]
        rewards = torch.empty(len(rows))
        for batch in length_sorted_batches([sum(map(len, row)) for row in texts], self.settings.batch_size):
            inputs = self._encode_chats([rows[i] for i in batch]) if self.chat else self._encode(texts, batch)
            rewards[batch] = self._score(self.model(**inputs.to(self.model.device)).logits)
        return ((rewards - self.settings.mean) / self.settings.scale).tolist()

    def _check_columns(self, names: Sequence[str], given: Mapping[str, Any], count: int) -> None:
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(
                f"the template {self.settings.template!r} needs the columns {missing}, the prompts have "
                f"{sorted(given)}: name only these, or add the columns to the prompt file and collect anew."
            )
        for name in names:
            column = given[name]
            if isinstance(column, str) or not isinstance(column, Sized) or len(column) != count:
                size = f" of {len(column)}" if isinstance(column, Sized) else ""
                raise ValueError(
                    f"a reward of {count} completions needs a list of as many in {name!r}, got "
                    f"{type(column).__name__}{size}."
                )

    def _score(self, logits: Tensor) -> Tensor:
        """`[R, labels]` -> `[R]`."""
        logits = logits.float().cpu()
        if self.settings.output == "probability":
            logits = logits.softmax(dim=1) if logits.shape[1] > 1 else logits.sigmoid()
        return logits[:, self.label]

    def _encode(self, texts: list[list[str]], batch: list[int]) -> BatchEncoding:
        columns = [[texts[i][place] for i in batch] for place in range(len(self.settings.texts))]
        return self.tokenizer(*columns, **self._shape)

    def _encode_chats(self, rows: list[dict[str, Any]]) -> BatchEncoding:
        chats = [_turns(row["prompt"], "user") + _turns(row["completion"], "assistant") for row in rows]
        return cast(BatchEncoding, self.tokenizer.apply_chat_template(chats, return_dict=True, **self._shape))

    @property
    def _shape(self) -> dict[str, Any]:
        return {"truncation": True, "max_length": self.settings.max_length, "padding": True, "return_tensors": "pt"}


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


def _padding_as_the_model_knows_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that pads with the token by which a decoder classifier finds a text's last one.

    A copy, since the tokenizer may be a policy's, which pads and truncates in its own way.
    """
    tokenizer, config = copy.deepcopy(tokenizer), model.config.get_text_config()
    known, readable = config.pad_token_id, model.get_input_embeddings().weight.shape[0]
    if known is not None and not 0 <= known < min(len(tokenizer), readable):  # -1, or one of another vocabulary
        known = None
    if known is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
    elif tokenizer.pad_token is None or tokenizer.pad_token_id >= readable:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"neither the config of {type(model).__name__} nor its tokenizer names a padding or end-of-text token: set "
            "tokenizer.pad_token, without which texts of several lengths cannot be read together."
        )
    if known is None:
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of texts of similar length, so that little is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _turns(said: Conversation, role: str) -> list[dict[str, Any]]:
    """A text as one turn of `role`; the turns of a conversation as they are."""
    return [{"role": role, "content": said}] if isinstance(said, str) else [dict(turn) for turn in said]


def _as_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in which prompt and completion are texts: of a conversation the user's last turn, all the assistant's."""
    texts = dict(row)
    if not isinstance(row.get("prompt", ""), str):
        texts["prompt"] = next((_content(turn) for turn in reversed(row["prompt"]) if turn["role"] == "user"), "")
    if not isinstance(row["completion"], str):
        texts["completion"] = "\n".join(_content(turn) for turn in row["completion"] if turn["role"] == "assistant")
    return texts


def _content(turn: Mapping[str, Any]) -> str:
    """What is said in a turn; of one in parts, those that are text."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


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
