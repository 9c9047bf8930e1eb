"""A tiny model under test with its prompts, and the slow twins that say what is right.

The twin of a base model reads every prefix from scratch, alone. Some types of transformers say something else with a
cache than without, or beside padding; there the twin is `generate`'s own cached decoding of the same tokens, of the
row alone or of the batch, and the cell's detail says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from mavis_logits import ValueHead, ValueModel
from mavis_logits.backbone import Backbone
from mavis_logits.testing import algorithm_2
from model_types import BOS, EOS, PAD, PROMPT, build

STEPS, K, BETA = 4, 5, 3.0
# A written padding token would look like a row's end, and an end of sequence ends a row: neither is written.
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": [PAD, EOS]}
TOLERANCE = 1e-3  # of probabilities, and of values beside their spread
_SHORTER = 9  # tokens of the shorter prompt


class Wrong(Exception):
    """A result that differs from its twin."""


class Nothing(Exception):
    """There is nothing to try."""


Inner = Callable[[Any, int], Tensor]


class Subject:
    """A model of a type with prompts for it, and what its twins have said."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = build(name)
        generator = torch.Generator().manual_seed(1)
        rows = [torch.randint(3, 90, (n,), generator=generator) for n in (PROMPT, _SHORTER)]
        self.prompts = padded(rows)
        self.single = padded(rows[1:])
        self._fresh: dict[Any, Reading] = {}
        self._decoded: dict[Any, Any] = {}
        self.vocabulary = self.model.get_output_embeddings().weight.shape[0]
        self.read(rows[0])  # what cannot run at all is not built
        self.first, count = self._states()
        self.layer = max(1, count // 2)

    def read(self, tokens: Tensor, layer: int | None = None) -> Reading:
        """The model after `tokens`, read from scratch."""
        key = (tuple(tokens.tolist()), layer)
        if key not in self._fresh:
            self._fresh[key] = read(self.model, tokens[None], self.inner(layer))
        return self._fresh[key]

    def decode(self, inputs: dict[str, Tensor], sequences: Tensor, layer: int | None) -> list[list[Reading]]:
        """What `generate` reads on its way to `sequences`, by step and row."""
        key = (inputs["input_ids"].shape, tuple(sequences.flatten().tolist()), layer)
        if key not in self._decoded:
            self._decoded[key] = decode(self.model, inputs, sequences, self.inner(layer))
        return self._decoded[key]

    @torch.no_grad()
    def _states(self) -> tuple[int, int]:
        """Which layer's output comes first in `hidden_states`, and how many layers there are.

        It is 0 (the embedding), or 1 if it knows other tokens than its own.
        """
        ids, first = self.single["input_ids"], []
        for tokens in (ids, torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)):
            states = getattr(self.model(input_ids=tokens, output_hidden_states=True), "hidden_states", None)
            if not states:
                return 0, self.model.config.get_text_config(decoder=True).num_hidden_layers
            first.append(_at_end(states[0], 1))
        self._entries = len(states)
        knows = int(difference(*first) > 1e-4)
        return knows, len(states) - 1 + knows

    def inner(self, layer: int | None) -> Inner | None:
        """What takes the state [R, d] after `layer` from the hidden states that transformers gives of R rows."""
        if layer is None:
            return None

        def state(states: Any, rows: int) -> Tensor:
            if not states:
                raise Nothing("transformers gives no hidden states of this type")
            if len(states) != self._entries:
                raise Nothing("transformers gives hidden states of two streams of this type")
            return _at_end(states[layer - self.first], rows)

        return state

    def readings(self) -> dict[str, tuple[str, str]]:
        """How the library reads the model as a base, as a value model and in packed trees, each with the reason."""
        backbone = Backbone.of(self.model)
        refused = backbone.why_not_handed_on(self.model.device)
        reading = backbone.reading
        base = ("generate", refused or reading.reason) if refused or not reading.ragged else reading
        return {"base": tuple(base), "value": tuple(reading), "trees": tuple(backbone.trees)}

    @cached_property
    def value_model(self) -> ValueModel:
        """A tiny Llama that values this type's tokens."""
        return lively(ValueModel.from_backbone(build("llama", 1, vocab_size=self.vocabulary), ["a"], **_UNITS))

    def head(self, layer: int | None) -> ValueHead:
        torch.manual_seed(2)
        return ValueHead.for_model(self.model, ["a"], width=16, layer=layer).eval()

    @cached_property
    def own(self) -> ValueModel:
        """A value model whose backbone is of this type."""
        return self.own_value_model()

    def own_value_model(self, num_layers: int | None = None, **settings: Any) -> ValueModel:
        """A new one."""
        torch.manual_seed(3)
        return lively(ValueModel.from_backbone(self.model, ["a"], num_layers, pad_token_id=PAD, **_UNITS, **settings))


_UNITS = {"reward_mean": [0.5], "reward_scale": [2.0]}


