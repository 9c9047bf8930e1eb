"""The house: folders import downwards only, no files in a circle, and old names lead to the same modules."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import mavis_logits
from house import circular, graph, longest_function
from mavis_logits.core.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. A folder imports from those before it, and nothing from those behind it; a file that stands beside
# the folders is one, too.
ORDERS = {
    "src/mavis_logits": [
        "core", "backbone", "hub", "values", "demo", "models", "scoring", "steering", "decoding", "plugs",
        "integrations", "testing", "commands", "cli",
    ],
    "training/mavis_training": [
        "base", "trees", "rewards", "sampling", "fitting", "label", "collect", "train_head", "train_model", "distil",
        "sft", "pairs", "make_prompts", "export", "rivals", "tuning", "measure", "calibrate", "evaluate", "pareto",
        "cards", "iteration", "iterate", "estimates", "demo", "fit", "closing", "cli",
    ],
}  # fmt: skip


@pytest.mark.parametrize("place", ORDERS)
def test_folders_import_from_those_below_only(place: str) -> None:
    package, order = ROOT / place, ORDERS[place]
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} == set(order)
    top = package.name
    upwards = [
        f"{name} -> {other}"
        for name, others in graph(package).items()
        for other in others
        if top not in (name, other) and order.index(room(name)) < order.index(room(other))
    ]
    assert upwards == []


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("place", ORDERS)
def test_no_files_import_each_other_in_a_circle(place: str) -> None:
    TopologicalSorter(graph(ROOT / place)).prepare()  # CycleError names the circle


def test_a_circle_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "a.py").write_text("from .b import x\n")
    (tmp_path / "house" / "b.py").write_text("def f():\n    from house import a\n")
    with pytest.raises(ValueError, match="cycle"):
        TopologicalSorter(graph(tmp_path / "house")).prepare()
    assert circular(graph(tmp_path / "house")) == [{"house.a", "house.b"}]


@pytest.mark.parametrize("place", ORDERS)
def test_no_function_is_longer_than_a_screen_or_two(place: str) -> None:
    longest = {path: longest_function(path) for path in (ROOT / place).rglob("*.py")}
    assert {str(path): lines for path, lines in longest.items() if lines > 80} == {}


@pytest.mark.parametrize("old", MOVED)
def test_old_names_lead_to_the_same_modules(old: str) -> None:
    new = import_module(f"mavis_logits.{MOVED[old]}")
    assert import_module(f"mavis_logits.{old}") is new
    assert new.__name__ == new.__spec__.name == f"mavis_logits.{MOVED[old]}"  # type: ignore[union-attr]


def test_what_has_been_published_imports() -> None:
    code = """
from mavis_logits.hub.remote import steered_generate
from mavis_logits.strategies import MavisSampling as one
from mavis_logits.steering import Steering
from mavis_logits.value_model import ADAPTER_CONFIG, ValueModel as two
import mavis_logits.pipeline, mavis_training.tree_store, mavis_training.classifier, mavis_training.prompts
from mavis_training.data import load_trees
from mavis_training.rewards import load_reward
import mavis_logits, sys
assert one is mavis_logits.MavisSampling and two is mavis_logits.ValueModel
"""
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'training'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_package_is_light() -> None:
    code = "import mavis_logits, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    environment = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
    assert set(mavis_logits.__all__) >= {"MavisLogitsProcessor", "ValueModel", "ValueHead", "MavisConfig"}
