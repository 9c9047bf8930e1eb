"""Short records that tell whether a value function belongs to a tokenizer and a base model.

A base model is known by what computes its states: the weights of its decoder and of what lies between that and the
scores, with the adapters that are active, whatever the model is called, wherever it lies and whoever wraps it.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import Backbone
from .weights import Weight, active_adapters, canonical, loaded_adapters, named_weights, spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLES = 64  # of every weight in a fingerprint
_SKETCHED = 4  # of these in a sketch
_SEGMENT = 32  # neighbours with one scale in all ways of quantising
_FEW = 24  # different values among these, where floating-point numbers have as many as there are
_ENTRY = struct.Struct(f"<4sBBf{_SKETCHED}f")  # of a sketch: name, number of samples, rounding, grid, samples
_ROUNDINGS = (torch.float16, torch.bfloat16)  # numbered from 1; 0: to neither
_ROUNDED_BY = (0.0, 2.0**-11, 2.0**-8)  # relatively at most
_SMALLEST = 2.0**-25  # and what float16 rounds small numbers by
_NOISE = 2.0**-18  # of an adapter that was merged


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that two tokenizers share exactly when every token has the same id in both."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{index}\0{token}\0".encode())
    return digest.hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """The fingerprint of a base model: see `Identity`."""
    return Identity(model).fingerprint


def parameters_fingerprint(model: nn.Module) -> str:
    """16 hex digits of every parameter of a model: for a value function; of a base model, its fingerprint of version 1.

    A strided sample of each, rounded to bfloat16: the same for a checkpoint loaded in float32 or bfloat16.
    """
    found: dict[int, Weight] = {}
    for weight in named_weights(model):
        if weight.is_parameter:
            found.setdefault(id(weight.raw), weight)  # tied weights count once, under their first name
    digest = hashlib.sha256()
    for weight in sorted(found.values(), key=lambda weight: weight.name):
        tensor, _ = weight.read()
        digest.update(weight.name.encode())
        if tensor is not None:
            flat = tensor.reshape(-1)
            sample = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]
            digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Sample:
    """Some values of one weight in float32, what the weight is rounded to, and how far quantising may have moved it."""

    values: NDArray[np.float32]
    rounding: int = 0
    grid: float = 0.0

    @property
    def rounded(self) -> bytes:
        """The values in bfloat16."""
        return torch.from_numpy(self.values).bfloat16().float().numpy().tobytes()

    def strays(self, other: _Sample) -> int:
        """How many of the values another copy of the weight cannot have by rounding or quantising."""
        moved = np.abs(other.values - self.values)
        size = np.maximum(np.abs(other.values), np.abs(self.values))
        allowed = _NOISE * (size + size.mean()) + _SMALLEST + self.grid + other.grid
        if self.rounding != other.rounding:
            allowed += (_ROUNDED_BY[self.rounding] + _ROUNDED_BY[other.rounding]) * size
        return int((~(moved <= allowed)).sum())

    def distance(self, other: _Sample) -> float:
        """Relative to the size of this one."""
        return float(np.linalg.norm(other.values - self.values) / max(float(np.linalg.norm(self.values)), 1e-30))


class Identity:
    """What computes the states of a language model, in a form that can be kept in a config.

    Args:
        model: wrapped or not, quantised, offloaded, with adapters or without.
        adapters: whether active adapters count.
        vocabulary: compare no more rows of the token embeddings than these: a table may have grown since.
    """

    def __init__(self, model: nn.Module, adapters: bool = True, vocabulary: int | None = None) -> None:
        self.model, self.adapters, self.vocabulary = model, adapters, vocabulary

    @cached_property
    def fingerprint(self) -> str:
        """ "2:" and 16 hex digits: the same for all copies of a model in float32 or bfloat16."""
        digest = hashlib.sha256()
        for name, sample in sorted(self._samples.items()):
            digest.update(name.encode())
            digest.update(b"" if sample is None else sample.rounded)
        return f"2:{digest.hexdigest()[:16]}"

    @cached_property
    def sketch(self) -> str:
        """A few values of every weight in base64: by these a copy is known also when it was rounded or quantised."""
        entries = []
        for name, sample in sorted(self._samples.items()):
            if sample is not None and len(sample.values):
                values, count = np.resize(sample.values, _SKETCHED), min(len(sample.values), _SKETCHED)
                entries.append(_ENTRY.pack(_key(name), count, sample.rounding, sample.grid, *values))
        return base64.b64encode(b"".join(entries)).decode()

    def difference(self, fingerprint: str | None, sketch: str | None = None) -> str | None:
        """In words, what a model that a record was made of has that this one has not, or the other way round.

        Args:
            fingerprint: of version 1 or 2; None if unknown.
            sketch: of the same model; None if unknown.

        Returns:
            None if it is the same model as far as can be told.

        Raises:
            ValueError: the record is none, or of a newer version.
        """
        if fingerprint is None or self._has(fingerprint):
            return None
        found = self._unlike(sketch) if sketch is not None else [self._others(fingerprint)]
        if not found:
            return None
        if self.adapters and (active := active_adapters(self.model)):
            if Identity(self.model, False, self.vocabulary).difference(fingerprint, sketch) is None:
                return f"the adapter {', '.join(active)} is active, without which it is the same: disable it"
            found.append(f"the adapter {', '.join(active)} is active")
        elif self.adapters and (loaded := loaded_adapters(self.model)):
            found.append(f"of its adapters {', '.join(loaded)} none is active")
        return "; ".join(found)

    def _others(self, fingerprint: str) -> str:
        if ":" in fingerprint:
            return "its weights are others, or in another precision (a fingerprint without a sketch cannot tell)"
        return "its weights are others, or in a precision that a fingerprint of version 1 does not know (float16, int8)"

    def _has(self, fingerprint: str) -> bool:
        version, colon, _ = fingerprint.rpartition(":")
        if colon and version != "2":
            raise ValueError(
                f"the fingerprint {fingerprint!r} of a base model is of version {version}, which this mavis-logits "
                "does not know: pip install -U mavis-logits"
            )
        return (self.fingerprint if colon else parameters_fingerprint(self.model)) == fingerprint

    def _unlike(self, sketch: str) -> list[str]:
        """What differs from a sketch, in words."""
        kept = _entries(sketch)
        samples = {_key(name): (name, sample) for name, sample in self._samples.items()}
        unreadable = any(sample is None for sample in self._samples.values())
        missing = [key for key in kept if key not in samples]
        added = [name for key, (name, _) in samples.items() if key not in kept]
        found = []
        if missing:
            found.append(f"it lacks {len(missing)} of {len(kept)} weights")
        if added:
            found.append(f"it has {len(added)} more, {added[0]} among them")
        compared, difference = _compared({key: one for key, one in samples.items() if key in kept}, kept)
        if difference is not None:
            found.append(difference)
        if not compared and not found:
            found.append("none of its weights can be read" if unreadable else "it has no weights")
        return found

    @cached_property
    def _samples(self) -> dict[str, _Sample | None]:
        """By canonical name; None for weights that cannot be read."""
        tables = _token_tables(self.model)
        found: dict[str, _Sample | None] = {}
        for weight in base_weights(self.model, self.adapters):
            tensor, quantised = weight.read()
            if tensor is not None and id(weight.module) in tables and self.vocabulary is not None:
                tensor = tensor[: self.vocabulary]
            found[weight.name] = None if tensor is None else _sampled(tensor, quantised)
        return found


def weights_difference(weights: Mapping[str, Tensor], sketch: str | None) -> tuple[int, str | None]:
    """Compare some weights of a model, such as an engine has them, with the sketch of one.

    Args:
        weights: plain tensors by canonical name, those only that are there whole.
        sketch: of the model that they should be of; None if unknown.

    Returns:
        how many values were compared, and in words what differs; None for nothing.
    """
    kept = {} if sketch is None else _entries(sketch)
    samples = {_key(name): (name, _sampled(tensor, None)) for name, tensor in weights.items() if _key(name) in kept}
    return _compared(samples, kept)


def _compared(
    samples: Mapping[bytes, tuple[str, _Sample | None]], kept: Mapping[bytes, _Sample]
) -> tuple[int, str | None]:
    """How many values of `samples` were compared with those `kept`, and in words what differs; None for nothing."""
    off: dict[str, float] = {}
    strayed, compared, found = 0, 0, []
    for key, (name, now) in samples.items():
        if now is None:
            continue
        before, now = kept[key], replace(now, values=now.values[:_SKETCHED])
        if len(now.values) != len(before.values):
            found.append(f"its {name} has another size")
            continue
        compared += len(now.values)
        if far := before.strays(now):
            off[name] = before.distance(now)
            strayed += far
    # One value among very many may stray: two roundings do not always add up to less than the sum of their bounds.
    if strayed > compared // 512:
        worst = max(off, key=lambda name: off[name])
        found.append(f"{len(off)} of {len(kept)} weights differ, {worst} the most, by {off[worst]:.1%}")
    return compared, "; ".join(found) or None


def base_weights(model: nn.Module, adapters: bool = True) -> Iterator[Weight]:
    """The weights that compute the states and scores of text, under names that begin at the decoder.

    A vision or audio tower beside the decoder takes no part; an encoder that reads the prompt does.
    """
    backbone = Backbone.of(model)
    inside = {id(module) for module in backbone.decoder.modules()}
    body = [] if backbone.is_encoder_decoder else backbone.model.base_model.modules()
    aside = {id(module) for module in body} - inside
    path = next(name for name, module in backbone.model.named_modules() if module is backbone.decoder)
    prefix = f"{canonical(path)}." if path else ""
    for weight in named_weights(model, adapters):
        if id(weight.module) not in aside:
            yield replace(weight, name=weight.name.removeprefix(prefix))


def _token_tables(model: nn.Module) -> set[int]:
    """The ids of the modules that hold a row for each token."""
    bare = Backbone.of(model).model
    tables = (bare.get_input_embeddings(), bare.get_output_embeddings())
    return {id(module) for table in tables if table is not None for module in table.modules()}


def _sampled(tensor: Tensor, quantised: Tensor | None) -> _Sample:
    flat = tensor.reshape(-1)
    places = _places(len(flat))
    sample = flat[places.to(flat.device)].float().cpu() + 0.0  # no -0.0
    values, rounding = sample.numpy(), _rounding(sample)
    if not len(flat) or (quantised is None and not _has_few_levels(flat, int(places[0]))):
        return _Sample(values, rounding)
    levels = flat if quantised is None else quantised.reshape(-1)
    row, grids = tensor.shape[-1], []
    # Scales are for parts of a row (torchao) or parts of the whole (bitsandbytes).
    for at in places[:_SKETCHED].tolist():
        begin = at - at % row
        in_row, in_all = begin + (at - begin) // _SEGMENT * _SEGMENT, at - at % _SEGMENT
        for first, end in ((in_row, min(in_row + _SEGMENT, begin + row)), (in_all, in_all + _SEGMENT)):
            grids.append(_grid(levels[first:end].float().cpu().numpy(), at - first))
    return _Sample(values, rounding, max(grids))


def _rounding(values: Tensor) -> int:
    """What numbers have been rounded to, whatever they are kept in now."""
    found = (number for number, dtype in enumerate(_ROUNDINGS, 1) if torch.equal(values.to(dtype).float(), values))
    return max(found, default=0)


def _has_few_levels(flat: Tensor, at: int) -> bool:
    """Whether a weight has been quantised and taken back, as GGUF files are when they are loaded."""
    start = at - at % _SEGMENT
    neighbours = flat[start : start + _SEGMENT].float().cpu().numpy()
    return len(neighbours) == _SEGMENT and 1 < len(np.unique(neighbours)) <= _FEW


def _places(count: int) -> Tensor:
    """Where in a flat tensor samples are taken: spread by the golden ratio, the first ones as well as all."""
    if count <= _SAMPLES:
        return torch.arange(count)
    return torch.tensor(spread(_SAMPLES, count))


def _grid(neighbours: NDArray[np.float32], at: int) -> float:
    """How far apart the values are that a quantised weight can take, around one of its elements.

    The levels are seen in the neighbours that share its scale. Where they are evenly spaced the smallest step counts,
    else the wider of the two beside the element.

    Args:
        neighbours: the elements around it.
        at: which of them it is.
    """
    levels = np.unique(neighbours)
    if len(levels) < 2:
        return float(np.abs(levels).max())
    steps = np.diff(levels)
    ratios = steps / steps.min()
    if (np.abs(ratios - ratios.round()) < 0.1).all():
        return float(steps.min())
    index = int(np.abs(levels - neighbours[at]).argmin())
    return float(steps[max(0, index - 1) : index + 1].max())


def _key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:4]


def _entries(sketch: str) -> dict[bytes, _Sample]:
    """What a sketch has kept of every weight, by key."""
    try:
        entries = list(_ENTRY.iter_unpack(base64.b64decode(sketch, validate=True)))
    except (ValueError, struct.error) as error:
        raise ValueError(
            f"a sketch of a base model's weights is damaged ({error}): download or save it again"
        ) from error
    return {
        key: _Sample(np.array(values[:count], np.float32), rounding, grid)
        for key, count, rounding, grid, *values in entries
    }
