"""What a value function's config says of its outputs."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits.values.value_head import ValueHeadConfig

TABLE = {0.7: [0.0, -0.1], "1": [0.2, 0.3]}


def config(weight: object) -> ValueHeadConfig:
    return ValueHeadConfig(8, 8, 20, 16, objectives=["a", "b"], log_prob_weight=weight)


def test_what_log_pi_ref_counts_for_follows_the_temperature() -> None:
    made = config(TABLE)
    read = ValueHeadConfig.from_dict(json.loads(made.to_json_string()))
    assert read.log_prob_weight == made.log_prob_weight == {"0.7": [0.0, -0.1], "1": [0.2, 0.3]}
    assert read.log_prob_weight_at(0.7) == [0.0, -0.1]
    assert read.log_prob_weight_at(0.85) == pytest.approx([0.1, 0.1])
    assert read.log_prob_weight_at(0.1) == [0.0, -0.1]  # nothing is known of what lies beyond
    assert read.log_prob_weight_at(3.0) == [0.2, 0.3]


@given(st.floats(0.05, 5.0))
def test_one_list_is_for_every_temperature(temperature: float) -> None:
    assert config([0.2, -0.5]).log_prob_weight_at(temperature) == [0.2, -0.5]
    assert config(None).log_prob_weight_at(temperature) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "by temperatures above 0"), ({"warm": [0.1, 0.1]}, "by temperatures above 0"),
        ({"0": [0.1, 0.1]}, "by temperatures above 0"), ({"1": [0.1]}, "1 numbers for 2 objectives"),
        ({"1": [0.1, float("nan")]}, "must be finite"), ({"1": [0.1, 0.1], 1.0: [0.1, 0.1]}, "a temperature twice"),
        ({"1": None}, "must be finite"), ({"1": {"1": [0.1, 0.1]}}, "must be finite"), (0.1, "must be finite"),
        ([0.1], "1 numbers for 2 objectives"), ([0.1, float("inf")], "must be finite"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(given)
