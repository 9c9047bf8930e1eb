"""A value model of another tokenizer than the base model's: texts are decoded, and encoded in its own tokens.

    V(s + a) = V_own(encode_own(decode(s + a)))

A candidate may end in the middle of a token of the value model, or change how the last letters before it are cut. So
every candidate is a text of its own, encoded as a whole: exact, and slower than a value model of the base model's
tokenizer by the decoding, the encoding and a cache for every candidate (`scoring.retokenized`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..backbone.fingerprint import tokenizer_fingerprint
from ..backbone.needs import Needs
from .value_model import ValueModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT_OFF = "\ufffd"  # what tokenizers decode bytes to that are no whole character


class Retokenized(nn.Module):
    """A value function of M objectives: a value model that reads the base model's texts in tokens of its own.

    Special tokens are translated: into that of the same text if the value model's tokenizer has it, the end and the
    beginning of a text into its own, padding into nothing; any other is read as the text that it is. Texts begin as the
    value model's tokenizer begins them. A character of which the base model has written a part only counts once it is
    whole.

    Args:
        model: the value model.
        tokenizer: the one that it was trained with.
        base_tokenizer: the base model's.

    Raises:
        ValueError: the value model was trained with another tokenizer than `tokenizer`.
    """

    reads: Literal["tokens"] = "tokens"

    def __init__(
        self, model: ValueModel, tokenizer: PreTrainedTokenizerBase, base_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        if not isinstance(model, ValueModel):
            raise ValueError(f"expected a ValueModel, got {type(model).__name__}: only these read tokens of their own")
        Needs.of(model.config).check_tokenizer(tokenizer)
        self.model = model
        self.tokenizer, self.base_tokenizer = tokenizer, base_tokenizer
        self.config = copy.copy(model.config)  # what it needs of a base model: no more than this tokenizer
        self.config.tokenizer_fingerprint = tokenizer_fingerprint(base_tokenizer)
        self._begin = _begin_of(tokenizer)
        self._specials = _specials(base_tokenizer, tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the value model computes."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the value model's weights."""
        return self.model.dtype

    @property
    def backbone(self) -> Any:
        """The value model's decoder."""
        return self.model.backbone

    @property
    def units(self) -> Tensor:
        """The value model's: [3, M] on the CPU."""
        return self.model.units

    def refresh(self, thorough: bool = True) -> None:
        """As the value model's."""
        self.model.refresh(thorough)

    def translated(self, tokens: Sequence[int]) -> list[int]:
        """A text of the base model's tokens (no padding) in the value model's.

        Raises:
            ValueError: nothing is left of it.
        """
        parts: list[list[int] | str] = []  # of other ids, and of text
        run: list[int] = []

        def end_run() -> None:
            if run:
                parts.append(self.base_tokenizer.decode(run, clean_up_tokenization_spaces=False))
                run.clear()

        bos = self.base_tokenizer.bos_token_id
        for number, token in enumerate(tokens):
            if number == 0 and token == bos:
                continue  # every text begins as the value model's do
            if token not in self._specials:
                run.append(token)
                continue
            end_run()
            parts.append(self._specials[token])
        end_run()
        if parts and isinstance(parts[-1], str):
            parts[-1] = parts[-1].rstrip(_CUT_OFF)
        ids, text = list(self._begin), ""
        for part in [*parts, []]:
            if isinstance(part, str):
                text += part
                continue
            if text:
                ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, text = ids + part, ""
        if not ids:
            raise ValueError(
                f"nothing is left of the text {list(tokens)!r} for the value model for {self.config.objectives}, whose "
                "tokenizer has nothing to begin texts with: give the base model a longer prompt"
            )
        return ids


def _begin_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts in front of a text."""
    whole, bare = list(tokenizer("a")["input_ids"]), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def _specials(base: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> dict[int, list[int] | str]:
    """Each special token of `base`: as ids of `own`, or as text."""
    theirs = {str(token): number for number, token in own.added_tokens_decoder.items() if token.special}
    theirs |= {str(text): own.convert_tokens_to_ids(text) for text in own.all_special_tokens}
    special = {number: str(token) for number, token in base.added_tokens_decoder.items() if token.special}
    special |= {base.convert_tokens_to_ids(text): str(text) for text in base.all_special_tokens}
    roles = {
        base.unk_token_id: own.unk_token_id,
        base.bos_token_id: own.bos_token_id,
        base.eos_token_id: own.eos_token_id,
    }
    found: dict[int, list[int] | str] = {}
    for number, text in special.items():
        if number == base.pad_token_id and number not in (base.eos_token_id, base.bos_token_id):
            found[number] = []
        elif text in theirs:
            found[number] = [theirs[text]]
        elif number in roles:
            found[number] = [] if roles[number] is None else [roles[number]]
        else:
            found[number] = text
    return found
