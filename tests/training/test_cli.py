from __future__ import annotations

import json
from pathlib import Path

import pytest

from mavis_training import cli
from mavis_training.calibrate import CalibrateConfig
from mavis_training.cards import CardConfig
from mavis_training.cli import read_config
from mavis_training.collect import CollectConfig
from mavis_training.distil import DistilConfig
from mavis_training.evaluate import EvaluateConfig
from mavis_training.export import ExportConfig
from mavis_training.iterate import IterateConfig
from mavis_training.label import LabelConfig
from mavis_training.make_prompts import PromptsConfig
from mavis_training.pareto.config import ParetoConfig
from mavis_training.sft import SftConfig
from mavis_training.train_head import TrainHeadConfig
from mavis_training.train_model import LoraSettings, TrainModelConfig
from mavis_training.tuning.config import TuneConfig

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
# Settings of the methods that the paper compares with are read by no command.
READ = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "baselines")
KINDS = {
    "prompts": PromptsConfig,
    "sft": SftConfig,
    "export": ExportConfig,
    "collect": CollectConfig,
    "label": LabelConfig,
    "train-model": TrainModelConfig,
    "train-head": TrainHeadConfig,
    "distil": DistilConfig,
    "iterate": IterateConfig,
    "evaluate": EvaluateConfig,
    "tune": TuneConfig,
    "calibrate": CalibrateConfig,
    "pareto": ParetoConfig,
    "card": CardConfig,
}


@pytest.mark.parametrize("path", READ, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    command = next(name for name in sorted(KINDS, key=len, reverse=True) if path.stem.startswith(name))
    config = read_config(KINDS[command], ["--config", str(path)], command)
    assert isinstance(config, KINDS[command])


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "store: s\nobjectives: [a]\noutput: o\nlora:\n  rank: 4\nsettings: 1\n".replace("settings: 1\n", "")
    )
    return path


def test_flags_override_the_recipe(recipe):
    argv = ["--config", str(recipe), "--epochs", "3", "--lora.dropout", "0.5", "--objectives", '["x","y"]']
    config = read_config(TrainModelConfig, argv, "train-model")
    assert config.lora == LoraSettings(rank=4, dropout=0.5)
    assert config.epochs == 3
    assert config.objectives == ["x", "y"]


@pytest.mark.parametrize(
    "text", ["Be kind: say no.", "12", "no", "null", "[a]", "{a: b}", "- a", "a # b", "", "2026-11-30"]
)
def test_texts_of_a_recipe_are_what_it_says(text, tmp_path):
    """Also where any type will do, as in settings: the parser would read them again as YAML."""
    said = json.dumps(text)
    settings = f'{{"plain": {{}}, "a": {{"system": {said}, "examples": [[{said}, "b"]], "top_p": 0.5}}}}'
    if not text:
        settings = settings.replace('"system": "", ', "")  # which is refused
    path = tmp_path / "recipe.yaml"
    path.write_text(f"prompts: p\noutput: o\ncompletions: c\nrewards: {{r: x.py:f}}\nsettings: {settings}\n")
    config = read_config(EvaluateConfig, ["--config", str(path)], "evaluate")
    assert config.settings == json.loads(settings)
    flag = ["--settings", '{"b": {}, "a": {"top_p": 0.7}}']
    other = read_config(EvaluateConfig, ["--config", str(path), *flag], "evaluate")
    assert other.settings == {"b": {}, "a": {"top_p": 0.7}}


def test_flags_alone():
    config = read_config(TrainHeadConfig, ["--store=s", "--objectives=[a]", "--output=o"], "train-head")
    assert config == TrainHeadConfig("s", ["a"], "o")
    rewards = read_config(LabelConfig, ["--store=s", '--rewards={"a": "b"}'], "label").rewards
    assert rewards == {"a": "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1.0", "unknown key 'learning_rat': did you mean 'learning_rate'"),
        ("qqq: 1", "unknown key 'qqq': known are store"),
        ("lora: {rnk: 3}", "lora has the unknown key 'rnk': did you mean 'rank'"),
        ("epochs: many", "epochs"),
        ("targets: trees", "targets"),
        ("x: [", "not valid YAML"),
    ],
)
def test_a_bad_recipe_is_a_clear_error(recipe, line, message):
    text = recipe.read_text()
    recipe.write_text((text if not line.startswith("lora") else text.split("lora")[0]) + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_config(TrainModelConfig, ["--config", str(recipe)], "train-model")


def test_other_bad_input(tmp_path):
    with pytest.raises(OSError, match=r"missing\.yaml"):
        read_config(LabelConfig, ["--config", str(tmp_path / "missing.yaml")], "label")
    with pytest.raises(ValueError, match="store"):
        read_config(LabelConfig, ['--rewards={"a": "b"}'], "label")
    with pytest.raises(ValueError, match="did you mean --prompts"):
        read_config(CollectConfig, ["--promts", "x"], "collect")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold settings"):
        read_config(LabelConfig, ["--config", str(tmp_path / "list.yaml")], "label")


@pytest.mark.parametrize(
    "command",
    [
        "prompts",
        "sft",
        "export",
        "collect",
        "label",
        "train_model",
        "train_head",
        "distil",
        "iterate",
        "evaluate",
        "card",
    ],
)
def test_help_describes_every_setting(command, capsys):
    with pytest.raises(SystemExit):
        getattr(cli, command)(["--help"])
    shown = capsys.readouterr().out
    assert f"mavis {command.replace('_', '-')}" in shown
    assert "recipe file" in shown


def test_a_command_runs_its_function(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a tree store"):
        cli.label([f"--store={tmp_path}", '--rewards={"a": "module:function"}', "--tokenizer=none"])
