"""Every model type against slow twins (slow), and a few that stand for the others."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

import model_types
import models_page
import sweep
from mavis_logits.backbone import Backbone, probe
from model_checks import CHECKS
from model_checks import sweep as try_type
from model_types import tiny_config, types
from model_verdicts import EXCEPTIONS, unexpected

# One of every way in which models differ for us: positions, windows, masks of their own, states, wrappers.
REPRESENTATIVES = [
    "bart", "bloom", "gemma3_text", "gemma4_text+kvshared", "gpt2", "gpt_neo", "llama", "llava", "mamba", "mpt",
    "qwen3_5", "qwen3_next",
]  # fmt: skip


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_type_that_stands_for_others_is_exact(name):
    assert unexpected(asdict(try_type(name))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", types())
def test_every_type_is_exact_or_a_known_exception(name):
    assert unexpected(asdict(try_type(name))) == []


def test_a_wrong_reading_is_found(monkeypatch):
    wrong = probe.Reading("masked", "")
    monkeypatch.setattr(Backbone, "reading", property(lambda self: wrong))
    row = try_type("gpt_neo", {"sampling", "value"})
    assert {row.cells[check].verdict for check in ("sampling", "value")} == {"wrong"}
    assert len(unexpected(asdict(row))) == 2


def test_what_fails_is_told_by_kind(monkeypatch):
    def refuse(self):
        raise ValueError("not that one")

    monkeypatch.setitem(CHECKS, "processor", lambda subject: 1 / 0)
    monkeypatch.setattr(Backbone, "layers", property(refuse))
    row = try_type("llama", {"processor", "processor_head"})
    assert row.cells["processor"].verdict == "crash"
    assert "ZeroDivisionError" in row.cells["processor"].detail
    assert row.cells["processor_head"].verdict == "exact"
    assert try_type("no-such-type").cells["built"].verdict == "crash"


def test_a_type_that_kills_its_process_or_hangs_costs_its_row_only(monkeypatch):
    dead, hung = sweep.Worker(None), sweep.Worker(None)
    dead.begin("llama")
    dead.process.kill()
    dead.process.join()
    assert "ended with -9" in dead.result()["cells"]["built"]["detail"]
    hung.begin("llama")
    assert hung.result() is None
    monkeypatch.setattr(sweep, "LIMIT", -1)
    assert "no end after" in hung.result()["cells"]["built"]["detail"]
    hung.process.join(10)
    assert hung.process.exitcode == -9


def test_windows_are_shorter_than_the_prompts():
    for name in ("gemma3_text", "llama4_text", "mistral", "qwen2", "phi3", "gpt_neo", "modernbert-decoder"):
        config = tiny_config(name).get_text_config(decoder=True)
        windows = [getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size", "window_size")]
        assert [w for w in windows if w] == [model_types.WINDOW], name


def test_exceptions_name_types_and_checks_that_exist():
    checks = {"built", "readings", *CHECKS}
    assert {check for _, check in EXCEPTIONS} <= checks
    assert all(why and verdict in ("refused", "crash", "wrong", "-") for verdict, why in EXCEPTIONS.values())


def test_the_page_says_what_the_results_say():
    if not models_page.RESULTS.exists():
        pytest.skip("no results yet")
    results = json.loads(models_page.RESULTS.read_text())
    assert models_page.PAGE.read_text() == models_page.rendered(results)
    assert [line for row in results["rows"] for line in unexpected(row)] == []
