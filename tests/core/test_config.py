"""Settings: the paper's defaults, JSON there and back, and refusals that say what to do."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits import MavisConfig
from mavis_logits.core.config import recommended

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-6, 1e6)
configs = st.builds(
    MavisConfig,
    weights=st.none() | st.dictionaries(st.text(min_size=1), finite, min_size=1, max_size=3),
    beta=st.floats(0, 1e6) | st.integers(0, 100),
    top_k=st.none() | st.integers(1, 1000),
    normalize=st.sampled_from(["minmax", "gap", "center", "none", "standard"]),
    unscored=st.sampled_from(["drop", "keep", "expected"]),
    kl_budget=st.none() | positive,
    reference_temperature=positive,
    gap_floor=positive,
)


def test_the_defaults_are_the_papers() -> None:
    config = MavisConfig()
    assert (config.beta, config.top_k, config.normalize, config.unscored) == (5.0, 15, "minmax", "drop")
    assert config.weights is None
    assert config.kl_budget is None


@given(configs)
def test_json_there_and_back_is_the_same(config: MavisConfig) -> None:
    assert MavisConfig.from_json(config.to_json()) == config
    assert MavisConfig.from_dict(json.loads(config.to_json())) == config


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MavisConfig().beta = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("beta", -1.0, "at least 0"),
        ("beta", math.nan, "a finite number"),
        ("beta", math.inf, "a finite number"),
        ("beta", "5", "a finite number"),
        ("beta", True, "a finite number"),
        ("top_k", 0, "at least 1, or None for all tokens"),
        ("top_k", -3, "at least 1"),
        ("top_k", 2.5, "a whole number"),
        ("top_k", True, "a whole number"),
        ("normalize", "softmax", "one of 'minmax', 'none', 'standard', 'center', 'gap'"),
        ("unscored", "forget", "one of 'drop', 'keep'"),
        ("kl_budget", 0.0, "above 0"),
        ("kl_budget", math.nan, "above 0"),
        ("reference_temperature", 0.0, "above 0"),
        ("gap_floor", -0.5, "above 0"),
    ],
)
def test_a_setting_out_of_range_names_itself_what_is_expected_and_what_was_given(
    name: str, value: Any, expected: str
) -> None:
    with pytest.raises(ValueError, match=name) as refusal:
        MavisConfig(**{name: value})
    assert expected in str(refusal.value)
    assert f"got {value!r}" in str(refusal.value)


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None])
def test_a_weight_that_is_no_finite_number_is_refused(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"weights\['helpful'\] must be a finite number, got"):
        MavisConfig(weights={"helpful": weight})


def test_weights_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ValueError, match="weights must be a mapping from objective to number"):
        MavisConfig(weights=[0.5, 0.5])  # type: ignore[arg-type]


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown setting 'betta'; did you mean 'beta'"):
        MavisConfig.from_json('{"betta": 2}')
    with pytest.raises(ValueError, match="unknown setting 'xyzzy'; known are weights, beta, top_k"):
        MavisConfig.from_dict({"xyzzy": 2})


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"beta"', "null"])
def test_text_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="MavisConfig expects a JSON object"):
        MavisConfig.from_json(text)


HEAD = {"beta": 6.0, "top_k": 200, "normalize": "none", "temperature": 0.7}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {}),
        ([HEAD], {"beta": 6.0, "top_k": 200, "normalize": "none"}),
        ([HEAD, HEAD], {"beta": 6.0, "top_k": 200, "normalize": "none"}),
        ([HEAD, {**HEAD, "beta": 2.0, "top_k": 50, "candidate_min_p": 0.01}],
         {"beta": 4.0, "top_k": 200, "normalize": "none", "candidate_min_p": None}),
        ([HEAD, {**HEAD, "top_k": None}], {"beta": 6.0, "top_k": None, "normalize": "none"}),
        ([HEAD, {}], {}),
        ([HEAD, {"beta": 5.0}], {}),
        ([{"of another version": 1, "beta": 2.0}], {"beta": 2.0}),
    ],
)  # fmt: skip
def test_value_functions_that_are_used_together_recommend_what_suits_all(given, expected):
    found = recommended(given)
    assert found == expected
    MavisConfig.from_dict(found)
