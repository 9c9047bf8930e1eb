"""Settings that travel with value functions: the defaults of whatever they steer."""

from __future__ import annotations

import json

import pytest

from mavis_logits import MavisConfig, MavisLogitsProcessor, MavisSampling, ValueHead
from mavis_logits.hub.cards import render_folder
from tiny import make_base, make_head, make_value_model

SETTINGS = {"beta": 2.5, "top_k": 30, "normalize": "none", "candidate_min_p": 0.01, "temperature": 0.7}


def head_of(base):
    head = make_head(base, "a")
    head.config.settings = dict(SETTINGS)
    return head


@pytest.mark.parametrize("kind", [MavisLogitsProcessor, MavisSampling])
def test_they_are_the_defaults_and_what_is_said_comes_first(kind, tmp_path):
    base = make_base()
    head_of(base).save_pretrained(tmp_path)
    loaded = kind.from_pretrained(str(tmp_path), model=base)
    assert (float(loaded.beta), loaded.config.top_k, loaded.config.normalize) == (2.5, 30, "none")
    assert loaded.config.candidate_min_p == 0.01
    assert loaded.config.reference_temperature == 1.0  # that is generate's to say
    told = kind.from_pretrained(str(tmp_path), beta=4.0, model=base, top_k=7)
    assert (float(told.beta), told.config.top_k, told.config.normalize) == (4.0, 7, "none")
    own = kind(ValueHead.from_pretrained(tmp_path), model=base, config=MavisConfig(beta=1.0))
    assert (float(own.beta), own.config.top_k, own.config.normalize) == (1.0, 15, "minmax")


def test_of_value_functions_that_do_not_agree_none_are_taken():
    base = make_base()
    mavis = MavisLogitsProcessor({"a": head_of(base), "b": make_value_model("b")}, model=base)
    assert mavis.config == MavisConfig()


def test_a_value_function_of_an_older_version_recommends_nothing(tmp_path):
    base = make_base()
    make_head(base, "a").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("settings")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MavisLogitsProcessor.from_pretrained(str(tmp_path), model=base).config == MavisConfig()


def test_the_card_says_them(tmp_path):
    head_of(make_base()).save_pretrained(tmp_path)
    card = render_folder(tmp_path, "org/head")
    assert "`beta=2.5`, `candidate_min_p=0.01`, `normalize=none`, `top_k=30`, chosen at temperature 0.7" in card
    assert "beta=5.0" not in card
