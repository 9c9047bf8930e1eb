"""A set of value functions as one: which objectives it has, from which value function each comes, and its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..backbone.hidden import LOGITS, Layer
from ..backbone.needs import Needs
from ..core.config import recommended
from ..core.holds import Holds, Undo
from ..core.known import meant
from .function import ValueFunction, is_value_function
from .fused import FusedValueModel, fusable_groups, why_not_fused
from .retokenized import Retokenized
from .value_model import ValueModel
from .words import Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Outputs = list[tuple[str, ValueFunction, int]]


class ValueFunctions:
    """M objectives over any number of value models and value heads.

    Args:
        given: one value function, several, or a mapping from objective to value function.
        tokenizer: of the base model; value functions made for another are refused.
        fuse: whether value models with LoRA adapters on one backbone become one (`FusedValueModel`): None where it is
            possible, True to insist on it, False not.

    Attributes:
        outputs: (objective, value function, which of its outputs) of every objective.
        objectives: their names.
        all, models, heads: the value functions; those that read tokens; those that read the base model's states.
        words, value_models: of `models`, those whose values are what something makes likelier (an instruction, a tuned
            policy); those that are language models with a head of their own.
        of_ids: of `value_models`, those that read the base model's token ids, not others made of its text.

    Raises:
        ValueError: none given, an objective twice, one that its value function has not, another tokenizer, or with
            `fuse=True` value models that cannot be fused.
    """

    def __init__(self, given: Any, tokenizer: PreTrainedTokenizerBase | None = None, fuse: bool | None = None) -> None:
        outputs = _outputs(given)
        for _, function, _ in outputs:
            if tokenizer is not None:
                Needs.of(function.config).check_tokenizer(tokenizer)
        self._set(outputs if fuse is False else _fused(outputs, insist=fuse is True))

    def _set(self, outputs: Outputs) -> None:
        self.outputs = outputs
        self.objectives = [name for name, _, _ in outputs]
        self.all: list[ValueFunction] = list(dict.fromkeys(function for _, function, _ in outputs))
        self.models: list[Any] = [f for f in self.all if f.reads == "tokens"]
        self.heads: list[Any] = [f for f in self.all if f.reads == "states"]
        self.words = [model for model in self.models if isinstance(model, Words)]
        self.value_models: list[Any] = [model for model in self.models if not isinstance(model, Words)]
        self.of_ids: list[Any] = [model for model in self.value_models if not isinstance(model, Retokenized)]
        self.layers: set[Layer] = {head.config.layer for head in self.heads} | ({LOGITS} if self.words else set())
        self._vocabulary: int | None = None  # the smallest of the models'

    @property
    def recommended(self) -> dict[str, Any]:
        """The settings, fields of `MavisConfig`, that the value functions recommend for themselves."""
        return recommended(getattr(function.config, "settings", None) or {} for function in self.all)

    def replaced(self, others: Mapping[int, Any]) -> ValueFunctions:
        """The same with other value functions in place of some, by their ids (as in `copy.deepcopy`'s memo)."""
        twin = copy.copy(self)
        twin._set([(name, others.get(id(f), f), output) for name, f, output in self.outputs])
        return twin

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While they are asked for values: without dropout, whatever mode the user has left them in."""
        with ExitStack() as stack:
            for function in self.all:
                if not isinstance(function, nn.Module):
                    continue
                training = any(part.training for part in (function, *function.children()))
                if training or function in _evaluated:
                    stack.enter_context(_evaluated.hold(function))
            yield

    def refresh(self, thorough: bool = True) -> None:
        """Have all of them notice changes (`ValueFunction.refresh`)."""
        for function in self.all:
            function.refresh(thorough)
        if thorough:
            self._vocabulary = None

    def gather(self, parts: Mapping[Any, Tensor]) -> Tensor:
        """Values [R, k, M] of all objectives, from those of each value function; 0 for those not there."""
        missing = torch.zeros_like(next(iter(parts.values()))[..., 0])
        columns = [parts[f][..., output] if f in parts else missing for _, f, output in self.outputs]
        return torch.stack(columns, dim=-1)

    def units(self) -> Tensor:
        """Of each objective: mean and scale of the rewards, and what counts as one in a tilt, [3, M] on the CPU."""
        return torch.stack([f.units[:, output] for _, f, output in self.outputs], dim=1)

    def log_prob_weights(self, temperature: float = 1.0) -> Tensor:
        """[M] what a nat of log pi_ref counts for beside the values, in reward units, on the CPU.

        Args:
            temperature: that the reference is sampled at.
        """
        every = [(getattr(f.config, "log_prob_weight_at", None), output) for _, f, output in self.outputs]
        return torch.tensor([0.0 if of is None else of(temperature)[output] for of, output in every])

    @property
    def heed_temperature(self) -> bool:
        """Whether what a nat of log pi_ref counts for hangs on the temperature of the reference."""
        return any(isinstance(getattr(f.config, "log_prob_weight", None), dict) for f in self.all)

    def idle(self, weights: Tensor) -> list[bool]:
        """[M] whether the objective is a value function's all of whose objectives have weight 0: it need not be asked.

        With all weights 0 no objective is idle.
        """
        weighted = weights.reshape(-1, len(self.objectives)).any(dim=0).tolist()
        busy = {function for (_, function, _), weight in zip(self.outputs, weighted, strict=True) if weight}
        return [bool(busy) and f not in busy for _, f, _ in self.outputs]

    def busy_models(self, idle: Sequence[bool] | None = None) -> list[Any]:
        """The value models to be run; all of them where it is not said which objectives are `idle`."""
        return self._busy(self.models, idle)

    def busy_heads(self, idle: Sequence[bool] | None = None) -> list[Any]:
        """The value heads to be read; all of them where it is not said which objectives are `idle`."""
        return self._busy(self.heads, idle)

    def read_heads(
        self, states: Mapping[Layer, Tensor], candidates: Tensor | None, idle: Sequence[bool] | None = None
    ) -> dict[Any, Tensor]:
        """Values of every busy head, for `gather`.

        Args:
            states: of the base model, [R, d] by layer.
            candidates: [R, k] token ids; None for the whole vocabulary.
            idle: [M] the objectives that need no value.
        """
        return {head: head(states[head.config.layer], candidates) for head in self.busy_heads(idle)}

    def _busy(self, functions: list[Any], idle: Sequence[bool] | None) -> list[Any]:
        if idle is None:
            return functions
        resting = {function for (_, function, _), rests in zip(self.outputs, idle, strict=True) if rests}
        return [function for function in functions if function not in resting]

    def weights(self, given: Mapping[str, float] | Sequence[float] | Tensor | None) -> Tensor:
        """lambda as float32 [M] or [R, M].

        Raises:
            ValueError: an unknown objective, another number of weights than objectives, or one that is not finite.
        """
        count = len(self.objectives)
        if given is None:
            return torch.full((count,), 1 / count, dtype=torch.float32)
        if isinstance(given, Mapping):
            for name in given:
                if name not in self.objectives:
                    hint = meant(name, self.objectives, "")
                    raise ValueError(
                        f"weights name the objective {name!r}{hint and f' ({hint})'}; there are values for "
                        f"{self.objectives}"
                    )
            given = [given.get(name, 0.0) for name in self.objectives]
        try:
            weights = torch.as_tensor(given, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"weights must be numbers, by objective or in the order {self.objectives}, got {given!r}"
            ) from error
        if weights.ndim not in (1, 2) or weights.shape[-1] != count:
            raise ValueError(
                f"weights must be [{count}] or [rows, {count}] for {self.objectives}, got {list(weights.shape)}"
            )
        if not torch.isfinite(weights).all():
            raise ValueError(f"weights must be finite, got {weights.tolist()} for {self.objectives}")
        return weights

    def check_vocabulary(self, size: int) -> None:
        """Raise `ValueError` if a value model's vocabulary is smaller than the scores' (`size` tokens)."""
        for model in self.of_ids:
            Needs.of(model.config).check_scores(size, Backbone.of(model.backbone).vocabulary)

    def known(self, scores: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        """`scores` [R, V] without the ids that only pad the base model's table and that a value model does not know.

        Args:
            scores: next-token scores.
            tokenizer: of the base model; without it the ids must be forbidden already.

        Raises:
            ValueError: one of them may be a token. Waits for the device if there is no tokenizer to tell.
        """
        own = self._vocabulary  # another thread may forget it meanwhile
        if own is None:
            own = min((Backbone.of(m.backbone).vocabulary for m in self.of_ids), default=scores.shape[1])
            self._vocabulary = own
        if own >= scores.shape[1] or (tokenizer is None and torch.isneginf(scores[:, own:]).all()):
            return scores
        if tokenizer is None or len(tokenizer) > own:
            self.check_vocabulary(scores.shape[1])
        return torch.cat([scores[:, :own], torch.full_like(scores[:, own:], -torch.inf)], dim=1)


def _evaluate(function: nn.Module) -> Undo:
    """Turn dropout and the like off, which `eval` would for good."""
    training = [module for module in function.modules() if module.training]

    def switch(mode: bool) -> None:
        for module in training:
            module.training = mode

    switch(False)
    return lambda: switch(True)


_evaluated: Holds[nn.Module] = Holds(_evaluate)


def _outputs(given: Any) -> Outputs:
    """(objective, value function, which of its outputs) of every objective."""
    outputs: Outputs = []
    if isinstance(given, Mapping):
        for name, function in given.items():
            _check_kind(function)
            names = function.config.objectives
            if len(names) > 1 and name not in names:
                raise ValueError(f"{name!r} is none of the objectives {names} of its value function: use these names")
            outputs.append((name, function, names.index(name) if len(names) > 1 else 0))
    else:
        for function in given if isinstance(given, Iterable) else [given]:
            _check_kind(function)
            outputs += [(name, function, i) for i, name in enumerate(function.config.objectives)]
    names = [name for name, _, _ in outputs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            f"several value functions predict {sorted(twice)}: pass a mapping that gives each its own name"
        )
    if not outputs:
        raise ValueError("no value function given: pass at least one ValueModel or ValueHead, or objectives in words")
    return outputs


def _fused(outputs: Outputs, insist: bool) -> Outputs:
    """`outputs` with the value models that share a backbone replaced by one that runs them all."""
    models = list(dict.fromkeys(f for _, f, _ in outputs if isinstance(f, ValueModel)))
    candidates = [
        m for m in models if m.lora is not None or any(m.backbone is o.backbone for o in models if o is not m)
    ]
    if insist and len(models) < 2:
        raise ValueError(
            f"fuse=True runs several value models in one forward, but there is {len(models)}: leave it out"
        )
    if insist:
        if len(candidates) < len(models):
            names = [m.config.objectives for m in models if m not in candidates]
            raise ValueError(
                f"the value models for {names} have no LoRA adapter of their own on a shared backbone (a merged one "
                "cannot be told apart): load adapter repos with merge=False, or use fuse=False"
            )
        reason = next((r for m in models[1:] if (r := why_not_fused(models[0], m)) is not None), None)
        if reason is not None:
            raise ValueError(f"fuse=True, but {reason}; use fuse=False to score them one after another")
    for group in fusable_groups(candidates):
        fused = FusedValueModel(group)
        starts = dict(zip(group, accumulate((len(m.config.objectives) for m in group), initial=0), strict=False))
        outputs = [(name, *((fused, starts[f] + i) if f in starts else (f, i))) for name, f, i in outputs]
    return outputs


def _check_kind(function: Any) -> None:
    if not is_value_function(function):
        raise ValueError(
            f"expected a ValueModel or a ValueHead, got {type(function).__name__}; from_pretrained loads ids and "
            "folders"
        )


def with_words(
    given: Any,
    objectives: Mapping[str, str] | None,
    weights: Any,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Any:
    """Value functions with those of objectives in words.

    Args:
        given: value functions, as `ValueFunctions` takes them, or None.
        objectives: instructions by objective.
        weights: of all objectives; a name in them that is a sentence is an instruction too.
        tokenizer: of the base model.

    Raises:
        ValueError: no tokenizer, an instruction under the name of a value function, or as for `Words`.
    """
    own = [] if given is None else [name for name, _, _ in _outputs(given)]
    instructions = dict(objectives or {})
    if isinstance(weights, Mapping):
        sentences = [name for name in weights if isinstance(name, str) and len(name.split()) > 1]
        instructions |= {name: name for name in sentences if name not in own and name not in instructions}
    if not instructions:
        return given if given is not None else []
    twice = sorted(set(own) & set(instructions))
    if twice:
        raise ValueError(f"objectives give {twice} in words, and value functions predict them too: rename one of each")
    if tokenizer is None:
        raise ValueError(
            f"the objectives {list(instructions)} are in words, which the base model's tokenizer must put into the "
            "prompt: pass tokenizer=tokenizer (and model=model)"
        )
    words = Words(instructions, tokenizer)
    if isinstance(given, Mapping):
        return {**given, **dict.fromkeys(instructions, words)}
    listed = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    return [*listed, words]
