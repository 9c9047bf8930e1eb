"""The tokens that fill up rows and end texts, by whoever knows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SpecialTokens(NamedTuple):
    """Attributes:
    pad: fills up rows; None if there is none.
    eos: ends texts.
    borders: begins or ends texts.
    """

    pad: int | None
    eos: frozenset[int]
    borders: frozenset[int]


def special_tokens(
    models: Sequence[Any],
    base: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pad_token_id: int | None = None,
    eos_token_id: int | Iterable[int] | None = None,
) -> SpecialTokens:
    """The special tokens: as given, else the tokenizer's, else the base model's, else the value models'.

    Texts also end with what `generate` stops at, whatever the tokenizer says. Padding is never made up of EOS.
    """
    configs: list[Any] = [] if base is None else [base.generation_config, base.config]
    configs += [model.config for model in models] + [model.backbone.config for model in models]

    def first(name: str, given: Any = None, places: Sequence[Any] = configs) -> Any:
        found = (getattr(place, name, None) for place in places)
        return given if given is not None else next((value for value in found if value is not None), None)

    def ids(given: Any) -> frozenset[int]:
        return frozenset([given] if isinstance(given, int) else given or ())

    eos = ids(first("eos_token_id", eos_token_id, [tokenizer, *configs]))
    if eos_token_id is None and base is not None:
        eos |= ids(getattr(base.generation_config, "eos_token_id", None))
    pad = first("pad_token_id", pad_token_id, [tokenizer, *configs])
    return SpecialTokens(pad, eos, eos | ids(first("bos_token_id", None, [tokenizer, *configs])))
