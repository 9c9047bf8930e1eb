"""Several processes on one job: each takes its share of the work, writes its own files, and waits for the others.

    accelerate launch --multi_gpu --num_processes 4 -m mavis_logits.cli collect --config recipe.yaml

(`--multi_gpu` means several processes, on the CPU too; `torchrun --nproc-per-node 4` does the same.) Nothing is locked
and nothing is merged: rank 0 alone looks at what is done and draws up the plan, the others are told. Processes may run
on several machines if these share the file system of the store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")

# A rank that has finished waits for the slowest; when one dies, the launcher ends the others.
_TIMEOUT = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """The processes of this job, as one of them sees them.

    Attributes:
        rank: of this process, from 0.
        count: how many there are.
        device: where this process computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which plans and shows progress."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """Every `count`-th piece of `work`, from the `rank`-th: all ranks together have each piece once."""
        return list(work[self.rank :: self.count])

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank. Only rank 0 calls it."""
        if self.count == 1:
            return make()
        result: list[T | None] = [make() if self.is_main else None]
        broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            PartialState().wait_for_everyone()


def join(device: str | None = None) -> Ranks:
    """The processes that `accelerate launch` or `torchrun` started; one if this process was started by itself.

    Args:
        device: where to compute; None for a GPU if there is one. "cuda" and None are this rank's own GPU.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks(0, 1, torch.device(name))
    state = PartialState(cpu=name == "cpu", timeout=_TIMEOUT)
    own = f"cuda:{state.local_process_index}" if name == "cuda" else name
    return Ranks(state.process_index, state.num_processes, torch.device(own))
