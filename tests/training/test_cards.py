from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_model import ValueModel
from mavis_training.cards import CardConfig, write_card
from mavis_training.cli import read_config
from mavis_training.fitting.metrics import FRACTIONS
from tiny_models import tiny_llama


def metrics(objectives):
    one = {
        "r2": 0.41,
        "correlation": 0.65,
        "inner_r2": 0.31,
        "inner_correlation": 0.59,
        "by_fraction": {str(f): {"correlation": f / 2, "r2": f / 4, "within": f / 8} for f in FRACTIONS},
        "ranking": {"accuracy": 0.62, "pairs": 345},
    }
    return {"trees": 60, "nodes": 1700, "leaves": 900, "training_trees": 540} | dict.fromkeys(objectives, one)


def setting(weights, kl, **rewards):
    row = {name: {"reward": r, "error": 0.03, "gain_sd": r / 2, "gain_sd_error": 0.01} for name, r in rewards.items()}
    return {"setting": {"weights": weights} if weights else {}, "kl": kl, "kl_error": 0.1} | row


EVALUATION = {
    "prompts": 100,
    "config": {"seeds": [0, 1, 2], "max_new_tokens": 48},
    "settings": {
        "unsteered": setting(None, 0.0, a=0.1, b=0.2),
        "all a": setting({"a": 1.0}, 11.25, a=1.44, b=0.0),
        "all b": setting({"b": 1.0}, 12.0, a=0.0, b=1.0),
    },
}


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(EVALUATION))
    return str(path)


def saved(folder, value_function, objectives):
    value_function.save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics(objectives)))
    return folder


ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(ROOT.glob("training/recipes/*/card-*.yaml"))


def test_the_card_of_a_value_model(tmp_path, evaluation):
    recipe = {"zeta": 0.0, "data": {"sampling": {"layers": 3, "max_new_tokens": 48}}}
    model = ValueModel.from_backbone(tiny_llama(), objectives=["a"], base_model="org/base", recipe=recipe)
    folder = saved(tmp_path / "value-a", model, ["a"])
    words = {"license": "mit", "rewards": {"a": "how a it is"}, "datasets": ["org/prompts"]}
    words |= {"base_weights": "The 4-bit ones.", "how_far": "Not beyond beta 7."}
    path = write_card(CardConfig(str(folder), evaluation=evaluation, load_base="model, tokenizer = mine()", **words))
    card = ModelCard.load(path)
    assert card.data.license == "mit"
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "mavis-logits"
    assert card.data.datasets == ["org/prompts"]
    assert {"mavis", "value-model"} <= set(card.data.tags)
    text = card.text
    for part in (
        "# value-a",
        "how a it is",
        "zeta: 0.0",
        "540 trees",
        "0.62 of 345 pairs",
        "0.50 (0.12)",
        "(2 layers)",
    ):
        assert part in text
    for part in ("The 4-bit ones.", "model, tokenizer = mine()", "foresight.png", "steering.png", "Limits and misuse"):
        assert part in text
    assert "| all a | 5.0 | 1.44 ± 0.03 (+0.72) | 0.00 ± 0.03 (+0.00) | 11.2 ± 0.1 |" in text
    assert "changed its mean reward by **+0.72 standard deviations**. The others changed by +0.00 (`b`)" in text
    assert "**How far.** Not beyond beta 7.\n\n## Training" in text
    assert "unsteered" in text
    assert "all b" not in text
    assert str(tmp_path) not in text
    code = text.split("```python")[1].split("```")[0]
    compile(code, "card", "exec")
    assert yaml.safe_load(text.split("```yaml")[1].split("```")[0]) == recipe
    assert (folder / "foresight.png").is_file()
    assert (folder / "steering.png").is_file()


def test_the_numbers_are_in_the_metadata(tmp_path, evaluation):
    folder = saved(tmp_path / "value", ValueModel.from_backbone(tiny_llama(), objectives=["a"]), ["a"])
    card = ModelCard.load(write_card(CardConfig(str(folder), evaluation=evaluation, plots=False)))
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["a: correlation with the final reward after 50% of the completion"] == 0.25
    assert found["a, steered by a at beta 5"] == 1.44
    assert found["KL in nats, steered by a at beta 5"] == 11.25
    assert len(found) == len(FRACTIONS) + 2


def test_the_card_of_a_value_head(tmp_path):
    head = ValueHead.for_model(tiny_llama(), objectives=["a", "b"], width=8)
    folder = saved(tmp_path / "head", head, ["a", "b"])
    text = write_card(CardConfig(str(folder), name="org/head", plots=False)).read_text()
    assert "# org/head" in text
    assert "(0: after the first)" in text
    assert "Not measured: no evaluation came with this value head." in text
    assert "|  |" not in text
    assert ".png" not in text
    compile(text.split("```python")[1].split("```")[0], "card", "exec")


def test_what_was_said_of_it_before_is_kept(tmp_path, evaluation):
    folder = saved(tmp_path / "value", ValueModel.from_backbone(tiny_llama(), objectives=["a"]), ["a"])
    first = {"rewards": {"a": "as short as can be"}, "how_far": "Up to 8 nats.", "license": "mit", "plots": False}
    write_card(CardConfig(str(folder), **first))
    text = write_card(CardConfig(str(folder), evaluation=evaluation, license="apache-2.0", plots=False)).read_text()
    for part in ("as short as can be", "Up to 8 nats.", "license: apache-2.0", "steered by a at beta 5"):
        assert part in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_committed_cards_say_what_was_measured(recipe, tmp_path, monkeypatch):
    """A card and the numbers that it is rendered from do not drift apart."""
    monkeypatch.chdir(ROOT)
    config = read_config(CardConfig, ["--config", str(recipe), "--plots", "false"], "card")
    folder = ROOT / config.folder
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors", "card.json"))
    write_card(CardConfig(**vars(config) | {"folder": str(copy)}))
    for name in ("README.md", "card.json"):
        same = (copy / name).read_text() == (folder / name).read_text()
        assert same, f"run: mavis card --config {recipe.relative_to(ROOT)}"
    for plot in ("foresight.png", "steering.png"):
        assert f"({plot})" in (folder / "README.md").read_text()


def test_every_published_value_function_has_a_recipe_for_its_card():
    folders = {read_config(CardConfig, ["--config", str(recipe)], "card").folder for recipe in RECIPES}
    assert folders == {f"model_cards/{path.name}" for path in (ROOT / "model_cards").iterdir() if path.is_dir()}


def test_bad_input(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        write_card(CardConfig(str(tmp_path)))
    folder = saved(tmp_path / "other", tiny_llama(), ["a"])
    with pytest.raises(ValueError, match="of type 'llama'"):
        write_card(CardConfig(str(folder)))
    model = ValueModel.from_backbone(tiny_llama(), objectives=["a"])
    folder = saved(tmp_path / "value", model, ["a"])
    with pytest.raises(ValueError, match=r"rewards describes \['z'\]"):
        write_card(CardConfig(str(folder), rewards={"z": "?"}))
