"""Bases that accelerate has dispatched, and adapters switched between calls: steered as the plain model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mavis_logits import MavisLogitsProcessor, MavisSampling
from processor_checks import BETA, WEIGHTS, K
from test_base_changes import USES, with_adapters, write
from tiny import functions, make_base, make_value_model, make_words

MAPS: dict[str, Any] = {
    "whole": {"": "cpu"},
    "part on disk": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                     "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
}  # fmt: skip


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("kind", ["model", "head", "heads", "words"])
def test_a_dispatched_base_is_steered_as_the_plain_one(where: str, kind: str, tmp_path: Path) -> None:
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=MAPS[where], offload_folder=tmp_path / "offload"
    ).eval()
    assert isinstance(loaded, LlamaForCausalLM)
    if where != "whole":
        assert loaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    settings: dict[str, Any] = {"beta": BETA, "top_k": K}
    for use in (MavisLogitsProcessor, MavisSampling):
        own, away = functions(kind, base), functions(kind, loaded)
        expected = write(base, use(own, WEIGHTS, model=base, **settings))
        assert torch.equal(write(loaded, use(away, WEIGHTS, model=loaded, **settings)), expected)


@pytest.mark.parametrize("kind", USES)
def test_adapters_switched_between_calls_change_the_reference_of_a_value_model(kind: Any) -> None:
    """A value model reads tokens only: any adapter may be active. A head refuses another (`test_base_changes`)."""
    model = with_adapters("one", "two")
    steering = kind(make_value_model("a"), beta=3.0, top_k=5, model=model)
    found = {}
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        fresh = kind(make_value_model("a"), beta=3.0, top_k=5, model=model)
        again = write(model, steering)
        assert torch.equal(again, write(model, fresh))
        assert name not in found or torch.equal(found[name], again)
        found[name] = again
    assert not torch.equal(found["one"], found["two"])


@pytest.mark.parametrize("kind", USES)
def test_words_are_read_by_the_adapter_that_is_active(kind: Any) -> None:
    model = with_adapters("one", "two")
    steering = kind(make_words(model, "joke"), beta=1.5, top_k=5, model=model)
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        fresh = kind(make_words(model, "joke"), beta=1.5, top_k=5, model=model)
        assert torch.equal(write(model, steering), write(model, fresh))
