"""The documents say what is so: names exist, links lead somewhere, tables are what the results files hold."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import fill_readme

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "paper_to_code.md",
    ROOT / "docs" / "hub.md",
    ROOT / "docs" / "architecture.md",
    ROOT / "docs" / "serving.md",
]
NAME = re.compile(r"`(mavis_(?:logits|training)(?:\.\w+)+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def resolve(dotted: str) -> Any:
    """Return what a dotted name stands for, importing as many of its parts as are modules."""
    parts = dotted.split(".")
    found: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:index]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_in_the_documents_exists(page: Path) -> None:
    for name in NAME.findall(page.read_text(encoding="utf-8")):
        resolve(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_file_that_the_house_is_told_of_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = ["", "src/mavis_logits", "src/mavis_logits/decoding", "training/mavis_training"]
    places += [str(folder.relative_to(ROOT)) for folder in (ROOT / "src").rglob("*") if folder.is_dir()]
    places += [str(folder.relative_to(ROOT)) for folder in (ROOT / "training").rglob("*") if folder.is_dir()]
    for name in re.findall(r"`([\w/]+\.(?:py|md))`", text):
        assert any((ROOT / place / name).is_file() for place in places), name


def test_every_recipe_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipes = re.findall(r"--config (\S+)", text)
    assert recipes
    for recipe in recipes:
        assert (ROOT / recipe).is_file(), recipe


def test_the_readme_holds_what_was_measured() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fill_readme.filled(text, ROOT / "docs" / "results") == text, "run: make readme"


def test_sections_are_filled_again_without_growing(tmp_path: Path) -> None:
    decode = {
        "date": "2026-01-01",
        "machine": "a computer",
        "settings": {"new_tokens": 4, "top_k": 15},
        "results": [{"batch": 1, "variant": "value head", "median": 1.014, "low": 1.0, "high": 1.1}],
    }
    (tmp_path / "decode.json").write_text(json.dumps(decode))
    gain = {"gain_sd": 1.204, "gain_sd_error": 0.1}
    steering: dict[str, Any] = {
        "date": "2026-01-01",
        "prompts": 100,
        "config": {"rewards": {"helpful": "folder"}, "seeds": [0, 1, 2]},
        "settings": {"helpful 1": {"helpful": gain, "kl": 20.04}},
    }
    (tmp_path / "steering_trees.json").write_text(json.dumps(steering))
    steering["config"]["combined"] = {"helpful": 1.0}
    steering["settings"] = {"beam search 4": {"helpful": gain, "combined": gain, "kl": None}}
    (tmp_path / "search.json").write_text(json.dumps(steering))
    setting = {"weights": {"helpful": 1.0}, "beta": 5.0, "rewards": {"helpful": {"mean": 0.5, "error": 0.125}}}
    demo = {
        "prompts": ["Why | so?"],
        "options": {"seeds": 3, "beta": 5.0, "top_k": 15, "normalize": "minmax", "max_new_tokens": 48},
        "settings": [{"name": "helpful 1", **setting, "kl": {"mean": 20.0, "error": 1.0}, "answers": ["Because."]}],
    }
    (tmp_path / "demo.json").write_text(json.dumps(demo))
    empty = "".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->\n" for name in fill_readme.SECTIONS)
    once = fill_readme.filled(empty, tmp_path)
    assert "| decoding | batch 1 |" in once
    assert "| value head | 1.01 (1.00 to 1.10) |" in once
    assert "| helpful 1 | +1.20 ± 0.10 | 20.0 |" in once
    assert "| beam search 4 | +1.20 ± 0.10 | +1.20 ± 0.10 | - |" in once
    assert r"“Why \| so?”" in once
    assert "| helpful 1 | 0.50 ± 0.12 | 20.00 ± 1.00 |" in once
    assert "old" not in once
    assert fill_readme.filled(once, tmp_path) == once


def test_a_missing_section_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no section"):
        fill_readme.filled("nothing", tmp_path)


def test_answers_cannot_break_a_table() -> None:
    assert fill_readme.cell("a | b\n* c <i>") == r"a \| b \* c \<i\>"
