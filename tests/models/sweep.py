"""Try every model type in two processes, and write what came of it.

python tests/models/sweep.py --out docs/results/models.json    # all types
python tests/models/sweep.py llama gpt2 --show                 # some, told on the screen
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "training", "tests/models")]

LIMIT = 240  # seconds for one type
PACKAGES = ("torch", "transformers", "peft")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; exits with 1 if a verdict is not the expected one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="names of types and variants; all of them by default")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--show", action="store_true", help="print every cell")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--checks", help="only these checks, with commas between")
    options = parser.parse_args(argv)
    _be_quiet()
    from model_types import group, types
    from model_verdicts import unexpected, why

    started = time.time()
    names = options.types or types()
    rows = run(names, options.processes, set(options.checks.split(",")) if options.checks else None, options.show)
    rows.sort(key=lambda row: names.index(row["name"]))
    for row in rows:
        row["group"] = group(row["name"])
        for check, cell in row["cells"].items():
            cell |= {"why": why(row["name"], check)} if cell["verdict"] != "exact" else {}
    if options.out:
        options.out.write_text(json.dumps(_about(time.time() - started) | {"rows": rows}, indent=1) + "\n")
    print(summary(rows))
    surprises = [f"{row['name']}: {line}" for row in rows for line in unexpected(row)]
    print("\n".join(["", f"{len(surprises)} not as expected", *surprises]))
    return int(bool(surprises))


def run(names: Sequence[str], processes: int, checks: set[str] | None, show: bool) -> list[dict[str, Any]]:
    """All rows; a type that crashes its process, or takes longer than `LIMIT`, costs that row only."""
    waiting, workers, rows = list(reversed(names)), [Worker(checks) for _ in range(processes)], []
    while True:
        for number, worker in enumerate(workers):
            if worker.name is not None and (row := worker.result()) is not None:
                rows.append(row)
                print(f"{len(rows)}/{len(names)} {_line(row, show)}", flush=True)
                worker.name = None
                if worker.gone:
                    workers[number] = worker = Worker(checks)
            if worker.name is None and waiting:
                worker.begin(waiting.pop())
        busy = [worker.pipe for worker in workers if worker.name is not None]
        if not busy:
            break
        wait(busy, timeout=1.0)
    for worker in workers:
        worker.end()
    return rows


class Worker:
    """A process that tries one type after another."""

    def __init__(self, checks: set[str] | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, checks), daemon=True)
        self.process.start()
        theirs.close()
        self.name: str | None = None
        self.gone = False

    def begin(self, name: str) -> None:
        self.name, self.started = name, time.monotonic()
        self.pipe.send(name)

    def result(self) -> dict[str, Any] | None:
        """The row, once there is one."""
        try:
            if self.pipe.poll():
                return self.pipe.recv()
            problem = f"no end after {LIMIT} s" if time.monotonic() - self.started > LIMIT else None
        except (EOFError, ConnectionError):
            self.process.join()
            problem = f"the process ended with {self.process.exitcode}"
        if problem is None:
            return None
        self.gone = True
        self.process.kill()
        return {
            "name": self.name,
            "model_class": "",
            "readings": None,
            "cells": {"built": {"verdict": "crash", "detail": problem}},
        }

    def end(self) -> None:
        self.process.kill()


def _work(pipe: Connection, checks: set[str] | None) -> None:
    _be_quiet()
    import torch

    from model_checks import sweep

    torch.set_num_threads(1)
    while True:
        pipe.send(asdict(sweep(pipe.recv(), checks)))


def _be_quiet() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.disable_progress_bar()


def _about(seconds: float) -> dict[str, Any]:
    return {
        "versions": {"python": sys.version.split()[0]} | {package: version(package) for package in PACKAGES},
        "machine": f"{os.uname().machine}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "seed": 0,
        "seconds": round(seconds),
    }


def _line(row: dict[str, Any], show: bool) -> str:
    cells = row["cells"]
    if show:
        return row["name"] + "".join(f"\n    {k:20} {c['verdict']:8} {c['detail']}" for k, c in cells.items())
    return row["name"] + ": " + ", ".join(f"{k} {c['verdict']}" for k, c in cells.items() if c["verdict"] != "exact")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Verdicts counted, by check."""
    lines = []
    for check in dict.fromkeys(check for row in rows for check in row["cells"]):
        found = [row["cells"][check]["verdict"] for row in rows if check in row["cells"]]
        lines.append(f"{check:20} " + ", ".join(f"{found.count(v)} {v}" for v in sorted(set(found))))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
