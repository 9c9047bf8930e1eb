"""How a decoder may be read faster than from scratch, decided by trial with a control.

Agreement alone says nothing where attention hardly moves the result. So one law is broken on purpose (candidates see
each other, branches see each other, the context is left out), and a way of reading is trusted only if it is off by less
than a fiftieth of what the broken law moves.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .anatomy import arguments_of, attention_windows, build, cut_config, field, layer_lists, states_of, text_config
from .attention import holding, implementation_of
from .cache import RaggedCache, attention_masks
from .specimen import WINDOW, Specimen, take_specimen
from .weights import copy_weights

Kind = Literal["packed", "masked", "repeated", "plain"]
_SHARE = 0.02  # of what the broken law moves
_LENGTHS = (WINDOW + 3, WINDOW + 8)  # of the rows of a trial
_CANDIDATES = 3
_lock = threading.Lock()
_known: dict[tuple[type, str, str], Any] = {}


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # in a forked child: who had it is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Reading(NamedTuple):
    """How a decoder is read.

    Attributes:
        kind: "packed": one forward over a ragged cache, void queries left out; "masked": one forward over a ragged
            cache; "repeated": the state after a row, repeated for every candidate; "plain": from scratch.
        reason: why not faster; empty for "packed".
    """

    kind: Kind
    reason: str

    @property
    def ragged(self) -> bool:
        """Whether it is over a `RaggedCache`."""
        return self.kind in ("packed", "masked")


class LayerPlace(NamedTuple):
    """Where the layers of a decoder are, and what they give.

    Attributes:
        name: of the list of layers.
        order: axes of a layer's output that are rows, positions and width; the others are parallel streams.
        times: how many times the model's width that is: of streams side by side.
        skipped: classes of layers in the list that text alone does not pass (they look at images).
    """

    name: str
    order: tuple[int, int, int]
    times: int = 1
    skipped: frozenset[type] = frozenset()

    def arranged(self, states: Tensor) -> Tensor:
        """A layer's output as [R, T, d]; of parallel streams the mean."""
        if states.ndim == 3 and self.order == (0, 1, 2):
            return states
        streams = [axis for axis in range(states.ndim) if axis not in self.order]
        ordered = states.permute(*self.order, *streams)
        return ordered.flatten(3).mean(dim=3) if streams else ordered


def reading_of(decoder: PreTrainedModel) -> Reading:
    """How candidates after cached rows may be read."""
    return _once(decoder, "reading", _try_readings)


def trees_of(decoder: PreTrainedModel) -> Reading:
    """Whether a tree packed into one sequence, without a cache, may be read ("packed"), or only path by path."""
    return _once(decoder, "trees", _try_trees)


def layers_of(decoder: PreTrainedModel) -> LayerPlace | str:
    """Where the layers of a decoder are, or why they cannot be told."""
    return _once(decoder, "layers", _try_layers)


def is_causal(decoder: PreTrainedModel) -> bool:
    """Whether states depend on earlier tokens only; True where it cannot be tried."""
    return _once(decoder, "causal", _try_causality)


def cut_of(decoder: PreTrainedModel, layers: int, keep: int) -> str | None:
    """Why a copy of only the first `keep` layers would not give what these give in the whole; None if it does."""
    return _once(decoder, f"cut to {keep} of {layers}", lambda whole: _try_cut(whole, layers, keep))


def _once(decoder: PreTrainedModel, question: str, trial: Callable[[PreTrainedModel], Any]) -> Any:
    """The answer of a trial, made once in a process for each class and configuration."""
    settings = decoder.config.to_dict() | {"implementation": implementation_of(decoder.config)}
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    key = (type(decoder), digest, question)
    if key not in _known:
        with _lock:
            if key not in _known:
                with (
                    torch.device("cpu"),
                    torch.random.fork_rng(devices=[]),
                    torch.inference_mode(False),
                    torch.no_grad(),
                    torch.autocast("cpu", enabled=False),
                ):
                    _known[key] = trial(decoder)
    return _known[key]


