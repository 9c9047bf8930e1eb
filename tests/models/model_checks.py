"""What is tried on every model type, each against an obvious slow twin.

The twin of a base model reads every prefix from scratch, alone. Some types of transformers say something else with a
cache than without, or beside padding; there the twin is `generate`'s own cached decoding of the same tokens, of the
row alone or of the batch, and the cell's detail says which.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from mavis_logits import MavisLogitsProcessor, MavisSampling, ValueHead, ValueModel
from mavis_logits.backbone import Backbone
from mavis_logits.testing import algorithm_2
from mavis_training.data import LabelledTree
from mavis_training.packing import (
    node_examples,
    packed_inputs,
    plain_inputs,
    require_packable,
    term_inputs,
    tree_example,
)
from mavis_training.targets import node_targets
from mavis_training.tree import Tree
from mavis_training.value_trainer import value_loss
from model_types import EOS, PAD, PROMPT, build

STEPS, K, BETA = 4, 5, 3.0
# A written padding token would look like a row's end, and an end of sequence ends a row: neither is written.
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": [PAD, EOS]}
TOLERANCE = 1e-3  # of probabilities, and of values beside their spread
_SHORTER = 9  # tokens of the shorter prompt


@dataclass
class Cell:
    """What came of one check: "exact", "refused", "wrong", "crash", or "-" where there is nothing to try."""

    verdict: str
    detail: str = ""


@dataclass
class Row:
    """All cells of one type."""

    name: str
    model_class: str = ""
    readings: dict[str, tuple[str, str]] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)


class Wrong(Exception):
    """A result that differs from its twin."""


class Nothing(Exception):
    """There is nothing to try."""


def sweep(name: str, only: set[str] | None = None) -> Row:
    """Try everything on one type."""
    row = Row(name)
    built = _try(lambda: Subject(name))
    row.cells["built"] = built[0]
    subject = built[1]
    if subject is None:
        return row
    row.model_class = type(subject.model).__name__
    row.cells["readings"], row.readings = _try(subject.readings)
    for check, run in CHECKS.items():
        if only is None or check in only:
            torch.manual_seed(0)
            row.cells[check] = _try(lambda run=run: run(subject))[0]
    return row


def _try(run: Callable[[], Any]) -> tuple[Cell, Any]:
    try:
        result = run()
    except Nothing as nothing:
        return Cell("-", str(nothing)), None
    except Wrong as wrong:
        return Cell("wrong", str(wrong)), None
    except Exception as error:
        return _broken(error), None
    return Cell("exact", result if isinstance(result, str) else ""), result


def _broken(error: Exception) -> Cell:
    """A ValueError of ours is a refusal; anything else is a crash, told with its last frames."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (
        f"{os.sep}mavis_logits{os.sep}" in frames[-1].filename
        or f"{os.sep}mavis_training{os.sep}" in frames[-1].filename
    )
    text = " ".join(str(error).split())[:400]
    if ours and isinstance(error, ValueError):
        return Cell("refused", text)
    where = "; ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
    return Cell("crash", f"{type(error).__name__}: {text} ({where})")


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
        self.layer = max(1, self.model.config.get_text_config(decoder=True).num_hidden_layers // 2)
        self.read(rows[0])  # what cannot run at all is not built
        self.first = self._first_state()

    def read(self, tokens: Tensor, layer: int | None = None) -> Reading:
        """The model after `tokens`, read from scratch."""
        key = (tuple(tokens.tolist()), layer)
        if key not in self._fresh:
            self._fresh[key] = read(self.model, tokens[None], None if layer is None else layer - self.first)
        return self._fresh[key]

    @torch.no_grad()
    def _first_state(self) -> int:
        """Which layer's output comes first in `hidden_states`: 0 (the embedding), or 1 if it knows other tokens."""
        ids = self.single["input_ids"]
        first = []
        for tokens in (ids, torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)):
            states = getattr(self.model(input_ids=tokens, output_hidden_states=True), "hidden_states", None)
            if not states:
                return 0
            first.append(_inner(states, 0, 1))
        return int(difference(*first) > 1e-4)

    def readings(self) -> dict[str, tuple[str, str]]:
        """How the library reads the model as a base, as a value model and in packed trees, each with the reason."""
        backbone = Backbone.of(self.model)
        refused = backbone.why_not_handed_on(self.model.device)
        reading = backbone.reading
        base = ("generate", refused or reading.reason) if refused or not reading.ragged else reading
        return {"base": tuple(base), "value": tuple(reading), "trees": tuple(backbone.trees)}

    def value_model(self) -> ValueModel:
        """A tiny Llama that values this type's tokens."""
        return lively(ValueModel.from_backbone(build("llama", 1, vocab_size=self.vocabulary), ["a"], **_UNITS))

    def head(self, layer: int | None) -> ValueHead:
        torch.manual_seed(2)
        return ValueHead.for_model(self.model, ["a"], width=16, layer=layer).eval()

    def own_value_model(self, num_layers: int | None = None, **settings: Any) -> ValueModel:
        """A value model whose backbone is of this type."""
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


