"""What a value function needs of the base model that it steers: kept in its config, told in its card, checked here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from . import Backbone
from .fingerprint import Identity, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_RETOKENIZED = (
    ", or have it read texts in its own tokens, which is slower: "
    "mavis_logits.values.retokenized.Retokenized(value_model, its_tokenizer, tokenizer)"
)


@dataclass(frozen=True)
class Needs:
    """What a value function needs of a base model.

    A value model reads its tokens; a value head, its states too; a tuned policy is an adapter on its layers.

    Attributes:
        objectives: that it predicts.
        base_model: Hub id of the model that it was made for, if known.
        tokenizer: fingerprint of the tokenizer; None if unknown.
        vocabulary: token ids that it knows.
        fingerprint, sketch: of the weights that compute the states that a value head reads, or that an adapter's
            backbone begins with (`Identity`); None if unknown, or if it needs none.
        embedding: width of the output embedding, for a value head.
        width: of the states that a value head reads.
        layer: after which layer; None for what enters the output embedding.
        adapts: whether it is an adapter on the base model itself.
    """

    objectives: list[str]
    base_model: str | None = None
    tokenizer: str | None = None
    vocabulary: int | None = None
    fingerprint: str | None = None
    sketch: str | None = None
    embedding: int | None = None
    width: int | None = None
    layer: int | None = None
    adapts: bool = False

    @classmethod
    def of(cls, config: Any) -> Needs:
        """The needs that a value function's config, or its `config.json`, records."""

        def get(name: str) -> Any:
            return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

        shared = cls(list(get("objectives")), get("base_model"), get("tokenizer_fingerprint"))
        if get("embedding_size") is not None:
            return replace(
                shared,
                vocabulary=get("vocab_size"),
                fingerprint=get("base_fingerprint"),
                sketch=get("base_sketch"),
                embedding=get("embedding_size"),
                width=get("hidden_size"),
                layer=get("layer"),
            )
        known = {"fingerprint": get("backbone_fingerprint"), "sketch": get("backbone_sketch")}
        if get("model_type") == "mavis_value_policy":
            return replace(shared, vocabulary=get("vocab_size"), adapts=True, **known)
        backbone: Any = get("backbone_config") or {}
        rows = backbone.get("vocab_size") if isinstance(backbone, Mapping) else getattr(backbone, "vocab_size", None)
        return replace(shared, vocabulary=rows, **known)

    @property
    def reads_states(self) -> bool:
        """Whether it is a value head's."""
        return self.embedding is not None

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if the tokens of `tokenizer` are others than those that the value function knows."""
        found = tokenizer_fingerprint(tokenizer)
        if self.tokenizer not in (None, found):
            raise ValueError(
                f"the value function for {self.objectives} reads tokens of another tokenizer ({self.tokenizer}, of "
                f"{self.base_model}) than the one given ({found}, {tokenizer.name_or_path}): use a value function made "
                f"for this base model{'' if self.reads_states or self.adapts else _RETOKENIZED}"
            )

    def check_scores(self, count: int, known: int) -> None:
        """Raise `ValueError` if a base model gives scores to `count` tokens, of which a value model knows fewer."""
        if known < count:
            raise ValueError(
                f"the value model for {self.objectives} knows {known} tokens, but the base model's scores have "
                f"{count}: it was made for another tokenizer; use one made for this base model. If the others only pad "
                "the base model's table, pass tokenizer=, or forbid them "
                f"(suppress_tokens=list(range({known}, {count})))"
            )

    def check_shape(self, model: nn.Module) -> None:
        """Raise `ValueError` if `model` has not the states or the output embedding that a value head was made for."""
        backbone = Backbone.of(model)
        rows, columns = backbone.output_embedding.shape
        if (rows, columns) != (self.vocabulary, self.embedding):
            way_out = f"use the head's own base model, {self.base_model}"
            if columns == self.embedding:
                way_out += f", or take the size back with model.resize_token_embeddings({self.vocabulary})"
            raise ValueError(
                f"this value head is for an output embedding of {self.vocabulary} x {self.embedding}, but "
                f"{backbone.name} has {rows} x {columns}: {way_out}"
            )
        layers = None if self.layer is None else len(backbone.layers)
        if layers is not None and not 1 <= self.layer <= layers:  # type: ignore[operator]
            raise ValueError(
                f"this value head reads the state after layer {self.layer}, but {backbone.name} has {layers} layers: "
                f"name one of 1 to {layers}, or none for what enters the output embedding"
            )
        width = backbone.width if self.layer is not None else columns
        if width != self.width:
            raise ValueError(
                f"this value head reads states of width {self.width}, but those of {backbone.name} have {width}: use "
                f"the head's own base model, {self.base_model}"
            )

    def check_states(self, model: nn.Module) -> None:
        """Raise `ValueError` if `model` computes other states than those that a value head was trained on."""
        found = Identity(model)
        difference = found.difference(self.fingerprint, self.sketch)
        if difference is not None:
            raise ValueError(
                f"this value head was trained on the hidden states of {self.base_model} (weights {self.fingerprint}), "
                f"but the model given has weights {found.fingerprint}: load that model, train a new head, or bind the "
                "head yourself with head.bind(model, check=False) if you know that the hidden states are the same. "
                f"What is different: {difference}"
            )

    def backbone_difference(self, trunk: nn.Module) -> str | None:
        """In words, what tells `trunk` from the layers that an adapter was trained on; None for nothing."""
        return Identity(trunk, vocabulary=self.vocabulary).difference(self.fingerprint, self.sketch)

    def in_words(self) -> dict[str, str]:
        """What a card says of it: for each thing that is needed, which."""
        base = self.base_model or "the base model"
        tokenizer = f"that of {base}" + (f" (fingerprint `{self.tokenizer}`)" if self.tokenizer else "")
        words = {"tokenizer": tokenizer}
        if self.vocabulary is not None:
            words["vocabulary"] = f"{self.vocabulary} tokens" + ("" if self.reads_states else " at most")
        if not self.reads_states:
            words["weights"] = self._weights() if self.adapts else "any: it reads tokens only"
            return words
        place = "what enters the output embedding" if self.layer is None else f"the state after layer {self.layer}"
        words["hidden state"] = f"{place}, of width {self.width}"
        words["output embedding"] = f"{self.vocabulary} x {self.embedding}"
        words["weights"] = self._weights()
        return words

    def _weights(self) -> str:
        if self.fingerprint is None:
            return "not recorded"
        known = "in any precision, or quantised" if self.sketch else "in float32 or bfloat16"
        return f"fingerprint `{self.fingerprint}`, {known}; adapters that are not active do not count"