def _try_readings(decoder: PreTrainedModel) -> Reading:
    specimen = take_specimen(decoder)
    why = _not_ragged(decoder)
    if why is None:
        if isinstance(specimen, str):
            return Reading("plain", specimen)
        implementation = implementation_of(decoder.config)
        if implementation != "eager" and type(decoder)._supports_attention_backend:
            packed = _tried(lambda: _ragged_error(specimen, packed=True))
            if packed is None:
                return Reading("packed", "")
            why = packed
        else:
            why = f"its attention ({implementation}) is its own"
        masked = _tried(lambda: _ragged_error(specimen, packed=False))
        if masked is None:
            return Reading("masked", why)
        why = masked
    if isinstance(specimen, str):
        return Reading("plain", specimen)
    repeated = _tried(lambda: _repeated_error(specimen))
    return Reading("repeated", why) if repeated is None else Reading("plain", f"{why}; repeated states: {repeated}")


def _try_trees(decoder: PreTrainedModel) -> Reading:
    why = _not_ragged(decoder, cached=False)
    if why is None:
        specimen = take_specimen(decoder)
        why = specimen if isinstance(specimen, str) else _tried(lambda: _tree_error(specimen))
    return Reading("packed", "") if why is None else Reading("plain", why)


def _try_cut(decoder: PreTrainedModel, layers: int, keep: int) -> str | None:
    specimen = take_specimen(decoder, whole=True)
    place = layers_of_specimen(specimen) if isinstance(specimen, Specimen) else specimen
    if isinstance(specimen, str) or isinstance(place, str):
        return str(place)
    config = copy.deepcopy(specimen.decoder.config)
    try:
        cut_config(config, layers, keep)
        short = build(type(decoder), config, dtype=torch.float32).eval()
        copy_weights(specimen.decoder, short)
        again = field(type(config).from_dict(config.to_dict()), "layer_types")
    except Exception as error:  # a configuration may forbid it in its own words
        return str(error)
    if again is not None and again != field(config, "layer_types"):
        return f"its configuration wants {again[-1]} as the kind of the last layer"
    found: list[Tensor] = []
    tokens = specimen.tokens(2, max(_LENGTHS))
    for one in (specimen, Specimen(short)):
        layer = one.decoder.get_submodule(place.name)[keep - 1]  # type: ignore[index]
        handle = layer.register_forward_hook(lambda _, __, output: found.append(states_of(output)))
        try:
            one.states(tokens)
        finally:
            handle.remove()
    off, size = (found[0] - found[1]).abs().max(), found[0].abs().max()
    return None if off <= 1e-3 * size else f"the states after layer {keep} would be off by {off:.1g} of {size:.1g}"


def _try_causality(decoder: PreTrainedModel) -> bool:
    specimen = take_specimen(decoder)
    if isinstance(specimen, str):
        return True
    tokens = specimen.tokens(1, 9)
    changed = tokens.clone()
    changed[0, -1] = tokens[0, 0]
    whole, other = specimen.states(tokens)[0], specimen.states(changed)[0]
    return bool((whole[:-1] - other[:-1]).abs().max() <= _SHARE * (whole[-1] - other[-1]).abs().max())


def _not_ragged(decoder: PreTrainedModel, cached: bool = True) -> str | None:
    """What the class and its configuration say against 4-D masks, positions and a cache addressed by token."""
    config, arguments = text_config(decoder), arguments_of(decoder)
    if getattr(decoder, "_is_stateful", False):
        return "it keeps a recurrent state, which has no branches"
    implementation = implementation_of(config) or ""
    if "flash" in implementation or "flex" in implementation:
        return f'{implementation} takes no 4-D mask (attn_implementation="sdpa" does)'
    for name in ("position_ids", "attention_mask"):
        if name not in arguments.names:
            return f"its forward takes no {name}"
    if cached and arguments.cache is None:
        return "its forward takes no cache"
    if attention_windows(config) is None:
        kinds = sorted(set(getattr(config, "layer_types", None) or ["sliding_attention"]))
        return f"no mask is known for all of its kinds of layer ({', '.join(kinds)})"
    return None


