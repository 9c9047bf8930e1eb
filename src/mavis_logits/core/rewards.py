"""Calling reward functions by TRL's convention: `f(prompts, completions, **columns) -> list[float]`, also `async`."""

from __future__ import annotations

import asyncio
import inspect
import math
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, Protocol


class Reward(Protocol):
    """Scores R finished completions of R prompts (texts); further prompt columns come as lists of R."""

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float]:
        """Return R finite rewards, in order."""


def compute_rewards(
    reward: Reward,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, list[Any]],
    name: str,
    prompt_ids: Sequence[str] | None = None,
    completion_ids: list[list[int]] | None = None,
) -> list[float]:
    """Call a reward function as TRL's trainers do, with names, and check what it returns.

    A function takes what it names of all that is given, and with `**kwargs` all of it. One that names TRL's `log_extra`
    or `log_metric` is given a function that logs nothing.

    Args:
        reward: the function; it may leave out `prompts`, and be `async`.
        prompts: R texts.
        completions: R texts.
        columns: further columns, R entries each.
        name: of the reward, for error messages.
        prompt_ids: R ids of the prompts, for error messages.
        completion_ids: R lists of token ids, where they are known.

    Raises:
        ValueError: a column that the function needs is missing, or it returns another count than R, or something that
            is no finite number; or the function raises, which is then the error's cause: the message has the place
            in the code, and the completion as far as can be seen from outside.
    """
    given = {**columns, "prompts": prompts, "completions": completions}
    if completion_ids is not None:
        given["completion_ids"] = completion_ids
    arguments = _accepted(reward, given, name)
    try:
        returned = reward(**arguments)
        if inspect.iscoroutine(returned):
            with ThreadPoolExecutor(1) as thread:  # a notebook's own thread runs an event loop already
                returned = thread.submit(asyncio.run, returned).result()
        if isinstance(returned, Iterator):
            returned = list(returned)  # a generator raises here, if anywhere
    except Exception as error:  # a reward function is a user's: anything may come out of it
        where = _where_it_raised(error, completions, prompt_ids)
        if where is None and isinstance(error, ValueError):  # a reward of this library: its message says it all
            raise
        told = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"reward {name!r} raised {type(error).__name__} {where or 'in a library'}: {told}") from error
    if returned is None or isinstance(returned, str) or not hasattr(returned, "__iter__"):
        raise ValueError(f"reward {name!r} returned {type(returned).__name__}, expected a list of numbers.")
    rewards = [_number(value) for value in returned]
    if len(rewards) != len(completions):
        raise ValueError(f"reward {name!r} returned {len(rewards)} numbers for {len(completions)} completions.")
    bad = [i for i, value in enumerate(rewards) if not isinstance(value, float) or not math.isfinite(value)]
    if bad:
        where = f" (prompt {prompt_ids[bad[0]]!r})" if prompt_ids is not None else ""
        none = " A function of TRL may return None to skip a row; here every completion needs a number."
        raise ValueError(
            f"reward {name!r} gave {len(bad)} of {len(rewards)} completions no finite number: it is {rewards[bad[0]]} "
            f"for completion {bad[0]}{where}.{none if any(rewards[i] is None for i in bad) else ''}"
        )
    return rewards


def _accepted(function: Reward, given: dict[str, Any], name: str) -> dict[str, Any]:
    """What `function` can take of what is given: all of it if it has `**kwargs`, else what it names."""
    parameters = inspect.signature(function).parameters.values()
    named = given | dict.fromkeys(("log_extra", "log_metric"), _log_nothing)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]
    missing = [parameter for parameter in needed if parameter not in named]
    if missing:
        raise ValueError(
            f"reward {name!r} needs {missing}, there are {sorted(given)}: name the function's parameters prompts, "
            "completions and by columns that all prompts of the file have."
        )
    taken = {p.name: named[p.name] for p in parameters if p.name in named}
    return given | taken if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters) else taken


def _where_it_raised(error: Exception, completions: Sequence[str], prompt_ids: Sequence[str] | None) -> str | None:
    """The place in the user's code, and the prompt: that of the one completion which its variables hold, if any.

    None if no code of a user's was running.
    """
    own = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame)]
    if not own:
        return None
    frame, line = own[-1]
    place = f"in {frame.f_code.co_name}, {frame.f_code.co_filename}, line {line}, "
    by_text: dict[str, list[int]] = {}
    for index, completion in enumerate(completions):
        by_text.setdefault(completion, []).append(index)
    held = {value for frame, _ in own for value in frame.f_locals.values() if type(value) is str and value in by_text}
    found = by_text[held.pop()] if len(held) == 1 else []
    if prompt_ids is None:
        return f"{place}at completion {found[0]}" if found else f"{place}in a call with {len(completions)} completions"
    names = list(dict.fromkeys(prompt_ids[i] for i in found or range(len(completions))))
    if len(names) == 1:
        at = f"at completion {found[0]} of the call, " if found else ""
        return f"{place}{at}of prompt {names[0]!r}"
    many = ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{place}at a completion of one of the prompts {many}"


def _is_users(frame: FrameType) -> bool:
    """Whether a frame runs code that a user would mend: neither ours nor an installed package's nor Python's own."""
    paths, file = sysconfig.get_paths(), frame.f_code.co_filename
    installed = any(file.startswith(paths[key]) for key in ("stdlib", "purelib", "platlib"))
    ours = str(frame.f_globals.get("__name__", "")).startswith(("mavis_logits.", "mavis_training."))
    return not (ours or installed or file.startswith("<frozen"))


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a trainer's `log_extra(column, values)` and `log_metric(name, value)`."""


def _number(value: Any) -> Any:
    """A number of any library as a float; anything else as it is."""
    try:
        return value if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return value
