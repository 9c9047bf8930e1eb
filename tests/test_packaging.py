"""What a user of the distribution relies on: light imports, one direction of dependence, commands that exist."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRA_PACKAGES = {
    "datasets",
    "h5py",
    "trl",
    "jsonargparse",
    "tensorboard",
    "rich",
    "matplotlib",
    "gguf",
    "moocore",
    "gradio",
}
# Home, temporary and mount folders of some machine, as absolute paths.
MACHINE_PATH = re.compile(r"(?<![\w.~:/])/(?:home|root|tmp|work|mnt|Users)/\w")


def imported_modules(source: str) -> set[str]:
    """Return the top-level packages that a module imports anywhere in its text."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_import_is_light() -> None:
    code = "import sys, mavis_logits; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": "src"}, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded & (EXTRA_PACKAGES | {"torch", "transformers", "mavis_training"})


def test_every_public_name_can_be_had() -> None:
    package = importlib.import_module("mavis_logits")
    assert package.__all__
    for name in dir(package):
        assert getattr(package, name) is not None


def test_the_library_never_imports_the_training_package_or_an_extra() -> None:
    """Commands aside, whose extras are in the registry: who lacks one is told what to install."""
    library = ROOT / "src" / "mavis_logits"
    for file in library.rglob("*.py"):
        extras = set() if file.is_relative_to(library / "commands") else EXTRA_PACKAGES
        forbidden = imported_modules(file.read_text()) & (extras | {"mavis_training"})
        assert not forbidden, f"{file.relative_to(ROOT)} imports {forbidden}"


def test_nothing_loads_a_pickle() -> None:
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "training").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        source = file.read_text()
        assert not imported_modules(source) & {"pickle", "cPickle", "dill", "joblib", "cloudpickle"}, file
        for call in re.findall(r"torch\.load\([^)]*\)", source):
            assert "weights_only=True" in call, f"{file.relative_to(ROOT)}: {call}"


def test_no_path_of_a_machine_is_committed() -> None:
    found = []
    for file in tracked_files():
        if file.suffix == ".jsonl":  # prompts, which may speak of any path
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{file.relative_to(ROOT)}: {line.strip()[:120]}" for line in text.splitlines() if MACHINE_PATH.search(line)
        ]
    assert not found, "\n".join(found)
