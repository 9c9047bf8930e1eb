"""The committed value functions on a Hub: the same values to the bit, and the same steering from a bare environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_server import HubServer
from mavis_logits import MavisConfig, ValueHead, ValueModel, ValuePolicy
from mavis_logits.core.chat import chat_inputs
from mavis_logits.hub.make_bundle import make_bundle
from mavis_logits.hub.publish import push_folder

ROOT = Path(__file__).resolve().parents[2]
CARDS = sorted(path for path in (ROOT / "model_cards").iterdir() if path.is_dir())
SCRIPT = ROOT / "examples" / "steer_from_hub.py"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    from mavis_logits.demo import load_smollm2

    return load_smollm2()


def test_the_script_is_short() -> None:
    code = [line for line in SCRIPT.read_text().splitlines() if line.strip() and not line.startswith(('"""', "#"))]
    assert len(code) < 20


@pytest.mark.slow
@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
@torch.no_grad()
def test_values_are_the_same_to_the_bit(hub: HubServer, smollm2: Any, folder: Path) -> None:
    model, tokenizer = smollm2
    push_folder(folder, f"org/{folder.name}")
    inputs = chat_inputs(tokenizer, ["How do I make good tea?"])
    if "head" in folder.name:
        hidden = model.model(**inputs).last_hidden_state[:, -1]
        heads = [ValueHead.from_pretrained(source).bind(model) for source in (folder, f"org/{folder.name}")]
        here, there = (head(hidden) for head in heads)
    elif "policy" in folder.name:
        tuned = [ValuePolicy.from_pretrained(source, model) for source in (folder, f"org/{folder.name}")]
        here, there = (policy.backbone(**inputs).logits for policy in tuned)
    else:
        both = [ValueModel.from_pretrained(source, backbone=model) for source in (folder, f"org/{folder.name}")]
        here, there = (value(inputs["input_ids"]).values for value in both)
    assert here.std() > 0
    assert torch.equal(here, there)
    card = hub.files(f"org/{folder.name}")["README.md"].decode()
    assert f'"org/{folder.name}", weights=' in card


def bare_environment(folder: Path) -> Path:
    """The interpreter of a new environment that holds the built wheel; other packages are those of this one."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True)
    wheel = next((folder / "dist").glob("*.whl"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head", "models"])
def test_a_bare_environment_steers_by_a_bundle(hub: HubServer, smollm2: Any, tmp_path: Path, kind: str) -> None:
    names = (
        ["smollm2-135m-value-head"] if kind == "head" else [f"smollm2-135m-value-{o}" for o in ("helpful", "humour")]
    )
    given = [str(ROOT / "model_cards" / name) for name in names]
    config = MavisConfig(weights={"helpful": 0.3, "humour": 0.7})
    push_folder(make_bundle(tmp_path / "bundle", given, config), "org/smollm2-steering", custom_generate=True)
    python = bare_environment(tmp_path)
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "XDG_CACHE_HOME") if name in os.environ}
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, SCRIPT, "org/smollm2-steering"], cwd=tmp_path, env=keep | own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    which = [python, "-c", "import mavis_logits; print(mavis_logits.__file__)"]
    assert subprocess.run(which, cwd=tmp_path, capture_output=True, text=True).stdout.startswith(str(tmp_path))
    by_processor, by_code, by_pipeline = done.stdout.strip().split("\n")
    assert by_processor == by_code == by_pipeline
    model, tokenizer = smollm2
    inputs = chat_inputs(tokenizer, ["How do I make good tea?"])
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert by_processor != tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
