"""What an earlier version of this library saved (`tests/former`, written at commit 9405894) loads, and says the same.

`expected.json` holds what that version itself computed with these files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mavis_logits import MavisLogitsProcessor, MavisSampling, ValueHead, ValueModel

FORMER = Path(__file__).parent / "former"
EXPECTED = json.loads((FORMER / "expected.json").read_text(encoding="utf-8"))
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(FORMER / "base").eval()


@torch.no_grad()
def test_a_value_model() -> None:
    values = ValueModel.from_pretrained(FORMER / "model")(IDS).values[0]
    torch.testing.assert_close(values, torch.tensor(EXPECTED["model"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merge", [True, False])
@torch.no_grad()
def test_an_adapter(merge: bool) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(FORMER / "adapter-base")
    values = ValueModel.from_pretrained(FORMER / "adapter", backbone=backbone, merge=merge)(IDS).values[0]
    torch.testing.assert_close(values, torch.tensor(EXPECTED["adapter"]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["head", "inner-head"])
@torch.no_grad()
def test_a_value_head_knows_its_base_by_the_fingerprint_of_then(name: str, base: Any) -> None:
    head = ValueHead.from_pretrained(FORMER / name).bind(base).eval()
    values = head(torch.linspace(-1, 1, 32)[None], IDS)
    torch.testing.assert_close(values, torch.tensor(EXPECTED[name]), atol=1e-4, rtol=1e-4)
    other = AutoModelForCausalLM.from_pretrained(FORMER / "adapter-base")
    with pytest.raises(ValueError, match="weights"):
        ValueHead.from_pretrained(FORMER / name).bind(other)


@pytest.mark.parametrize("kind", [MavisLogitsProcessor, MavisSampling])
def test_a_bundle_steers_as_it_did(kind: Any, base: Any) -> None:
    mavis = kind.from_pretrained(FORMER / "bundle", model=base, pad_token_id=0)
    assert mavis.config.top_k == 5
    assert mavis.objectives == ["a", "c"]
    steered = {"custom_generate": mavis} if kind is MavisSampling else {"logits_processor": [mavis]}
    written = base.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, **steered)
    assert written.tolist() == EXPECTED["bundle"]
