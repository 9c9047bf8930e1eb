"""pi_ref, the reference policy: what is sampled from where nothing steers, and what KL is taken against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from mavis_logits.backbone import Backbone
from mavis_logits.steering.steering import Steering

if TYPE_CHECKING:
    from ..trees.data import LabelledTree

# Of a generation config: ids that the reference keeps, and what shapes no distribution.
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_HARMLESS = frozenset(
    {
        *_IDS, "transformers_version", "do_sample", "max_length", "max_new_tokens", "use_cache", "cache_implementation",
        "cache_config", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
        "output_hidden_states", "num_return_sequences",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """The softmax of the base model's own scores, by default at temperature 1 and over the whole vocabulary, until a
    text ends.

    What else a model's `generation_config.json` asks for (penalties, min-p, banned or forced tokens, a temperature) is
    not applied, neither to what is collected nor to what is measured: else the two, and KL, would be of other policies.

    Attributes:
        eos: ids that end a text.
        pad: id that fills up a batch.
        not_applied: of the generation config.
        temperature, top_p: that it is sampled at, as in `generate`.
    """

    eos: frozenset[int]
    pad: int | None
    not_applied: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    top_p: float = 1.0

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0, top_p: float = 1.0
    ) -> Reference:
        """Of a base model and its tokenizer."""
        found = getattr(model, "generation_config", None)
        asked = found.to_diff_dict() if found is not None else {}
        applied = {"temperature": temperature, "top_p": top_p}
        left_out = {
            key: value
            for key, value in asked.items()
            if key not in _HARMLESS and not key.startswith("_") and value != applied.get(key)
        }
        return cls(frozenset(eos_token_ids(found, tokenizer)), tokenizer.pad_token_id, left_out, temperature, top_p)

    @property
    def is_plain(self) -> bool:
        """Whether it is the model's own distribution, at temperature 1 and over all tokens."""
        return self.temperature == 1.0 and self.top_p == 1.0

    def record(self) -> dict[str, Any]:
        """As results keep it."""
        return {
            "temperature": self.temperature, "top_k": None, "top_p": self.top_p, "eos_token_id": sorted(self.eos),
            "not_applied": self.not_applied,
        }  # fmt: skip

    def notice(self, model: str) -> str | None:
        """In words, what of the model's generation config is not applied; None if there is nothing."""
        if not self.not_applied:
            return None
        asked = ", ".join(f"{name} {value}" for name, value in self.not_applied.items())
        return (
            f"{model}: the reference policy is the model's own distribution{self._in_words()}. Not applied of its "
            f"generation config, neither in collecting nor in measuring: {asked}"
        )

    def _in_words(self) -> str:
        return "" if self.is_plain else f" at temperature {self.temperature:g}, top-p {self.top_p:g}"

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Within, `generate` takes no defaults but the reference's; entries of it that a call leaves open would else
        come from the model's generation config, also where a config is given."""
        theirs = model.generation_config
        ids = {name: getattr(theirs, name, None) for name in _IDS}
        ids |= {"eos_token_id": sorted(self.eos) or None, "pad_token_id": self.pad}
        model.generation_config = GenerationConfig(**ids)
        try:
            yield
        finally:
            model.generation_config = theirs


def warpers(temperature: float, top_p: float) -> LogitsProcessorList:
    """What makes the scores of a reference at a temperature and nucleus of a model's own; empty where that is all."""
    found = LogitsProcessorList([] if temperature == 1 else [TemperatureLogitsWarper(temperature)])
    if top_p != 1:
        found.append(TopPLogitsWarper(top_p))
    return found


def eos_token_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a sequence, from the model's generation config and the tokenizer."""
    configured = generation.eos_token_id if generation is not None else None
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return {i for i in ids if isinstance(i, int)}


def contexts(model: PreTrainedModel, steering: Steering | None = None) -> dict[str, int | None]:
    """How many tokens the base model and the value models of a policy can read, each; None where none is known."""
    found = {"the base model": Backbone.of(model).longest}
    for value in steering.functions.models if steering is not None else ():
        found[f"the value model for {', '.join(value.config.objectives)}"] = Backbone.of(value.backbone).longest
    return found


def require_room(
    rows: Sequence[Mapping[str, Any]],
    tokens: Sequence[Sequence[int]],
    max_new_tokens: int,
    readers: Mapping[str, int | None],
) -> None:
    """Raise `ValueError` if prompts and their completions do not fit into a context; the message names prompts.

    Args:
        rows: of the prompts.
        tokens: of each.
        max_new_tokens: of a completion.
        readers: of `contexts`.
    """
    for name, longest in readers.items():
        if longest is None:
            continue
        pairs = zip(rows, tokens, strict=True)
        long = [f"{row['id']} ({len(ids)})" for row, ids in pairs if len(ids) + max_new_tokens > longest]
        if long:
            room = longest - max_new_tokens
            advice = f"drop the prompts of more than {room} tokens or lower" if room > 0 else "lower"
            raise ValueError(
                f"{len(long)} prompts and {max_new_tokens} new tokens (max_new_tokens) are longer than the {longest} "
                f"tokens that {name} can read: {', '.join(long[:5])}. Nothing has been sampled: {advice} "
                "max_new_tokens."
            )


def require_trees_fit(trees: Iterable[LabelledTree], backbone: nn.Module) -> None:
    """Raise `ValueError` if a tree is deeper than a backbone can read; the message names its prompt."""
    longest = Backbone.of(backbone).longest
    for item in trees:
        depth = len(item.tree.prompt_tokens) + int(item.tree.end().max())
        if longest is not None and depth > longest:
            raise ValueError(
                f"the tree of the prompt {item.tree.prompt_id!r} has {depth} tokens from its root to its deepest leaf, "
                f"more than the {longest} that the backbone can read: use a backbone with a longer context, or collect "
                "shorter trees."
            )