def _tried(error: Callable[[], tuple[float, float]]) -> str | None:
    """None if a trial agrees; else why it does not.

    Args:
        error: gives the largest error of the trial, and how far the broken law moves the same numbers.
    """
    try:
        off, moved = error()
    except Exception as problem:  # foreign code that was made for other inputs fails in its own ways
        return f"it fails on a trial ({type(problem).__name__}: {str(problem)[:120]})"
    if off <= _SHARE * moved:
        return None
    return f"a trial is off by {off:.1g}, where a law broken on purpose moves {moved:.1g}"


@torch.no_grad()
def _ragged_error(specimen: Specimen, packed: bool) -> tuple[float, float]:
    """Two rows, two steps: candidates beside new tokens, then candidates after one was committed."""
    decoder, arguments = specimen.decoder, arguments_of(specimen.decoder)
    windows = attention_windows(specimen.config)
    assert windows is not None
    lengths = torch.tensor(_LENGTHS)
    tokens = specimen.tokens(2, max(_LENGTHS))
    rows = [row[len(row) - n :] for row, n in zip(tokens, _LENGTHS, strict=True)]
    off = moved = 0.0
    with holding(decoder) if packed else nullcontext():
        cache, broken = (RaggedCache(2) for _ in range(2))
        for step in range(2):
            fresh = tokens if step == 0 else tokens[:, :0]
            counts = lengths if step == 0 else torch.zeros_like(lengths)
            candidates = specimen.tokens(2, _CANDIDATES, seed=step + 1)
            first = fresh.shape[1]
            read = {}
            for one in (cache, broken):
                feed = one.prepare(fresh, counts, candidates, pack=packed)
                if one is broken:
                    end = one.lengths + counts
                    slot = torch.arange(feed.allowed.shape[-1])
                    siblings = (slot >= end[:, None]) & (slot < end[:, None] + _CANDIDATES)
                    feed.allowed[:, first:] |= siblings[:, None]
                inputs = arguments.bind(
                    type(decoder).__name__, feed.inputs(windows, torch.float32) | {"cache": one, "use_cache": True}
                )
                read[one is broken] = feed.columns(decoder(**inputs).last_hidden_state, first)[0]
            right = torch.stack([_after(specimen, r, c) for r, c in zip(rows, candidates, strict=True)])
            off = max(off, float((read[False] - right).abs().max()))
            moved = max(moved, float((read[True] - read[False]).abs().max()))
            chosen = torch.tensor([1, 2])
            for one in (cache, broken):
                one.advance(counts, first)
                one.longest = int(one.lengths.max())
                one.commit(chosen)
            rows = [torch.cat([r, c[i : i + 1]]) for r, c, i in zip(rows, candidates, chosen, strict=True)]
    return off, moved


@torch.no_grad()
def _repeated_error(specimen: Specimen) -> tuple[float, float]:
    """One row, two steps: its state repeated for every candidate; the broken law leaves the context out."""
    decoder, arguments = specimen.decoder, arguments_of(specimen.decoder)
    if arguments.cache is None:
        raise ValueError("its forward takes no cache")
    row = specimen.tokens(1, max(_LENGTHS))
    state = DynamicCache(config=specimen.config)
    read = {"use_cache": True}
    decoder(input_ids=row, **{arguments.cache: state}, **read)
    off = moved = 0.0
    for step in range(2):
        candidates = specimen.tokens(1, _CANDIDATES, seed=step + 1)[0]
        state.reorder_cache(torch.zeros(_CANDIDATES, dtype=torch.long))
        found = specimen.states(candidates[:, None], **{arguments.cache: state}, **read)[:, -1]
        right = _after(specimen, row[0], candidates)
        alone = specimen.states(candidates[:, None])[:, -1]
        off = max(off, float((found - right).abs().max()))
        moved = max(moved, float((alone - right).abs().max()))
        state.reorder_cache(torch.tensor([1]))
        row = torch.cat([row, candidates[None, 1:2]], dim=1)
    return off, moved


