"""Every Python and shell block of the pages runs, in the order of its page, on tiny models in place of those it names.

A block's first line may say more than its language: `slow` (a training: marked so here), `requires=package` (skipped
without it), `file=name` (written to that file too), `elsewhere=file` (what it does is run by the tests in that file).
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import mavis_logits.demo
import mavis_logits.models
from byte_models import lay_out
from mavis_logits import cli

ROOT = Path(__file__).resolve().parents[1]
RUN = [
    "index.md",
    "interoperability.md",
    "clients.md",
    *(f"guides/{p.name}" for p in (ROOT / "docs/guides").glob("*.md")),
]
# Blocks of these are run by tests of their own (hub.md), or hold stages of a training, which the pipeline's tests run.
ELSEWHERE = {"hub.md": "tests/hub/test_docs.py", "training.md": "tests/training/test_pipeline.py",
             "comparing.md": "tests/training/test_rivals.py", "serving.md": "tests/integrations/test_vllm_server.py",
             "ui.md": "tests/commands/test_ui_server.py"}  # fmt: skip
NOT_RUN = ("pip ", "make ", "git ")  # what installs or needs a clone
_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Attributes:
    language: of the block.
    notes: what its first line says beside.
    text: what is run.
    """

    language: str
    notes: dict[str, str]
    text: str


def blocks(page: str) -> list[Block]:
    found = _FENCE.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return [
        Block(language, {k: v for k, _, v in (note.partition("=") for note in notes.split())}, text)
        for language, notes, text in found
    ]


def run(page: str, slow: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, tokenizer = lay_out(tmp_path)
    (tmp_path / "training").symlink_to(ROOT / "training")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for place in (mavis_logits.demo, mavis_logits.demo.smollm2, mavis_logits.models):
        monkeypatch.setattr(place, "load_smollm2", lambda *_, **__: (model, tokenizer))
    names: dict[str, Any] = {"__name__": "snippet"}
    for block in blocks(page):
        needed = block.notes.get("requires")
        if (elsewhere := block.notes.get("elsewhere")) is not None:
            assert (ROOT / elsewhere).is_file()
            continue
        if ("slow" in block.notes and not slow) or (needed is not None and not installed(needed)):
            continue
        if "file" in block.notes:
            Path(block.notes["file"]).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        elif block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith(NOT_RUN):
                    assert command(line) == 0, line


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def command(line: str) -> int:
    """The exit status of a command of ours; with a short budget, if it takes one."""
    name, *arguments = shlex.split(line, comments=True)
    assert name == "mavis", line
    return cli.main([{"30m": "60s"}.get(word, word) for word in arguments])


FAST = [page for page in RUN if any("slow" not in b.notes for b in blocks(page) if b.language in ("python", "bash"))]
SLOW = [page for page in RUN if any("slow" in block.notes for block in blocks(page))]


@pytest.mark.parametrize("page", FAST)
def test_the_blocks_of_a_page_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(page, False, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW)
def test_the_trainings_of_a_page_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(page, True, monkeypatch, tmp_path)


def test_no_page_with_blocks_is_left_out() -> None:
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    with_blocks = {page for page in pages if any(b.language in ("python", "bash") for b in blocks(page))}
    assert with_blocks - set(RUN) - set(ELSEWHERE) == {"paper_to_code.md"} & with_blocks
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


def test_every_block_of_any_page_is_python_or_names_commands_that_exist() -> None:
    from mavis_logits.commands.registry import available

    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for language, _, text in _FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                compile(text, str(page), "exec")
            if language == "bash":
                for found in re.findall(r"^\S*mavis ([\w-]+)", text, re.MULTILINE):
                    assert found in available(), f"{page.name}: mavis {found}"
