"""Names that people write: which of those that are known they may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: object, known: Iterable[str]) -> str | None:
    """Which of the known names is near to one given, if one is."""
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return near[0] if near else None


def meant(given: object, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a message about an unknown name: ``"did you mean 'helpful'?"``.

    Args:
        given: the name.
        known: those that there are.
        otherwise: said where none of them is near; by default which ones there are.
    """
    names = list(known)
    if near := nearest(given, names):
        return f"did you mean {near!r}?"
    return f"known are {', '.join(names)}" if otherwise is None else otherwise