@torch.no_grad()
def _tree_error(specimen: Specimen) -> tuple[float, float]:
    """A prompt and two branches as one sequence; the broken law lets the second branch see the first."""
    windows = attention_windows(specimen.config)
    assert windows is not None
    arguments = arguments_of(specimen.decoder)
    prompt, branch = _LENGTHS
    size = prompt + 2 * branch
    tokens = specimen.tokens(1, size)
    positions = torch.cat([torch.arange(prompt), *[torch.arange(prompt, prompt + branch)] * 2])[None]
    node = torch.cat([torch.zeros(prompt), torch.ones(branch), torch.full((branch,), 2)])
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    visible = causal & ((node[None] == 0) | (node[None] == node[:, None]))
    read = []
    for seen in (visible, causal):
        mask = attention_masks(seen[None], positions, positions, windows, torch.float32)
        given = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
        read.append(specimen.states(tokens, **arguments.bind(type(specimen.decoder).__name__, given))[0])
    second = torch.cat([tokens[:, :prompt], tokens[:, prompt + branch :]], dim=1)
    right = torch.cat([specimen.states(tokens[:, : prompt + branch])[0], specimen.states(second)[0, prompt:]])
    return float((read[0] - right).abs().max()), float((read[1] - read[0]).abs().max())


def _after(specimen: Specimen, row: Tensor, candidates: Tensor) -> Tensor:
    """States [k, d] after `row` and each candidate, from scratch."""
    return specimen.states(torch.cat([row.expand(len(candidates), -1), candidates[:, None]], dim=1))[:, -1]


@torch.no_grad()
def _try_layers(decoder: PreTrainedModel) -> LayerPlace | str:
    specimen = take_specimen(decoder)
    return specimen if isinstance(specimen, str) else layers_of_specimen(specimen)


@torch.no_grad()
def layers_of_specimen(specimen: Specimen) -> LayerPlace | str:
    """Which list of modules runs one after the other when text is read, and how their outputs are laid out.

    Of several such lists it is the one after whose first module stand the hidden states that the model itself shows.
    """
    rows, positions = 3, 7
    called: dict[str, list[tuple[int, Tensor]]] = {}
    handles = []
    lists = layer_lists(specimen.decoder)
    for name, layers in lists.items():
        for i, layer in enumerate(layers):

            def hook(_: Any, __: Any, output: Any, name: str = name, i: int = i) -> None:
                called.setdefault(name, []).append((i, states_of(output)))

            handles.append(layer.register_forward_hook(hook))
    try:
        tokens = specimen.tokens(rows, positions)
        last = specimen.states(tokens).shape[-1]
        once = {name: list(calls) for name, calls in called.items()}
        shown = specimen.shown(tokens)
    finally:
        for handle in handles:
            handle.remove()
    width = getattr(specimen.config, "hidden_size", last)
    found = []
    for name, calls in once.items():
        numbers = [i for i, _ in calls]
        if numbers != sorted(set(numbers)):
            continue  # not one after the other, or several times
        shapes = {tuple(states.shape) for _, states in calls}
        order, times = _order(next(iter(shapes)), rows, positions, width) if len(shapes) == 1 else (None, 1)
        if order is not None:
            kinds = {type(lists[name][i]) for i in numbers}
            first = calls[0][1]
            is_shown = any(state.shape == first.shape and torch.equal(state, first) for state in shown)
            skipped = {type(layer) for layer in lists[name]} - kinds
            found.append((not is_shown, -len(calls), LayerPlace(name, order, times, frozenset(skipped))))
    if not found:
        return "its layers do not run one after the other on one state of the width of its output"
    return min(found, key=lambda item: item[:2])[2]


def _order(shape: tuple[int, ...], rows: int, positions: int, width: int) -> tuple[tuple[int, int, int] | None, int]:
    """The axes of rows, positions and width, and how many times the model's width the last is."""
    times = 1
    if width not in shape and len(shape) == 3 and shape[-1] % width == 0:
        times = shape[-1] // width  # parallel streams side by side
    found: list[int] = []
    for size in (rows, positions, width * times):
        axes = [axis for axis, own in enumerate(shape) if own == size and axis not in found]
        if not axes:
            return None, times
        found.append(axes[-1] if size == width * times else axes[0])
    return tuple(found), times  # type: ignore[return-value]
