"""What cards say, and refuse to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mavis_logits import MavisConfig
from mavis_logits.hub.bundle import Bundle, BundleEntry
from mavis_logits.hub.cards import CardDetails, evaluation_of, highlights, render_bundle_card, render_card
from tiny import make_value_model


def row(weights: dict[str, float] | None, beta: float | None, **gains: float) -> dict[str, Any]:
    """A setting of an evaluation."""
    setting = {} if weights is None else {"weights": weights} | ({} if beta is None else {"beta": beta})
    rewards = {name: {"reward": gain, "error": 0.1, "gain_sd": gain} for name, gain in gains.items()}
    return {"setting": setting, "kl": 3.0, "kl_error": 0.1} | rewards


EVALUATION = {
    "prompts": 10,
    "config": {"seeds": [0, 1], "max_new_tokens": 8},
    "settings": {
        "unsteered": row(None, None, a=0.0, b=0.0),
        "cut only": row({"b": 1.0}, 0.0, a=0.25, b=-0.5),
        "towards a": row({"a": 1.0}, None, a=1.0, b=-1.0),
        "towards b": row({"b": 1.0}, 5.0, a=0.0, b=2.0),
        "both": row({"a": 0.5, "b": 0.5}, 5.0, a=0.5, b=1.0),
    },
}


def test_a_card_shows_the_settings_that_concern_it() -> None:
    names = [setting["name"] for setting in evaluation_of(EVALUATION, ["a"])["settings"]]
    assert names == ["unsteered", "cut only", "towards a", "both"]
    kept = evaluation_of(EVALUATION, ["a"])
    assert evaluation_of(kept, ["a"]) == kept


def test_a_card_says_what_is_not_due_to_the_values() -> None:
    first, second = highlights(evaluation_of(EVALUATION, ["a", "b"]), ["a", "b"])
    assert "`a` alone changed its mean reward by **+1.00 standard deviations** (merely leaving out unlikely" in first
    assert "unlikely tokens: +0.25). The others changed by -1.00 (`b`)." in first
    assert "**+2.00 standard deviations** (merely leaving out unlikely tokens: -0.50)" in second
    assert highlights(None, ["a"]) == []


def test_a_card_claims_nothing_that_it_was_not_told() -> None:
    config = make_value_model("a").config.to_dict()
    card = ModelCard(render_card("org/value", config))
    assert card.data.license is None
    assert card.data.language is None
    assert card.data.eval_results is None
    assert card.text.count("Not measured") == 2
    assert "The settings of the training were not recorded." in card.text
    told = ModelCard(render_card("org/value", config, CardDetails(license="mit", language="fr", tags=["mine"])))
    assert (told.data.license, told.data.language) == ("mit", "fr")
    assert "mine" in told.data.tags


def test_a_bundles_card_is_clear_about_weights_and_settings() -> None:
    entries = {"a": BundleEntry(repo="org/a", revision="v1"), "b": BundleEntry(subfolder="value-b")}
    config = MavisConfig(weights={"a": 0.75}, beta=2.0, kl_budget=0.5)
    text = ModelCard(render_bundle_card("org/bundle", Bundle(entries, config, "org/base"))).text
    assert "| `a` | 0.75 | [org/a](https://huggingface.co/org/a) at `v1` |" in text
    assert "| `b` | 0 | [value-b](./value-b/README.md) |" in text
    assert "`beta=2.0`, `top_k=15`, `normalize=minmax`, `kl_budget=0.5`." in text
    assert "custom_generate" not in text
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in text
    for block in text.split("```python")[1::1]:
        compile(block.split("```")[0], "card", "exec")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a value function's config, of type mavis_value or mavis_value_head"):
        render_card("org/value", {"model_type": "llama"})
    with pytest.raises(ValueError, match=r"rewards describes \['z'\], but the value function predicts \['a'\]"):
        render_card("org/value", make_value_model("a").config.to_dict(), CardDetails(rewards={"z": "?"}))
    (tmp_path / "card.json").write_text(json.dumps({"reward": {}}))
    with pytest.raises(ValueError, match="unknown key 'reward'; known are"):
        CardDetails.read(tmp_path / "card.json")
