"""Hooks on a user's modules that go with whoever needs them, and are none in a copy of the model."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..core.holds import Hold, Holds, Undo, fork_safe_lock

_lock = fork_safe_lock()


class Hook:
    """A forward hook, called with all but the module. In a deep copy of the module it takes itself off.

    Args:
        call: what to call; None for a hook that is to go.
    """

    def __init__(self, call: Callable[..., None] | None) -> None:
        self.call = call

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if self.call is not None:
            self.call(*given)
        elif not torch.compiler.is_compiling():
            _take_off(module, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        # In a pickled model it is a function of the standard library that does nothing: the model can be loaded without
        # this package.
        return getattr, (nullcontext(), "__exit__")


def before(module: nn.Module, call: Callable[..., None], with_kwargs: bool = False) -> RemovableHandle:
    """Have `call` called with the arguments of every forward of `module`, as a tuple and, if asked for, a dictionary.

    A call of another thread that has begun when the hook comes or goes may lack the dictionary.
    """
    with _lock:  # torch numbers hooks without one: two hooks of one number would be one
        return module.register_forward_pre_hook(Hook(call), with_kwargs=with_kwargs)


def after(module: nn.Module, call: Callable[..., None]) -> RemovableHandle:
    """Have `call` called with the arguments and the output of every forward of `module`."""
    with _lock:
        return module.register_forward_hook(Hook(call))


@contextmanager
def undisturbed(local: threading.local) -> Iterator[None]:
    """While it is open, what hooks note in `local` is forgotten at its end: the model reads for someone else."""
    kept = dict(vars(local))
    try:
        yield
    finally:
        vars(local).clear()
        vars(local).update(kept)


def let_compiled_code_see(model: nn.Module) -> Hold | None:
    """To be called when modules inside `model` have got hooks: have compiled code run them.

    torch.compile takes modules without hooks to stay so, and shares what it has compiled among all models of a class. A
    model compiled before would go on without our hooks. So where it is compiled, all compiled code is dropped, to be
    compiled again when used, and from then on the compiler watches for hooks, until what is returned is released.

    Returns:
        None where the model is not compiled; nothing is changed then.
    """
    if not is_compiled(model):
        return None
    dynamo = importlib.import_module("torch._dynamo")
    unaware = dynamo.config.skip_nnmodule_hook_guards
    hold = _watching.hold(dynamo.config)
    if unaware:
        torch.compiler.reset()
    return hold


def _watch_for_hooks(config: Any) -> Undo:
    before = config.skip_nnmodule_hook_guards
    config.skip_nnmodule_hook_guards = False

    def undo() -> None:
        config.skip_nnmodule_hook_guards = before

    return undo


_watching = Holds(_watch_for_hooks)


def is_compiled(model: nn.Module) -> bool:
    """Whether `model` or a module in it was given to torch.compile: itself, its forward, or its call by `generate`."""
    for module in model.modules():
        own = vars(module)
        compiled = (
            own.get("_compiled_call_impl") is not None or "_compiled_call" in own or "_orig_mod" in own["_modules"]
        )
        if compiled or hasattr(own.get("forward"), "_torchdynamo_orig_callable"):
            return True
    return False


def _take_off(module: nn.Module, hook: Hook) -> None:
    for hooks, others in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for number in [number for number, found in list(hooks.items()) if found is hook]:
            hooks.pop(number, None)
            others.pop(number, None)
