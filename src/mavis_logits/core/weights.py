"""Weights of objectives as people write them: on a command line, in a chat, in a request to a server."""

from __future__ import annotations

from collections.abc import Mapping


def parse_weights(text: str, name: str = "--weights") -> dict[str, float]:
    """Parse ``"helpful=0.7,humour=0.3"``.

    Args:
        text: what was written.
        name: of what it was given for, for the message.

    Raises:
        ValueError: A part is not ``NAME=NUMBER``, or a name occurs twice.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        objective, sign, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            sign = ""
        if not (objective and sign):
            raise ValueError(f"{name} got {part!r}; expected NAME=NUMBER, e.g. helpful=0.7,humour=0.3")
        if objective in weights:
            raise ValueError(f"{name} names {objective!r} twice; give each objective one weight")
        weights[objective] = weight
    return weights


def weights_text(weights: Mapping[str, float]) -> str:
    """What `parse_weights` reads: ``"helpful=0.7,humour=0.3"``, to the last digit."""
    return ",".join(f"{name}={float(weight)!r}".removesuffix(".0") for name, weight in weights.items())
