"""What tests of trainings by `ValueTrainer` share: to kill one, to watch one, to compare what came of two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mavis_logits.values.value_model import ValueModel
from mavis_training.fitting.value_trainer import ValueTrainer


class Killed(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


@contextmanager
def killed_after(epoch: int) -> Iterator[None]:
    """Within, a training dies once it has saved the checkpoint of this epoch."""
    save = ValueTrainer._save_checkpoint

    def die_after_saving(self, *arguments, **options):
        save(self, *arguments, **options)
        if self.state.epoch == epoch:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValueTrainer, "_save_checkpoint", die_after_saving)
        with pytest.raises(Killed):
            yield


@contextmanager
def watched(method: str) -> Iterator[list]:
    """What a method of `ValueTrainer` returns within, call by call."""
    found = []
    original = getattr(ValueTrainer, method)

    def noted(self, *arguments, **options):
        found.append(original(self, *arguments, **options))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValueTrainer, method, noted)
        yield found


def assert_same_values(one: ValueModel, other: ValueModel, tolerance: float = 1e-4) -> None:
    """On some tokens."""
    tokens = torch.arange(3, 12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(one(tokens).values, other(tokens).values, rtol=tolerance, atol=tolerance)
