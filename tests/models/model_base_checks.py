"""What is tried with a type as the base model: the processor and the sampling strategy, against Algorithm 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mavis_logits import MavisLogitsProcessor, MavisSampling
from model_twins import (
    BETA,
    GREEDY,
    TOLERANCE,
    K,
    Reading,
    Subject,
    Wrong,
    at_output,
    difference,
    fresh_values,
    hold,
    last_position,
    policy,
    prefixes,
)
from model_types import EOS, PAD


class _Recorder(LogitsProcessor):
    """Keeps what goes into a processor and comes out of it."""

    def __init__(self, inner: MavisLogitsProcessor) -> None:
        self.inner = inner
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = self.inner(input_ids, scores.clone())
        self.calls.append((input_ids.clone(), scores.clone(), out.clone()))
        return out


def plain(subject: Subject) -> str:
    """How far `generate`'s cached decoding is from reading from scratch; a note, not a verdict."""
    sequences = subject.model.generate(**subject.prompts, **GREEDY)
    errors = []
    for step, row, prefix in prefixes(subject.prompts, sequences):
        cached = subject.decode(subject.prompts, sequences, None)[step][row]
        errors.append(difference(cached.logits.softmax(-1), subject.read(prefix).logits.softmax(-1)))
    return f"cached from scratch {max(errors):.1g}"


def _functions(subject: Subject, kind: str) -> tuple[Any, int | None, Callable[[Tensor], Any]]:
    """A value function, the inner layer it reads, and given a prefix its values of (reading, candidates)."""
    if kind == "model":
        model = subject.value_model
        return model, None, lambda prefix: lambda _, candidates: fresh_values(model, prefix, candidates)
    layer = subject.layer if kind == "inner" else None
    head = subject.head(layer)

    def of_head(reading: Reading, candidates: Tensor) -> Tensor:
        state = reading.output if layer is None else reading.inner
        with torch.no_grad():
            return head(state[None], candidates[None])[0, :, 0]

    return head, layer, lambda _: of_head


def processor(kind: str) -> Callable[[Subject], str]:
    def check(subject: Subject) -> str:
        function, layer, twin = _functions(subject, kind)
        worst = 0.0
        for inputs in (subject.prompts, subject.single):
            mavis = MavisLogitsProcessor(
                function, {"a": 1.0}, BETA, model=subject.model, top_k=K, pad_token_id=PAD, eos_token_id=EOS
            )
            recorder = _Recorder(mavis)
            with at_output(subject.model) as caught:
                out = subject.model.generate(
                    **inputs, logits_processor=[recorder], **GREEDY,
                    return_dict_in_generate=True, output_hidden_states=layer is not None,
                )  # fmt: skip
            mavis.detach()
            inner, take = None, subject.inner(layer)
            if take is not None:
                inner = [take(states, len(out.sequences)) for states in out.hidden_states or [None]]
            for step, row, prefix in prefixes(inputs, out.sequences):
                _, scores, tilted = recorder.calls[step]
                state = None if inner is None else inner[step][row]
                reading = Reading(scores[row].float(), last_position(caught[step])[row], state)
                expected = policy(reading, twin(prefix))
                worst = max(worst, difference(tilted[row].double().softmax(-1), expected))
        hold(worst, "probabilities")
        return f"off by {worst:.1g}"

    return check


def sampling(kind: str) -> Callable[[Subject], str]:
    def check(subject: Subject) -> str:
        function, layer, twin = _functions(subject, kind)
        notes = set()
        for inputs in (subject.prompts, subject.single):
            mavis = MavisSampling(function, {"a": 1.0}, BETA, top_k=K, pad_token_id=PAD, eos_token_id=EOS)
            out = subject.model.generate(
                **inputs, custom_generate=mavis, **GREEDY, top_k=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            errors = {}
            for name, readings in _base_twins(subject, inputs, out.sequences, layer).items():
                errors[name] = max(
                    difference(out.scores[step][row].double().exp(), policy(reading(), twin(prefix)))
                    for (step, row, prefix), reading in readings
                )
                if errors[name] <= TOLERANCE:
                    notes.add(f"{name}, off by {errors[name]:.1g}")
                    break
            else:
                raise Wrong("probabilities off by " + ", ".join(f"{e:.2g} from {n}" for n, e in errors.items()))
        return "; ".join(sorted(notes))

    return check


def _base_twins(subject: Subject, inputs: dict[str, Tensor], sequences: Tensor, layer: int | None) -> dict[str, Any]:
    """By name of the twin: pairs of (step, row, prefix) and what gives its reading."""
    places = list(prefixes(inputs, sequences))

    def alone(step: int, row: int) -> Reading:
        start = int((inputs["attention_mask"][row] == 0).sum())
        own = {k: v[row : row + 1, start:] for k, v in inputs.items()}
        return subject.decode(own, sequences[row : row + 1, start:], layer)[step][0]

    return {
        "from scratch": [(place, lambda place=place: subject.read(place[2], layer)) for place in places],
        "cached alone": [(place, lambda place=place: alone(*place[:2])) for place in places],
        "cached in the batch": [
            (place, lambda place=place: subject.decode(inputs, sequences, layer)[place[0]][place[1]])
            for place in places
        ],
    }


def beta_zero(kind: str) -> Callable[[Subject], None]:
    """With beta 0 `generate`'s scores are not touched."""

    def check(subject: Subject) -> None:
        function, _, _ = _functions(subject, kind)
        settings = GREEDY | {"return_dict_in_generate": True, "output_scores": True}
        torch.manual_seed(0)
        plain = subject.model.generate(**subject.prompts, **settings)
        mavis = MavisLogitsProcessor(
            function, {"a": 1.0}, 0.0, model=subject.model, top_k=K, unscored="keep", pad_token_id=PAD, eos_token_id=EOS
        )
        torch.manual_seed(0)
        steered = subject.model.generate(**subject.prompts, logits_processor=[mavis], **settings)
        mavis.detach()
        same = torch.equal(plain.sequences, steered.sequences)
        if not same or not all(map(torch.equal, plain.scores, steered.scores)):
            raise Wrong("scores differ from plain generate's" if same else "tokens differ from plain generate's")

    return check


def beta_zero_sampling(subject: Subject) -> str:
    """With beta 0 the tokens are plain `generate`'s, or (where the two differ) those of reading from scratch."""
    function, _, _ = _functions(subject, "model")
    notes = set()
    for inputs in (subject.prompts, subject.single):
        plain = subject.model.generate(**inputs, **GREEDY)
        mavis = MavisSampling(function, {"a": 1.0}, 0.0, top_k=K, unscored="keep", pad_token_id=PAD, eos_token_id=EOS)
        steered = subject.model.generate(**inputs, custom_generate=mavis, **GREEDY, top_k=0)
        if torch.equal(plain, steered):
            continue
        width = inputs["input_ids"].shape[1]
        for step, row, prefix in prefixes(inputs, steered):
            if subject.read(prefix).logits.argmax() != steered[row, width + step]:
                raise Wrong("tokens differ from plain generate's, and from those of reading from scratch")
        notes.add("as from scratch; plain generate writes other tokens")
    return "; ".join(notes)
