"""What a request asks for: read, checked, refused with what to do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mavis_logits.core.config import MavisConfig
from mavis_logits.integrations.asked import Asked
from mavis_logits.integrations.serving import ENVIRONMENT, Offer, Serving
from mavis_logits.values.value_head import ValueHead, ValueHeadConfig

SETTINGS = {"beta": 5.6, "normalize": "standard", "top_k": 20}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = ValueHeadConfig(8, 8, 97, 16, objectives=["kind", "short"], tilt_scale=[2.0, 0.5], settings=SETTINGS)
    ValueHead(config).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


@pytest.fixture
def offer(folder: Path) -> Offer:
    return Offer.of(Serving.read({"values": str(folder), "max_top_k": 64}))


def read(offer: Offer, **arguments: object) -> Asked:
    asked = Asked.read(arguments, offer)
    assert asked is not None
    return asked


def test_a_request_that_asks_for_nothing_is_not_steered(offer: Offer) -> None:
    for arguments in (None, {}, {"session_id": "x"}):
        assert Asked.read(arguments, offer) is None


def test_what_is_not_said_is_what_the_value_functions_recommend(offer: Offer) -> None:
    asked = read(offer, mavis_weights="kind=0.7, short=0.3", session_id="x")
    assert asked.beta == 5.6
    assert (asked.config.normalize, asked.config.top_k) == ("standard", 20)
    assert torch.allclose(asked.weights, torch.tensor([0.7, 0.3]))
    assert torch.allclose(read(offer, mavis_beta=1).weights, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("weights", ["short=2", '{"short": 2}', {"short": 2}, [0, 2.0]])
def test_weights_in_every_form(offer: Offer, weights: object) -> None:
    assert read(offer, mavis_weights=weights).weights.tolist() == [0.0, 2.0]


def test_requests_that_differ_in_weights_and_strength_share_their_settings(offer: Offer) -> None:
    one, other = read(offer, mavis_weights="kind=1"), read(offer, mavis_weights="short=1", mavis_beta=2.5)
    assert one.config == other.config
    assert other.beta == 2.5


def test_every_setting_has_an_argument(offer: Offer) -> None:
    asked = read(
        offer, mavis_kl_budget=0.5, mavis_top_k=7, mavis_min_p=0.1, mavis_normalize="gap", mavis_gap_floor=0.2,
        mavis_unscored="keep", mavis_reference_temperature=0.7,
    )  # fmt: skip
    assert asked.config == MavisConfig(
        kl_budget=0.5, top_k=7, candidate_min_p=0.1, normalize="gap", gap_floor=0.2, unscored="keep",
        reference_temperature=0.7,
    )  # fmt: skip


def test_a_strength_counts_in_place_of_the_servers_budget(folder: Path) -> None:
    offer = Offer.of(Serving.read({"values": str(folder), "kl_budget": 0.3}))
    assert read(offer, mavis_weights="kind=1").config.kl_budget == 0.3
    assert read(offer, mavis_beta=2).config.kl_budget is None


BAD = [
    ({"mavis_weights": "kin=1"}, "did you mean 'kind'"),
    ({"mavis_weights": "kind"}, "mavis_weights got 'kind'; expected NAME=NUMBER"),
    ({"mavis_weights": "kind=1,kind=2"}, "twice"),
    ({"mavis_weights": "{kind: 1}"}, "no JSON object"),
    ({"mavis_weights": '{"kind": "1"}'}, "list of numbers"),
    ({"mavis_weights": {"kind": True}}, "list of numbers"),
    ({"mavis_weights": 3}, "list of numbers"),
    ({"mavis_weights": [1.0]}, r"must be \[2\]"),
    ({"mavis_weights": [[1.0, 2.0]]}, "list of numbers"),
    ({"mavis_weights": "kind=nan"}, "must be finite"),
    ({"mavis_weights": "kind=inf"}, "must be finite"),
    ({"mavis_weights": [1e300, 0]}, "must be finite"),
    ({"mavis_weights": [1e30, 0]}, "at most 10000"),
    ({"mavis_beta": "6"}, "mavis_beta must be a finite number"),
    ({"mavis_beta": -1}, "at least 0"),
    ({"mavis_beta": math.nan}, "finite number"),
    ({"mavis_beta": 1e300}, "at most 10000"),
    ({"mavis_beta": None}, "finite number"),
    ({"mavis_beta": [1]}, "finite number"),
    ({"mavis_kl_budget": 0}, "nats above 0"),
    ({"mavis_kl_budget": 1, "mavis_beta": 1}, "exclude each other"),
    ({"mavis_top_k": 65}, "at most 64 on this server"),
    ({"mavis_top_k": "all"}, "at most 64 on this server, got all"),
    ({"mavis_top_k": 0}, "whole number"),
    ({"mavis_top_k": 2.5}, "whole number"),
    ({"mavis_min_p": 2}, "at most 1"),
    ({"mavis_min_p": 0.1, "mavis_candidate_min_p": 0.1}, "twice"),
    ({"mavis_reference_temperature": 1e-30}, "between 0.01 and 100"),
    ({"mavis_normalize": "max"}, "one of 'minmax'"),
    ({"mavis_betta": 1}, "did you mean 'mavis_beta'"),
    ({"mavis_xyzzy": 1}, "known are"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_a_bad_request_is_refused(offer: Offer, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Asked.read(arguments, offer)


def test_the_offer_is_read_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert Offer.of(Serving.read(str(folder))).objectives == ["kind", "short"]


def test_defaults_of_the_server_come_before_those_of_the_value_functions(folder: Path) -> None:
    serving = Serving.read({"values": [str(folder)], "beta": 2, "weights": {"short": 1}})
    asked = read(Offer.of(serving), mavis_top_k=5)
    assert asked.beta == 2
    assert asked.weights.tolist() == [0.0, 1.0]
    assert Serving.read(serving.to_json()) == serving


def test_a_strength_of_the_server_comes_before_a_budget_that_is_recommended(folder: Path) -> None:
    head = ValueHead.from_pretrained(folder)
    head.config.settings = {**SETTINGS, "kl_budget": 0.25}
    head.save_pretrained(folder)
    assert Offer.of(Serving.read(str(folder))).config.kl_budget == 0.25
    own = Offer.of(Serving.read({"values": str(folder), "beta": 2})).config
    assert (own.beta, own.kl_budget) == (2, None)


def test_settings_are_found_where_the_engine_has_them_or_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "org/value")
    assert Serving.find().values == "org/value"
    assert Serving.find({"values": "org/other"}).values == "org/other"
    monkeypatch.delenv(ENVIRONMENT)
    with pytest.raises(ValueError, match="set MAVIS_SERVE"):
        Serving.find()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "JSON object"),
        ({}, "say which value functions"),
        ({"values": 3}, "must be a folder"),
        ({"values": []}, "must be a folder"),
        ({"values": "a", "draft_values": []}, "draft_values must be a folder"),
        ({"values": "a", "max_top_k": 0}, "max_top_k must be"),
        ({"values": "a", "max_value_tokens": True}, "max_value_tokens must be"),
        ({"values": "a", "check_weights": 1}, "check_weights must be"),
        ({"values": "a", "betta": 0}, "did you mean 'beta'"),
        ({"values": "a", "beta": -1}, "beta must be"),
        ([], "expected a folder"),
    ],
)
def test_bad_settings_of_a_server_are_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Serving.read(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["name", "list", "mapping"])
def test_values_of_drafts_come_in_the_order_of_the_served_objectives(folder: Path, tmp_path: Path, form: str) -> None:
    for name in ("short", "kind"):
        ValueHead(ValueHeadConfig(8, 8, 97, 16, objectives=[name])).save_pretrained(tmp_path / name)
    given = {name: str(tmp_path / name) for name in ("short", "kind")}
    forms = {"name": str(folder), "list": list(given.values()), "mapping": given}
    serving = Serving.read({"values": str(folder), "draft_values": forms[form]})
    assert Offer.of(serving).objectives == ["kind", "short"]
    own = serving.for_drafts(["kind", "short"])
    assert list(own.values) == ["kind", "short"]
    assert Offer.of(own).objectives == ["kind", "short"]
    assert Serving.read(serving.to_json()) == serving


def test_values_that_drafts_cannot_have_are_refused_before_an_engine_starts(folder: Path, tmp_path: Path) -> None:
    ValueHead(ValueHeadConfig(8, 8, 97, 16, objectives=["kind"])).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="draft_values have no value of short"):
        Offer.of(Serving.read({"values": str(folder), "draft_values": str(tmp_path / "one")}))
    inner = ValueHeadConfig(8, 8, 97, 16, objectives=["kind", "short"], layer=2)
    ValueHead(inner).save_pretrained(tmp_path / "inner")
    with pytest.raises(ValueError, match="train them with `mavis train-head --layer output`"):
        Offer.of(Serving.read({"values": str(folder), "draft_values": str(tmp_path / "inner")}))


def test_a_tuned_policy_is_refused_with_what_to_use_instead(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mavis_value_policy", "objectives": ["kind"]}')
    with pytest.raises(ValueError, match="a tuned policy, which cannot steer a server: use value heads"):
        Offer.of(Serving.read(str(tmp_path)))
