"""What copies and pickles of a processor or strategy are."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from ..values.ensemble import ValueFunctions
from .policy import Policy
from .trace import MavisStats, MavisTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Copied:
    """Something that is attached to a model, and steers it by value functions that may serve others too."""

    functions: ValueFunctions
    _base: weakref.ref[PreTrainedModel] | None

    @property
    def base(self) -> PreTrainedModel | None:
        """The model that this is attached to; it is not kept alive."""
        return None if self._base is None else self._base()

    def __copy__(self) -> Self:
        """Another that shares value functions, `stats` and `trace`, but not settings; attached to the same model."""
        return self._twin(dict(vars(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """An independent one with empty caches, attached to the same model.

        What is only read is shared: the value functions, unless they are copied too (as parts of what is being copied),
        the tokenizer, the streamer, functions.
        """
        state = dict(vars(self))
        for name, value in state.items():
            if isinstance(value, Policy):
                state[name] = replace(value, weights=value.weights.clone(), beta=value.beta.clone())
            elif isinstance(value, MavisStats | MavisTrace):
                state[name] = copy.deepcopy(value, memo)
            elif isinstance(value, dict | list | set):
                state[name] = copy.copy(value)
        state["functions"] = self.functions.replaced(memo)
        base = self.base
        if base is not None and id(base) in memo:
            state["_base"] = weakref.ref(memo[id(base)])
        twin = memo[id(self)] = self._twin(state)
        return twin

    def _twin(self, state: dict[str, Any]) -> Self:
        twin = object.__new__(type(self))
        twin.__setstate__(state)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: value functions and settings. Who loads it says by `attach` what it steers."""
        return {**vars(self), "_base": None} | ({"streamer": None} if "streamer" in vars(self) else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
