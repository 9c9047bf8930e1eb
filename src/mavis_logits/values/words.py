"""Objectives in words: what an instruction would make likelier, as a value function that needs no training.

    V(s + a) = log pi_ref(a | instruction, s) - log pi_ref(a | s)

The base model reads every text a second time, with the instruction in its prompt, in a cache of its own: one more row
a step for each instruction. With `normalize="none"`, beta = 1 is the model under that instruction, and more goes beyond
it; several instructions, and trained value functions, mix by their weights. It carries as far as the base model follows
instructions, and no further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..backbone.fingerprint import tokenizer_fingerprint
from ..backbone.weights import WeakModel
from ..core.objectives import check_objectives

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SYSTEM, _USER = "\ue000system\ue000", "\ue000user\ue000"  # in place of texts, to find where a template puts them


@dataclass(frozen=True)
class WordsConfig:
    """What the value functions in words of one processor are.

    Attributes:
        objectives: their names.
        instructions: one for each.
        tokenizer_fingerprint: of the tokenizer that they were written in.
        settings: that they are best used with, for `MavisConfig`: somewhat beyond the model under the instruction.
    """

    objectives: list[str]
    instructions: list[str]
    tokenizer_fingerprint: str | None = field(default=None, kw_only=True)
    settings: dict[str, Any] = field(
        default_factory=lambda: {"beta": 1.5, "top_k": 200, "unscored": "expected", "normalize": "standard"},
        kw_only=True,
    )


class Place(NamedTuple):
    """Where an instruction goes in a prompt: `removed` tokens from `start` on make way for `inserted` ones."""

    start: int
    removed: int
    inserted: list[int]

    def applied(self, text: list[int]) -> list[int]:
        """The token ids of a text with the instruction in it."""
        return text[: self.start] + self.inserted + text[self.start + self.removed :]


class Words:
    """Value functions of M objectives, each an instruction to the base model.

    Args:
        instructions: by objective.
        tokenizer: of the base model. Its chat template tells where an instruction goes: into the system turn, behind a
            system prompt that the text has already, in front of the user's words if the template has no such turn, and
            in front of everything without a template.
        model: the base model; it may also be given by `bind`.

    Raises:
        ValueError: no instruction, an empty one, or two of one name.
    """

    reads: Literal["tokens"] = "tokens"

    def __init__(
        self,
        instructions: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel | None = None,
    ) -> None:
        check_objectives(list(instructions))
        for name, text in instructions.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"the objective {name!r} must be an instruction in words, got {text!r}")
        self.config = WordsConfig(
            list(instructions), list(instructions.values()), tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)
        )
        self._insertions = [_Insertion(text, tokenizer) for text in instructions.values()]
        self._base = WeakModel(model)

    def bind(self, model: PreTrainedModel) -> Words:
        """Have `model` read them; returns self. An encoder-decoder reads them with its encoder, in its prompts."""
        self._base = WeakModel(model)
        return self

    @property
    def backbone(self) -> PreTrainedModel:
        """The base model.

        Raises:
            ValueError: it has not been told, or is gone.
        """
        model: PreTrainedModel | None = self._base()
        if model is None:
            raise ValueError(
                f"the objectives {self.config.objectives} are in words, which the base model reads: pass model=model, "
                "or use attach(model)"
            )
        return model

    @property
    def device(self) -> torch.device:
        """Where the base model takes its tokens."""
        return self.backbone.device

    @property
    def told(self) -> str:
        """What it is, for messages."""
        return f"what the instructions {self.config.instructions} ask for"

    @property
    def units(self) -> Tensor:
        """Mean 0 and scale 1: values are in nats, [3, M]."""
        return torch.tensor([[0.0], [1.0], [1.0]]).repeat(1, len(self.config.objectives))

    def refresh(self, thorough: bool = True) -> None:
        """There are no weights but the base model's own."""

    def places(self, text: Sequence[int]) -> list[Place]:
        """Where each of the M instructions goes in the token ids of a text."""
        return [insertion.place(list(text)) for insertion in self._insertions]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_base": WeakModel()}  # pickled without its base model, as a value head is

    def __deepcopy__(self, memo: dict[int, Any]) -> Words:
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin._base = self._base.__deepcopy__(memo)
        return twin


class _Insertion:
    """How the tokens of a prompt change by an instruction.

    Args:
        instruction: the text.
        tokenizer: of the base model.
    """

    def __init__(self, instruction: str, tokenizer: PreTrainedTokenizerBase) -> None:
        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        self._paragraph = ids(f"{instruction}\n\n")  # in front of a text
        self._further = ids(f"\n\n{instruction}")  # behind a system prompt
        bos = tokenizer.bos_token_id
        self._front = 1 if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else 0
        self._begin: list[int] = []  # of a chat without a system turn; empty if there is no template
        self._turn: tuple[list[int], list[int]] | None = None  # begin and end of a system turn
        self._swap: tuple[list[int], list[int]] = ([], [])  # the begin of such a chat, and with the instruction's turn
        if tokenizer.chat_template is None or (begin := _opened(tokenizer, None)) is None:
            return
        self._begin = ids(begin)
        opening, found, closing = (_opened(tokenizer, _SYSTEM) or "").partition(_SYSTEM)
        if found:
            self._turn = ids(opening), ids(closing)
            self._swap = _different(self._begin, ids(opening + instruction + closing))

    def place(self, text: list[int]) -> Place:
        """Where the instruction goes in the token ids of a text."""
        plain, instructed = self._swap
        if plain and text[: len(plain)] == plain:
            return Place(0, len(plain), instructed)
        if self._turn is not None:
            opening, closing = self._turn
            # Only the first token of the end counts: the last may be merged with the user's words.
            ends = [i for i in range(len(opening), len(text)) if text[i] == closing[0]]
            if opening and ends and text[: len(opening)] == opening:
                return Place(ends[0], 0, self._further)
            if not plain and text[:1] == self._begin[:1]:
                return Place(0, 0, instructed)
        elif self._begin and text[: len(self._begin)] == self._begin:
            return Place(len(self._begin), 0, self._paragraph)
        return Place(self._front if len(text) > self._front else 0, 0, self._paragraph)


def _opened(tokenizer: PreTrainedTokenizerBase, system: str | None) -> str | None:
    """What a chat begins with, up to the user's first words; None if the template refuses it."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    try:
        text = tokenizer.apply_chat_template([*turns, {"role": "user", "content": _USER}], tokenize=False)
    except Exception:  # templates raise what they like for a role that they do not know
        return None
    before, found, _ = str(text).partition(_USER)
    return before if found else None


def _different(one: list[int], other: list[int]) -> tuple[list[int], list[int]]:
    """Both without the end that they share: a prompt's first words may be merged with the last of it."""
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    return one[: len(one) - same], other[: len(other) - same]
