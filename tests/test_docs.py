"""The documents say what is so: names exist, links lead somewhere, tables are what the results files hold."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fill_readme
import site_hooks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


def test_every_recipe_that_the_pages_name_exists() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    recipes = set(re.findall(r"--config (training/[\w/.-]+)", text))
    assert recipes
    for recipe in recipes:
        assert (ROOT / recipe).is_file(), recipe


@pytest.mark.parametrize("page", fill_readme.PAGES)
def test_the_pages_hold_what_was_measured(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert fill_readme.filled(text, ROOT / "docs" / "results", page) == text, "run: make readme"


def test_every_test_that_the_table_of_interoperability_names_exists() -> None:
    text = (ROOT / "docs" / "interoperability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "**" not in line.split("|")[1]]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row) for row in rows[1:]]
    assert len(named) >= 20
    assert all(named), "a row without a test"
    for file, test in (pair for row in named for pair in row):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {test}"


def test_the_figures_are_those_that_the_library_draws(tmp_path: Path) -> None:
    drawn = importlib.import_module("figures").main(tmp_path)
    assert drawn
    for figure in drawn:
        committed = ROOT / "docs" / "figures" / figure.name
        (text, numbers), (wanted, expected) = (
            _taken_apart(path.read_text(encoding="utf-8")) for path in (figure, committed)
        )
        assert text == wanted, "run: make figures"
        # Processors differ in the last digits of an exponential.
        assert numbers == pytest.approx(expected, abs=0.01), "run: make figures"


def _taken_apart(svg: str) -> tuple[str, list[float]]:
    """A figure without its decimal numbers, and these."""
    return re.sub(r"-?\d+\.\d+", "#", svg), [float(number) for number in re.findall(r"-?\d+\.\d+", svg)]


def test_links_out_of_the_site_become_paths_and_dead_ones_are_an_error() -> None:
    text = (
        "[a](../README.md) [`Makefile`](../Makefile) [b](hub.md#load) ![c](figures/tilt.svg) [d](https://example.org)"
    )
    found = site_hooks.without_outside_links(text, ROOT / "docs")
    assert found == "a (`README.md`) `Makefile` [b](hub.md#load) ![c](figures/tilt.svg) [d](https://example.org)"
    with pytest.raises(FileNotFoundError, match=r"leads to \.\./nowhere\.md"):
        site_hooks.without_outside_links("[a](../nowhere.md)", ROOT / "docs")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MavisLogitsProcessor" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


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

    def filled(text: str) -> str:
        for page in ("README.md", "docs/measured.md", "docs/results/study.md"):
            text = fill_readme.filled(text, tmp_path, page)
        return text

    once = filled(empty.replace("begin hack -->\nold", "begin hack -->"))
    assert "| decoding | batch 1 |" in once
    assert "| value head | 1.01 (1.00 to 1.10) |" in once
    assert "| helpful 1 | +1.20 ± 0.10 | 20.0 |" in once
    assert "| beam search 4 | +1.20 ± 0.10 | +1.20 ± 0.10 | - |" in once
    assert r"“Why \| so?”" in once
    assert "| helpful 1 | 0.50 ± 0.12 | 20.00 ± 1.00 |" in once
    assert "old" not in once
    assert filled(once) == once


def test_a_missing_section_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no section"):
        fill_readme.filled("nothing", tmp_path)


def test_answers_cannot_break_a_table() -> None:
    assert fill_readme.cell("a | b\n* c <i>") == r"a \| b \* c \<i\>"
