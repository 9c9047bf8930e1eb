"""Every example of docs/hub.md runs, in order, against a Hub on this machine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer
from mavis_logits import cli
from mavis_logits.hub.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/hub.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_examples_are_well_formed() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash", "json"}
    for language, text in BLOCKS:
        if language == "python":
            compile(text, "docs/hub.md", "exec")
        elif language == "json":
            assert Bundle.from_dict(json.loads(text)).config.beta == 4.0
        else:
            assert all(line.startswith("mavis ") for line in text.splitlines())


@pytest.mark.slow
def test_the_examples_run(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "docs/hub.md", "exec"), names)
        elif language == "bash":
            for line in text.splitlines():
                assert cli.main(shlex.split(line)[1:]) == 0, line
    assert set(hub.repositories) == {"org/value-helpful", "org/value-humour", "org/steering-bundle"}
    assert "trial" in hub.repositories["org/value-humour"].refs
    assert hub.repositories["org/value-helpful"].private
