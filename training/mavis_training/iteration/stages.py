"""A long run as named stages, recorded on disk: killed at any instant, a rerun goes on with the stage it was in.

Of several processes (`mavis_training.base.ranks`) all do a stage's work together, and rank 0 keeps the record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.files import read_json, write_json
from ..base.kept import as_json, digest, flat
from ..base.ranks import Ranks

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        name: also where its output lies within the run's folder.
        run: folder of the run that did it, another one's if its result was reused.
        key: digest of its settings and of the stages that it rests on.
        seconds: that it took, in the attempt that finished it.
        result: what it found; `"existing"` names output that was there already, in place of the run's own.
    """

    name: str
    run: Path
    key: str
    seconds: float
    result: dict[str, Any]

    @property
    def path(self) -> Path:
        """Its output, a file or folder."""
        return Path(self.result.get("existing", self.run / self.name))


class StageLog:
    """The stages of one run, in a JSON file that changes in one step.

    Args:
        path: the file; its folder is the run's.
        ranks: the processes of this job.
        reuse: folder of another run, with a file of the same name. A stage that was finished there under the same
            settings, resting on the same stages, is taken from there.

    Raises:
        ValueError: a file of a newer format, or damaged.
        OSError: `reuse` has no such file.
    """

    def __init__(self, path: Path, ranks: Ranks, reuse: str | Path | None = None) -> None:
        self.path, self.ranks = path, ranks
        self._stages = ranks.agree(lambda: _read(path) if path.exists() else {})
        self._others: dict[str, Any] = {}
        if reuse is not None:
            other = Path(reuse) / path.name
            if not other.exists():
                raise FileNotFoundError(f"reuse: {reuse} is not the folder of a run (it has no {path.name}).")
            found = ranks.agree(lambda: _read(other))
            self._others = {name: {"run": str(reuse)} | record for name, record in found.items()}

    def run(
        self,
        name: str,
        settings: dict[str, Any],
        after: Sequence[Stage],
        work: Callable[[], dict[str, Any]],
    ) -> Stage:
        """Do a stage unless it has been done, and record it.

        Args:
            name: of the stage.
            settings: all that shapes its result, as JSON; places of files and devices do not belong here.
            after: the stages that it rests on.
            work: does it, in a way that goes on where an interrupted attempt stood; returns its result, as JSON. Every
                rank calls it; the result of rank 0 counts.

        Raises:
            ValueError: the stage was begun under other settings; the message names the first that differs.
        """
        settings = as_json(settings)
        key = digest([name, settings, [stage.key for stage in after]])
        record = self._stages.get(name)
        if record is not None:
            self._require_same(name, record["settings"], settings)
        other = self._others.get(name)
        if (record is None or "seconds" not in record) and other and other["key"] == key and "seconds" in other:
            record = self._stages[name] = other
            self._write()
        if record is None:
            record = self._stages[name] = {"settings": settings, "key": key}
            self._write()
        if "seconds" not in record:
            started = time.monotonic()
            result = as_json(work())
            seconds = round(time.monotonic() - started, 3)
            record |= self.ranks.agree(lambda: {"result": result, "seconds": seconds})
            self._write()
        return Stage(name, Path(record.get("run", self.path.parent)), key, record["seconds"], record["result"])

    def _require_same(self, name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Refuse changed settings. What older records lack, fields of a newer version, is no change."""
        for field, before in flat(old).items():
            now = flat(new).get(field)
            if before != now:
                raise ValueError(
                    f"{self.path}: {name} was begun with {field} = {before!r}, this run has {now!r}. Use the same "
                    f"settings, or another output; with reuse: {self.path.parent} it takes over what is unchanged."
                )

    def _write(self) -> None:
        if not self.ranks.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"format_version": FORMAT_VERSION, "stages": self._stages})


def finished_stages(path: Path) -> set[str]:
    """Names of the stages that a run's file records as finished; none where there is no file. Raises as `StageLog`."""
    return {name for name, record in _read(path).items() if "seconds" in record} if path.exists() else set()


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, this mavis-logits reads up to {FORMAT_VERSION}: upgrade it, or give "
            "another output."
        )
    return content["stages"]