def lively(model: ValueModel) -> ValueModel:
    """`model` with a random head and, if it has one, a random adapter."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        model.head.weight.normal_(std=0.5, generator=generator)
        for name, parameter in model.backbone.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Prompts padded on the left."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


@dataclass
class Reading:
    """What a base model said after a prefix: logits [V], what entered its output embedding [d], an inner state [d]."""

    logits: Tensor
    output: Tensor
    inner: Tensor | None


@contextmanager
def at_output(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What enters the output embedding in every forward pass."""
    caught: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: caught.append(
            args[0][:, 0] if args[0].ndim == 4 else args[0]
        )  # ProphetNet: the next token's stream
    )
    try:
        yield caught
    finally:
        hook.remove()


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, inner: Inner | None = None) -> Reading:
    """A plain forward pass over `ids` [1, T], without mask, positions or cache."""
    with at_output(model) as caught:
        forget(model)
        output = model(input_ids=ids, **({} if inner is None else {"output_hidden_states": True}))
    state = None if inner is None else inner(getattr(output, "hidden_states", None), 1)[0]
    return Reading(_suppressed(output.logits[0, -1]), last_position(caught[-1])[0], state)


def _at_end(states: Tensor, rows: int) -> Tensor:
    """[R, d] of the last position; the mean of parallel residual streams."""
    if states.ndim == 4:
        states = states.mean(dim=2) if states.shape[0] == rows else states.mean(dim=0)
    return states[:, -1]


def forget(model: PreTrainedModel | ValueModel) -> None:
    """Undo what reading longer texts has left: dynamic rotary frequencies stay stretched until a short text comes."""
    if any(getattr(module, "rope_type", None) == "dynamic" for module in model.modules()):
        model(torch.tensor([[BOS]]))


def _suppressed(logits: Tensor) -> Tensor:
    return logits.float().index_fill(-1, torch.tensor(GREEDY["suppress_tokens"]), -torch.inf)


def last_position(states: Tensor) -> Tensor:
    return states[:, -1] if states.ndim == 3 else states


class _Forced(LogitsProcessor):
    """Has `generate` write given tokens."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -1e9).scatter(1, self.sequences[:, input_ids.shape[1], None], 0.0)


@torch.no_grad()
def decode(
    model: PreTrainedModel, inputs: dict[str, Tensor], sequences: Tensor, inner: Inner | None
) -> list[list[Reading]]:
    """`generate`'s own cached decoding of `sequences` [R, T]: what it read, by step and row."""
    steps = sequences.shape[1] - inputs["input_ids"].shape[1]
    with at_output(model) as caught:
        out = model.generate(
            **inputs, logits_processor=[_Forced(sequences)], do_sample=False, max_new_tokens=steps,
            return_dict_in_generate=True, output_logits=True, output_hidden_states=inner is not None,
        )  # fmt: skip
    found = []
    for step, logits in enumerate(out.logits):
        state = None if inner is None else inner((out.hidden_states or {step: None})[step], len(logits))
        output = last_position(caught[step])
        found.append(
            [
                Reading(_suppressed(logits[r]), output[r], None if state is None else state[r])
                for r in range(len(logits))
            ]
        )
    return found


@torch.no_grad()
def fresh_values(model: ValueModel, prefix: Tensor, candidates: Tensor) -> Tensor:
    """[k] values of appending each candidate, the whole sequences read from scratch."""
    found = model.__dict__.setdefault("_fresh", {})
    key = (tuple(prefix.tolist()), tuple(candidates.tolist()))
    if key not in found:
        forget(model)
        sequences = torch.cat([prefix.expand(len(candidates), -1), candidates[:, None]], dim=1)
        found[key] = model(sequences).values[:, -1, 0]
    return found[key]


def policy(reading: Reading, values: Callable[[Reading, Tensor], Tensor]) -> Tensor:
    """[V] probabilities by Algorithm 2."""
    log_ref = torch.log_softmax(reading.logits.double(), dim=-1)
    candidates = log_ref.argsort(descending=True)[:K]
    found = dict(zip(candidates.tolist(), values(reading, candidates).tolist(), strict=True))
    return algorithm_2(log_ref, found.__getitem__, K, BETA)


def prefixes(inputs: dict[str, Tensor], sequences: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Step, row and unpadded prefix of every token written."""
    width = inputs["input_ids"].shape[1]
    for row, ids in enumerate(sequences):
        start = int((inputs["attention_mask"][row] == 0).sum())
        for step in range(sequences.shape[1] - width):
            yield step, row, ids[start : width + step]


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite for anything that is not a number."""
    found = float((a.double() - b.double()).abs().max())
    return found if found == found else float("inf")


def hold(error: float, what: str, tolerance: float = TOLERANCE) -> None:
    """Raise `Wrong` for an error above `tolerance`."""
    if not error <= tolerance:
        raise Wrong(f"{what} off by {error:.2g}")
