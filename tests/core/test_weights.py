"""Weights as people write them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mavis_logits.core.weights import parse_weights, weights_text

NAMES = st.text("abcdefghij_-", min_size=1, max_size=8)


@given(st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_what_is_written_is_read_to_the_last_digit(weights: dict[str, float]) -> None:
    assert parse_weights(weights_text(weights)) == weights


def test_whole_numbers_are_written_as_such() -> None:
    assert weights_text({"helpful": 1.0, "humour": 0.3}) == "helpful=1,humour=0.3"
