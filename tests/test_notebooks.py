"""The notebooks and scripts of examples run, on tiny models in place of those that they name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from byte_models import lay_out

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
SETUP = f"""
import sys
sys.path[:0] = {[str(ROOT / place) for place in ("src", "training", "tests")]!r}
import pathlib, byte_models, mavis_logits.demo
_pair = byte_models.lay_out(pathlib.Path())
mavis_logits.demo.load_smollm2 = lambda: _pair
"""


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.read(notebook, as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace('BUDGET = "30m"', 'BUDGET = "60s"')
    book.cells.insert(0, nbformat.v4.new_code_cell(SETUP))
    nbclient.NotebookClient(
        book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(out.get("text", "") for cell in book.cells for out in cell.get("outputs", []))
    assert printed.strip()


def script(name: str, folder: Path, *arguments: str) -> str:
    places = os.pathsep.join(str(ROOT / place) for place in ("src", "training"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "scripts" / name), *arguments],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": places, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_script_of_device_maps_runs(tmp_path: Path) -> None:
    lay_out(tmp_path)
    model = ["org/model-or-folder", "--device-map", "cpu", "--max-new-tokens", "4"]
    assert "nats over" in script("device_map.py", tmp_path, *model)
    values = ["--values", "model_cards/smollm2-135m-value-head"]
    assert "nats over" in script("device_map.py", tmp_path, *model, *values)


@pytest.mark.slow
def test_the_script_of_trl_trains_on_steered_rollouts(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    lay_out(tmp_path)
    arguments = ["--model", "org/model-or-folder", "--steps", "2", "--steered-steps", "1", "--tokens", "4"]
    printed = script("trl_rollouts.py", tmp_path, *arguments)
    steered = int(printed.split(" tokens were steered")[0].split()[-1])
    assert 4 <= steered <= 16, "the first step's four answers of at most four tokens"


@pytest.mark.slow
def test_the_script_of_lm_eval_evaluates_the_steered_model(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    lay_out(tmp_path)
    rows = [{"question": f"What is {what}?", "answer": "x"} for what in ("tea", "rain")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(f"""
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""")
    arguments = ["--model", "org/model-or-folder", "--tasks", "own", "--include-path", "tasks"]
    printed = script("lm_eval_steered.py", tmp_path, *arguments)
    assert "plain" in printed
    assert 2 <= int(printed.split(" tokens were steered")[0].split()[-1]) <= 8, "two answers of at most four tokens"
