"""Changes to a user's objects that last no longer than someone needs them, in any number of threads."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")
Undo = Callable[[], None]


def fork_safe_lock() -> threading.Lock:
    """A lock for moments, never nested. A fork waits for it: no child has it locked by a thread that it has not."""
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


_lock = fork_safe_lock()


class Holds(Generic[T]):
    """A change that any number of holders ask for, made once for each object and undone when the last one lets go.

    Args:
        change: makes the change to an object and returns what undoes it.
    """

    def __init__(self, change: Callable[[T], Undo]) -> None:
        self._change = change
        # By identity, beside the object itself: an id is not used again while its object is here.
        self._held: dict[int, tuple[T, Undo, list[int]]] = {}
        self._released: deque[int] = deque()

    def hold(self, held: T) -> Hold:
        """Make the change to `held`, unless it is made already, and keep it until the hold is released."""
        with _lock:
            if id(held) not in self._held:
                self._held[id(held)] = (held, self._change(held), [0])
            self._held[id(held)][2][0] += 1
        self._settle()
        return Hold(self, id(held))

    def __contains__(self, held: T) -> bool:
        return id(held) in self._held

    def release(self, key: int) -> None:
        """One holder of the object with this id fewer."""
        self._released.append(key)
        self._settle()

    def _settle(self) -> None:
        # Releases also come from the garbage collector, in the midst of anything, the lines above included. So none of
        # them waits for the lock: whoever has it sees to them when done.
        while self._released and _lock.acquire(blocking=False):
            try:
                while self._released:
                    key = self._released.popleft()
                    _, undo, count = self._held[key]
                    count[0] -= 1
                    if not count[0]:
                        undo()
                        del self._held[key]
            finally:
                _lock.release()


class Hold:
    """One holder's share in a change. Ends with `release`, a `with` block, or when it is dropped."""

    def __init__(self, holds: Holds[Any], key: int) -> None:
        self._release = weakref.finalize(self, holds.release, key)
        self._release.atexit = False

    def release(self) -> None:
        """Let go, once and for all."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