# --- Twins


@dataclass
class Reading:
    """What a base model said after a prefix: logits [V], what entered its output embedding [d], an inner state [d]."""

    logits: Tensor
    output: Tensor
    inner: Tensor | None


@contextmanager
def _at_output(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What enters the output embedding in every forward pass."""
    caught: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        yield caught
    finally:
        hook.remove()


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, layer: int | None = None) -> Reading:
    """A plain forward pass over `ids` [1, T], without mask, positions or cache."""
    with _at_output(model) as caught:
        output = model(input_ids=ids, **({} if layer is None else {"output_hidden_states": True}))
    inner = None if layer is None else _inner(getattr(output, "hidden_states", None), layer, 1)[0]
    return Reading(_suppressed(output.logits[0, -1]), _last(caught[-1])[0], inner)


def _inner(states: Any, layer: int, rows: int) -> Tensor:
    """[R, d] of the last position, of one of a model's hidden states; the mean of parallel residual streams."""
    if states is None:
        raise Nothing("transformers gives no hidden states of this type")
    found = states[layer]
    if found.ndim == 4:
        found = found.mean(dim=2) if found.shape[0] == rows else found.mean(dim=0)
    return found[:, -1]


def _suppressed(logits: Tensor) -> Tensor:
    return logits.float().index_fill(-1, torch.tensor(GREEDY["suppress_tokens"]), -torch.inf)


def _last(states: Tensor) -> Tensor:
    return states[:, -1] if states.ndim == 3 else states


class _Forced(LogitsProcessor):
    """Has `generate` write given tokens."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -1e9).scatter(1, self.sequences[:, input_ids.shape[1], None], 0.0)


@torch.no_grad()
def decode(
    model: PreTrainedModel, inputs: dict[str, Tensor], sequences: Tensor, layer: int | None
) -> list[list[Reading]]:
    """`generate`'s own cached decoding of `sequences` [R, T]: what it read, by step and row."""
    steps = sequences.shape[1] - inputs["input_ids"].shape[1]
    with _at_output(model) as caught:
        out = model.generate(
            **inputs, logits_processor=[_Forced(sequences)], do_sample=False, max_new_tokens=steps,
            return_dict_in_generate=True, output_logits=True, output_hidden_states=layer is not None,
        )  # fmt: skip
    found = []
    for step, logits in enumerate(out.logits):
        inner = None if layer is None else _inner(out.hidden_states[step], layer, len(logits))
        output = _last(caught[step])
        found.append(
            [
                Reading(_suppressed(logits[r]), output[r], None if inner is None else inner[r])
                for r in range(len(logits))
            ]
        )
    return found


@torch.no_grad()
def fresh_values(model: ValueModel, prefix: Tensor, candidates: Tensor) -> Tensor:
    """[k] values of appending each candidate, every sequence read alone from scratch."""
    return torch.stack([model(torch.cat([prefix, token[None]])[None]).values[0, -1, 0] for token in candidates])


def policy(reading: Reading, values: Callable[[Reading, Tensor], Tensor]) -> Tensor:
    """[V] probabilities by Algorithm 2."""
    log_ref = torch.log_softmax(reading.logits.double(), dim=-1)
    candidates = log_ref.argsort(descending=True)[:K]
    found = dict(zip(candidates.tolist(), values(reading, candidates).tolist(), strict=True))
    return algorithm_2(log_ref, found.__getitem__, K, BETA)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite for anything that is not a number."""
    found = float((a.double() - b.double()).abs().max())
    return found if found == found else float("inf")


def hold(error: float, what: str, tolerance: float = TOLERANCE) -> None:
    """Raise `Wrong` for an error above `tolerance`."""
    if not error <= tolerance:
        raise Wrong(f"{what} off by {error:.2g}")


# --- The base model's side


class _Recorder(LogitsProcessor):
    """Keeps what goes into a processor and comes out of it."""

    def __init__(self, inner: MavisLogitsProcessor) -> None:
        self.inner = inner
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = self.inner(input_ids, scores.clone())
        self.calls.append((input_ids.clone(), scores.clone(), out.clone()))
        return out


def _plain(subject: Subject) -> str:
    """How far `generate`'s cached decoding is from reading from scratch; a note, not a verdict."""
    sequences = subject.model.generate(**subject.prompts, **GREEDY)
    errors = []
    for inputs, ids in _cases(subject, sequences):
        for step, row, prefix in _prefixes(inputs, ids):
            cached = _decoded(subject, inputs, ids, None)[step][row]
            errors.append(difference(cached.logits.softmax(-1), subject.read(prefix).logits.softmax(-1)))
    return f"cached from scratch {max(errors):.1g}"


def _cases(subject: Subject, sequences: Tensor) -> list[tuple[dict[str, Tensor], Tensor]]:
    return [(subject.prompts, sequences)]


def _prefixes(inputs: dict[str, Tensor], sequences: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Step, row and unpadded prefix of every token written."""
    width = inputs["input_ids"].shape[1]
    for row, ids in enumerate(sequences):
        start = int((inputs["attention_mask"][row] == 0).sum())
        for step in range(sequences.shape[1] - width):
            yield step, row, ids[start : width + step]


def _decoded(subject: Subject, inputs: dict[str, Tensor], sequences: Tensor, layer: int | None) -> list[list[Reading]]:
    key = (inputs["input_ids"].shape, tuple(sequences.flatten().tolist()), layer)
    if key not in subject._decoded:
        index = None if layer is None else layer - subject.first
        subject._decoded[key] = decode(subject.model, inputs, sequences, index)
    return subject._decoded[key]


def _functions(subject: Subject, kind: str) -> tuple[Any, int | None, Callable[[Tensor], Any]]:
    """A value function, the inner layer it reads, and given a prefix its values of (reading, candidates)."""
    if kind == "model":
        model = subject.value_model()
        return model, None, lambda prefix: lambda _, candidates: fresh_values(model, prefix, candidates)
    layer = subject.layer if kind == "inner" else None
    head = subject.head(layer)

    def of_head(reading: Reading, candidates: Tensor) -> Tensor:
        state = reading.output if layer is None else reading.inner
        with torch.no_grad():
            return head(state[None], candidates[None])[0, :, 0]

    return head, layer, lambda _: of_head


def _processor(kind: str) -> Callable[[Subject], str]:
    def check(subject: Subject) -> str:
        function, layer, twin = _functions(subject, kind)
        worst = 0.0
        for inputs in (subject.prompts, subject.single):
            mavis = MavisLogitsProcessor(
                function, {"a": 1.0}, BETA, model=subject.model, top_k=K, pad_token_id=PAD, eos_token_id=EOS
            )
            recorder = _Recorder(mavis)
            with _at_output(subject.model) as caught:
                out = subject.model.generate(
                    **inputs, logits_processor=[recorder], **GREEDY,
                    return_dict_in_generate=True, output_hidden_states=layer is not None,
                )  # fmt: skip
            mavis.detach()
            inner = None
            if layer is not None:
                states = out.hidden_states or [None] * STEPS
                inner = [_inner(states[step], layer - subject.first, len(out.sequences)) for step in range(STEPS)]
            for step, row, prefix in _prefixes(inputs, out.sequences):
                _, scores, tilted = recorder.calls[step]
                state = None if inner is None else inner[step][row]
                reading = Reading(scores[row].float(), _last(caught[step])[row], state)
                expected = policy(reading, twin(prefix))
                worst = max(worst, difference(tilted[row].double().softmax(-1), expected))
        hold(worst, "probabilities")
        return f"off by {worst:.1g}"

    return check


def _sampling(kind: str) -> Callable[[Subject], str]:
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
                try:
                    errors[name] = max(
                        difference(out.scores[step][row].double().exp(), policy(reading(), twin(prefix)))
                        for (step, row, prefix), reading in readings
                    )
                except Nothing:
                    raise
                if errors[name] <= TOLERANCE:
                    notes.add(f"{name}, off by {errors[name]:.1g}")
                    break
            else:
                raise Wrong("probabilities off by " + ", ".join(f"{e:.2g} from {n}" for n, e in errors.items()))
        return "; ".join(sorted(notes))

    return check


def _base_twins(subject: Subject, inputs: dict[str, Tensor], sequences: Tensor, layer: int | None) -> dict[str, Any]:
    """By name of the twin: pairs of (step, row, prefix) and what gives its reading."""
    places = list(_prefixes(inputs, sequences))

    def alone(step: int, row: int) -> Reading:
        start = int((inputs["attention_mask"][row] == 0).sum())
        own = {k: v[row : row + 1, start:] for k, v in inputs.items()}
        return _decoded(subject, own, sequences[row : row + 1, start:], layer)[step][0]

    return {
        "from scratch": [(place, lambda place=place: subject.read(place[2], layer)) for place in places],
        "cached alone": [(place, lambda place=place: alone(*place[:2])) for place in places],
        "cached in the batch": [
            (place, lambda place=place: _decoded(subject, inputs, sequences, layer)[place[0]][place[1]])
            for place in places
        ],
    }


def _beta_zero(kind: str) -> Callable[[Subject], None]:
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


def _beta_zero_sampling(subject: Subject) -> None:
    function, _, _ = _functions(subject, "model")
    for inputs in (subject.prompts, subject.single):
        plain = subject.model.generate(**inputs, **GREEDY)
        mavis = MavisSampling(function, {"a": 1.0}, 0.0, top_k=K, unscored="keep", pad_token_id=PAD, eos_token_id=EOS)
        steered = subject.model.generate(**inputs, custom_generate=mavis, **GREEDY, top_k=0)
        if not torch.equal(plain, steered):
            raise Wrong("tokens differ from plain generate's")


# --- The value side


def _values_read(subject: Subject, model: ValueModel, sampling: bool = False, steps: int = STEPS) -> str:
    """Values that a value model gave along a tiny Llama's decoding, against those recomputed."""
    base = build("llama", 1, vocab_size=subject.vocabulary)
    worst = {"from scratch": 0.0}
    for inputs in (subject.prompts, subject.single):
        kind = MavisSampling if sampling else MavisLogitsProcessor
        mavis = kind(model, {"a": 1.0}, BETA, top_k=K, pad_token_id=PAD, eos_token_id=EOS, trace=True)
        use = {"custom_generate": mavis, "top_k": 0} if sampling else {"logits_processor": [mavis]}
        sequences = base.generate(**inputs, **use, **GREEDY | {"max_new_tokens": steps})
        for step, row, prefix in _prefixes(inputs, sequences):
            traced = mavis.trace.steps[step]
            expected = fresh_values(model, prefix, traced.candidates[row])
            error = difference(traced.values[row, :, 0], expected) / max(1.0, float(expected.std()))
            worst["from scratch"] = max(worst["from scratch"], error)
            if error > TOLERANCE:
                cached = cached_values(model, prefix, int(inputs["attention_mask"][row].sum()), traced.candidates[row])
                error = difference(traced.values[row, :, 0], cached) / max(1.0, float(cached.std()))
                worst["cached"] = max(worst.get("cached", 0.0), error)
    if worst["from scratch"] <= TOLERANCE:
        return f"from scratch, off by {worst['from scratch']:.1g}"
    if worst["cached"] <= TOLERANCE:
        return f"cached, off by {worst['cached']:.1g} (from scratch: {worst['from scratch']:.1g})"
    raise Wrong("values off by " + ", ".join(f"{e:.2g} from those {n}" for n, e in worst.items()))


@torch.no_grad()
def cached_values(model: ValueModel, prefix: Tensor, prompt: int, candidates: Tensor) -> Tensor:
    """[k] values of the candidates as transformers decodes: the prompt, then token by token on its cache."""
    found = []
    for token in candidates:
        tokens = torch.cat([prefix, token[None]])[None]
        output = model(tokens[:, :prompt], use_cache=True)
        for at in range(prompt, tokens.shape[1]):
            mask = torch.ones(1, at + 1, dtype=torch.long)
            output = model(tokens[:, at : at + 1], mask, past_key_values=output.past_key_values, use_cache=True)
        found.append(output.values[0, -1, 0])
    return torch.stack(found)


def _value(subject: Subject) -> str:
    return _values_read(subject, subject.own_value_model())


def _value_sampling(subject: Subject) -> str:
    return _values_read(subject, subject.own_value_model(), sampling=True)


def _same_states(subject: Subject) -> str:
    """The copied backbone computes what the model computes."""
    model = subject.own_value_model()
    ids = subject.single["input_ids"]
    with torch.no_grad():
        own = model.backbone(input_ids=ids).last_hidden_state
        output = subject.model(input_ids=ids, output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if not states:
        raise Nothing("transformers gives no hidden states of this type")
    if states[-1].shape != own.shape:
        raise Nothing(f"its last hidden states are {list(states[-1].shape)}, the decoder's {list(own.shape)}")
    hold(difference(own, states[-1]) / float(own.std()), "last hidden states")
    return ""


@torch.no_grad()
def _same_values(subject: Subject, model: ValueModel, other: ValueModel) -> None:
    for ids in (subject.single["input_ids"], subject.prompts["input_ids"][:1]):
        mine, theirs = model(ids).values, other(ids).values
        hold(difference(mine, theirs) / max(1.0, float(mine.std())), "values after loading", 1e-4)


def _reload(subject: Subject) -> None:
    model = subject.own_value_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _same_values(subject, model, ValueModel.from_pretrained(folder))


def _truncated(subject: Subject) -> str:
    model = subject.own_value_model(1)
    found = _values_read(subject, model, steps=2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _same_values(subject, model, ValueModel.from_pretrained(folder))
    return found


def _lora(subject: Subject) -> None:
    try:
        model = subject.own_value_model(lora=LoraConfig(r=2, target_modules="all-linear"))
    except ValueError as error:
        if any("peft" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            raise Nothing(f"PEFT: {str(error)[:200]}") from error
        raise
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for merge in (False, True):
            _same_values(subject, model, ValueModel.from_pretrained(folder, backbone=subject.model, merge=merge))


# --- Training


def _tree() -> LabelledTree:
    """A prompt with two answers, of which one goes on in two ways; longer than every window."""
    rng = np.random.default_rng(0)
    lengths = np.array([3, 4, 3, 2])
    tree = Tree(
        prompt_id="p", prompt="p", prompt_tokens=rng.integers(3, 90, 7), tokens=rng.integers(3, 90, lengths.sum()),
        parent=np.array([-1, -1, 0, 0]), start=np.cumsum([0, *lengths[:-1]]), length=lengths,
        logp_gen=np.zeros(4), logp_ref=np.zeros(4), terminal=np.array([False, True, True, True]), columns={},
    )  # fmt: skip
    rewards = rng.normal(size=(3, 1))
    return LabelledTree(tree, rewards, node_targets(tree, rewards))


def _gradients(model: ValueModel, values: Tensor, examples: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    terms = term_inputs(examples)
    value_loss(values, terms, torch.tensor([2.0])).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return values[terms["rows"], terms["terms"]].detach()[:, 0], found


def _training(packed: bool) -> Callable[[Subject], str]:
    """Values and gradients of a batch of our making against those of every sequence alone."""

    def check(subject: Subject) -> str:
        model = subject.own_value_model()
        item = _tree()
        kept = np.ones(len(item.tree), dtype=bool)
        nodes = node_examples(item, kept, True)
        alone = [model(torch.from_numpy(e.input_ids)[None]).values[0] for e in nodes]
        rows = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
        values, gradients = _gradients(model, rows, nodes)
        if packed:
            windows = require_packable(model.backbone, "train it with packing: nodes")
            examples = [tree_example(item, kept, True)]
            inputs = packed_inputs(examples, windows, torch.float32)
        else:
            examples, inputs = nodes, plain_inputs(nodes)
        own, own_gradients = _gradients(model, model(**inputs).values, examples)
        order, own_order = _order(nodes), _order(examples)
        error = difference(own[own_order], values[order]) / max(1.0, float(values.std()))
        hold(error, "values")
        if own_gradients.keys() != gradients.keys():
            raise Wrong(f"other parameters have gradients: {sorted(own_gradients.keys() ^ gradients.keys())[:3]}")
        largest = max(float(g.abs().max()) for g in gradients.values())
        worst = max(difference(own_gradients[name], g) for name, g in gradients.items()) / largest
        hold(worst, "gradients (of the largest)")
        return f"values off by {error:.1g}, gradients by {worst:.1g}"

    return check


def _order(examples: Any) -> Tensor:
    """Terms of both forms in one order: by target, then by place in the text."""
    targets = np.concatenate([e.targets[:, 0] for e in examples])
    places = np.concatenate([e.position_ids[e.terms] for e in examples])
    return torch.from_numpy(np.lexsort((places, targets)))


CHECKS: dict[str, Callable[[Subject], Any]] = {
    "plain": _plain,
    "processor": _processor("model"),
    "processor_head": _processor("output"),
    "processor_inner": _processor("inner"),
    "sampling": _sampling("model"),
    "sampling_head": _sampling("output"),
    "sampling_inner": _sampling("inner"),
    "beta_zero": _beta_zero("model"),
    "beta_zero_head": _beta_zero("output"),
    "beta_zero_sampling": _beta_zero_sampling,
    "value": _value,
    "value_sampling": _value_sampling,
    "states": _same_states,
    "reload": _reload,
    "truncated": _truncated,
    "lora": _lora,
    "packed": _training(True),
    "nodes": _training(False),
}
