"""What `help` and an editor show of the classes that users call, and what a misspelled argument is told."""

from __future__ import annotations

import inspect
import pydoc
from dataclasses import fields
from typing import Any

import pytest

import mavis_logits
from mavis_logits import MavisBeamSearch, MavisConfig, MavisLogitsProcessor, MavisSampling, MavisStrategy
from mavis_logits.steering import Steering
from mavis_logits.steering.signatures import Settings, SteeringOptions, StrategyOptions
from tiny import make_base, make_value_model

OWN = [
    MavisLogitsProcessor,
    *(getattr(mavis_logits, name) for name in dir(mavis_logits) if name.startswith("Mavis")),
]
STEERING = sorted({kind for kind in OWN if isinstance(kind, type) and issubclass(kind, Steering)}, key=str)


@pytest.mark.parametrize("kind", STEERING)
def test_every_argument_is_shown_by_name_with_its_default(kind: Any) -> None:
    for shown in (inspect.signature(kind), inspect.signature(kind.from_pretrained)):
        kinds = {parameter.kind for parameter in shown.parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
        assert shown.parameters.keys() >= SteeringOptions.__annotations__.keys() - {"cls"}
        assert list(shown.parameters)[:3] == ["value_functions", "weights", "beta"]
        assert shown.parameters["top_k"].default == MavisConfig().top_k
        if issubclass(kind, MavisStrategy):
            assert shown.parameters.keys() >= StrategyOptions.__annotations__.keys()
    assert "candidate_min_p" in pydoc.plain(pydoc.render_doc(kind))


def test_the_options_are_those_that_the_code_takes() -> None:
    assert Settings.__annotations__.keys() == {field.name for field in fields(MavisConfig)} - {"weights", "beta"}
    own = inspect.signature(Steering.__init__).parameters
    named = {name for name, parameter in own.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert SteeringOptions.__annotations__.keys() == named | Settings.__annotations__.keys()
    own = inspect.signature(MavisStrategy.__init__).parameters
    named = {name for name, parameter in own.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert StrategyOptions.__annotations__.keys() == named | SteeringOptions.__annotations__.keys()


def test_shown_defaults_are_the_defaults() -> None:
    shown = inspect.signature(MavisSampling).parameters
    for name, parameter in inspect.signature(Steering.__init__).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert shown[name].default == parameter.default, name
    for field in fields(MavisConfig):
        if field.name in Settings.__annotations__:
            assert shown[field.name].default == field.default


@pytest.mark.parametrize(
    ("kind", "given", "meant"),
    [
        (MavisLogitsProcessor, {"candidate_minp": 0.1}, "candidate_min_p"),
        (MavisLogitsProcessor, {"wieghts": {"a": 1.0}}, "weights"),
        (MavisSampling, {"streemer": None}, "streamer"),
        (MavisBeamSearch, {"num_beam": 3}, "num_beams"),
        (MavisBeamSearch, {"tokeniser": None}, "tokenizer"),
    ],
)
def test_a_misspelled_argument_is_told_the_nearest_right_one(kind: Any, given: dict[str, Any], meant: str) -> None:
    message = f"unknown setting '{next(iter(given))}' of {kind.__name__}; did you mean '{meant}'"
    with pytest.raises(ValueError, match=message):
        kind(make_value_model("a"), **given)
    with pytest.raises(ValueError, match=message):  # before anything is looked for
        kind.from_pretrained("nowhere/at-all", **given)


def test_a_strategy_of_ones_own_may_take_more_and_hand_the_rest_on() -> None:
    class Own(MavisSampling):
        def __init__(self, *args: Any, mine: int = 1, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.mine = mine

    assert "mine" in inspect.signature(Own).parameters
    assert Own.from_pretrained([make_value_model("a")], mine=2, top_k=4).mine == 2
    with pytest.raises(ValueError, match="unknown setting 'topk' of Own"):
        Own(make_value_model("a"), topk=3)


def test_generate_sees_what_a_strategy_takes_when_it_is_called() -> None:
    """`generate` looks at the signature of `custom_generate`: of an object, not of its class."""
    strategy = MavisSampling(make_value_model("a"), model=make_base())
    assert list(inspect.signature(strategy).parameters)[:2] == ["model", "input_ids"]
    assert "top_k" not in inspect.signature(strategy).parameters
