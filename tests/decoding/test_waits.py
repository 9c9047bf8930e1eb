"""How often a step waits for the device: on a GPU, nothing runs ahead of a wait.

Counted is what would wait there: values taken to the host, and operations whose result's shape depends on values.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mavis_logits import MavisLogitsProcessor, MavisSampling
from tiny import EOS, PAD, functions, make_base

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
STEPS = 6


class Waits(TorchDispatchMode):
    """Counts what waits for the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        for name in ("cpu", "tolist", "numpy"):
            self._count(monkeypatch, name)

    def _count(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(Tensor, name)

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            # `x.cpu().numpy()` is one wait
            if name != "numpy":
                self.found[name] += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return original(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def waits_a_step(base: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> float:
    """Of the later steps of a text; the first one also looks closely whether value functions have changed."""
    base.generate(IDS, max_new_tokens=2, pad_token_id=PAD, **settings)  # models are probed once
    totals = []
    for steps in (STEPS, 2 * STEPS):
        with monkeypatch.context() as patched, Waits(patched) as waits:
            base.generate(IDS, do_sample=True, max_new_tokens=steps, pad_token_id=PAD, top_k=0, **settings)
        totals.append(waits.found.total())
    return (totals[1] - totals[0]) / STEPS


def steering(kind: Any, which: str, base: Any, **settings: Any) -> Any:
    return kind(
        functions(which, base), {"a": 0.7, "b": 0.3}, 4.0, model=base, top_k=6, pad_token_id=PAD, eos_token_id=EOS,
        **settings,
    )  # fmt: skip


@pytest.fixture
def base() -> Any:
    base = make_base()
    base.generation_config.eos_token_id = None  # rows that end wait once more, with and without steering
    return base


@pytest.mark.parametrize(("which", "most"), [("head", 1), ("heads", 1), ("model", 2), ("mixed", 2)])
@pytest.mark.parametrize("min_p", [None, 0.05])
def test_a_step_of_the_processor_waits_once_and_with_value_models_twice(
    which: str, most: int, min_p: float | None, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mavis = steering(MavisLogitsProcessor, which, base, candidate_min_p=min_p)
    own = waits_a_step(base, monkeypatch, logits_processor=[mavis]) - waits_a_step(base, monkeypatch)
    cut = min_p is not None and which in ("model", "mixed")  # once more for the candidates that are left to be read
    assert 0 < own <= most + cut


@pytest.mark.parametrize("which", ["head", "model", "mixed"])
def test_a_step_of_a_strategy_waits_once(which: str, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mavis = steering(MavisSampling, which, base)
    assert 0 < waits_a_step(base, monkeypatch, custom_generate=mavis) <= 1
