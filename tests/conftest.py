"""Fixtures of the whole suite. Nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel

from hub_server import HubServer, hub_server, use_hub
from mavis_logits import ValueModel
from tiny import PAD, make_base, make_value_model

# CI tries the same examples every time; elsewhere new ones are looked for.
settings.register_profile("mavis", max_examples=60, deadline=None, derandomize="CI" in os.environ)
settings.load_profile("mavis")


@pytest.fixture
def base() -> PreTrainedModel:
    return make_base()


@pytest.fixture
def value_model() -> ValueModel:
    return make_value_model("a", "b")


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, padded on the left."""
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15]]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on this machine, which the client in this process uses, logged in as one who may write to `org/`."""
    with hub_server() as server:
        use_hub(server, monkeypatch, tmp_path / "home")
        yield server
