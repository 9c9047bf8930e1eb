"""Wheel and sdist as a user gets them: built here, unpacked elsewhere, without the clone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


def run(folder: Path, places: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": places, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=env)


def test_the_wheel_works_where_there_is_no_clone(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    done = run(elsewhere, str(site), "-c", "import mavis_logits, mavis_training; print(mavis_logits.__file__)")
    assert done.stdout.startswith(str(site)), done.stderr
    done = run(elsewhere, str(site), "-m", "mavis_logits.cli", "--help")
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
    for template in ("mavis_logits/steering/trace_page.html", "mavis_training/fit/report_template.html"):
        assert (site / template).is_file()
    metadata = next(site.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    assert re.search(r"^Provides-Extra: docs$", metadata, re.MULTILINE)


def test_the_tests_of_the_sdist_collect(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (own,) = tmp_path.iterdir()
    places = os.pathsep.join(str(own / place) for place in ("src", "training"))
    done = run(own, places, "-m", "pytest", "--collect-only", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    few = run(
        own, places, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_docs.py", "tests/test_packaging.py"
    )
    assert few.returncode == 0, few.stdout[-3000:]


def test_what_the_readme_links_to_is_in_the_sdist(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert target in names, target
