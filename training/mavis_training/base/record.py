"""What a training in a folder rests on, its checkpoints, and whether it is finished."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from .files import read_json, write_json
from .kept import as_json, differences, require_same

CHECKPOINTS = "checkpoints"
RECORD = "training.json"
# Those that say how a run is watched or fed, not what it learns.
SHAPELESS = frozenset(
    {
        "report_to", "run_name", "logging_dir", "logging_steps", "logging_strategy", "logging_first_step", "log_level",
        "disable_tqdm", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "save_total_limit", "project", "trackio_space_id",
    }
)  # fmt: skip


class Record:
    """What a training rests on, kept in its output folder from its first step on.

    Args:
        output: the folder.
        origin: everything that shapes what is learned.
    """

    def __init__(self, output: str | Path, origin: Mapping[str, Any]) -> None:
        self.output, self.origin = Path(output), as_json(origin)

    @property
    def path(self) -> Path:
        """Its file."""
        return self.output / RECORD

    def is_finished(self, is_main: bool, fresh: bool = False, replaces: bool = False) -> bool:
        """Whether this training has been done here. If it was interrupted, or is new, it is noted as begun.

        Args:
            is_main: of several processes, whether this is the one that writes; the others ask after it.
            fresh: forget what was done.
            replaces: another training's result is told and replaced, not refused: for trainings of minutes.

        Raises:
            ValueError: another training's results or checkpoints lie there; the message says what differs.
        """
        checkpoints = self.output / CHECKPOINTS
        if fresh and is_main:
            shutil.rmtree(checkpoints, ignore_errors=True)
            checkpoints.mkdir(parents=True)  # the Trainer has made it, and looks into it
            self.path.unlink(missing_ok=True)
        known = read_json(self.path) if self.path.exists() else None
        begun = last_whole_checkpoint(checkpoints) is not None if checkpoints.is_dir() else False
        if begun or (known and known["finished"]):
            old: dict[str, Any] | None = known["origin"] if known else None
            if replaces and old is not None and (changed := differences(old, self.origin)):
                if is_main:
                    tqdm.write(f"{self.output}: replaces the result of another training: {'; '.join(changed)}")
            else:
                what = f"{self.output} holds {'checkpoints' if begun else 'the result'} of another training"
                require_same(what, old, self.origin, "output")
                if not begun:
                    if is_main:
                        tqdm.write(
                            f"{self.output}: finished before, under the same settings; fresh: true does it again"
                        )
                    return True
        if is_main:
            self.write(False)
        return False

    def write(self, finished: bool) -> None:
        """Note that the training is finished, or only begun."""
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"finished": finished, "origin": self.origin})


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that `Trainer` finished writing; unfinished ones, of a killed run, are removed."""
    while (newest := get_last_checkpoint(str(folder))) is not None:
        try:
            read_json(Path(newest) / TRAINER_STATE_NAME)  # written last
        except (OSError, ValueError):
            shutil.rmtree(newest)
        else:
            return newest
    return None


def clear_checkpoints(output: str | Path) -> None:
    """Remove a finished training's checkpoints; what loggers wrote beside them moves to `<output>/runs`."""
    checkpoints = Path(output) / CHECKPOINTS
    if (checkpoints / "runs").is_dir():
        shutil.copytree(checkpoints / "runs", Path(output) / "runs", dirs_exist_ok=True)
    shutil.rmtree(checkpoints)
