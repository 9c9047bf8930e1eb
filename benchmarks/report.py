"""What was measured: rows that several runs of the benchmark add to, as JSON, as tables and as a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import SECTIONS
from measuring import PLAIN
from pages import markdown, plot
from row import Row
from variants import VARIANTS

DEVICES = ["cpu", "cuda"]


class Report:
    """Rows and the machines that they were measured on, kept in `decode.json`.

    Args:
        folder: for `decode.json`, `decode.md` and `decode.png`.

    Attributes:
        rows: by key.
        environments: by device: machine, versions, model, dtype, ceilings.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.environments: dict[str, dict[str, Any]] = {}
        file = folder / "decode.json"
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if "environments" in content:  # else it is of an earlier form of this benchmark, whose rows lack most columns
            self.environments = content["environments"]
            self.add(Row(**row) for row in content["results"])

    def enter(self, device: str, environment: dict[str, Any], again: bool) -> None:
        """Say what the coming rows of a device are measured on.

        Raises:
            ValueError: its rows were measured on something else, and not `again`, which removes them.
        """
        known = self.environments.get(device, environment)
        differing = [name for name in environment if name != "ceilings" and known.get(name) != environment[name]]
        if differing and not again:
            raise ValueError(
                f"the rows for {device} in {self.folder / 'decode.json'} have another {differing[0]} "
                f"({known[differing[0]]}) than this run ({environment[differing[0]]}): ratios of both do not belong in "
                "one table. Give another folder with --out, or --again to measure them anew"
            )
        if differing:
            self.rows = {key: row for key, row in self.rows.items() if row.device != device}
        self.environments[device] = environment

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows; each takes the place of an earlier one of the same key."""
        self.rows |= {row.key: row for row in rows}

    def save(self) -> None:
        """Write the JSON file: whole, or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / "decode.json.tmp"
        unfinished.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / "decode.json")

    def publish(self) -> None:
        """Write JSON, tables and plot."""
        self.save()
        rows = self.sorted()
        (self.folder / "decode.md").write_text(markdown(rows, self.environments), encoding="utf-8")
        plot(rows, self.folder / "decode.png")

    def content(self) -> dict[str, Any]:
        """Everything, as it stands in the JSON file: what is shown first is the main section of the first device."""
        device = next((name for name in DEVICES if name in self.environments), None)
        rows = self.sorted()
        main = next((row for row in rows if row.section == "main"), None)
        first = self.environments.get(device or "", {})
        settings = {name: first.get(name) for name in ("model", "dtype")}
        settings |= {name: getattr(main, name, None) for name in ("new_tokens", "top_k", "objectives", "context")}
        return {
            "date": max((row.date for row in rows), default=None),
            "machine": first.get("machine"),
            "settings": settings,
            "environments": self.environments,
            "results": [asdict(row) for row in rows],
        }

    def sorted(self) -> list[Row]:
        """Rows by device, section, setting and variant, plain `generate` first."""
        order = [PLAIN, *VARIANTS]
        sections = list(SECTIONS)

        def place(row: Row) -> tuple[Any, ...]:
            setting = (row.compiled, row.objectives, row.top_k, row.context, row.batch, row.new_tokens)
            return (DEVICES.index(row.device), sections.index(row.section), *setting, order.index(row.variant))

        return sorted(self.rows.values(), key=place)
