"""A new user's path, timed: from a clone to a steered answer in the browser, everything installed on the way.

`python benchmarks/ui_path.py` needs playwright, a Chromium and a network (or mirror) that has the packages. It clones
this repository, runs `make ui` in the clone with empty caches, opens the page, and asks the first example.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("clone", "make ui: installed", "page served", "page shown", "first steered token", "whole answer")


def run(folder: Path, port: int, question: str, patience: float) -> dict[str, float]:
    """Seconds from the beginning to the end of each of `STEPS`."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("no Chromium: apt-get install chromium")
    began, ends = time.monotonic(), {}

    def done(step: str) -> None:
        ends[step] = round(time.monotonic() - began, 1)
        print(f"{ends[step]:8.1f} s  {step}", flush=True)

    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", f"file://{ROOT}", clone], check=True)
    done("clone")
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own |= {"PIP_NO_CACHE_DIR": "1", "XDG_CACHE_HOME": str(folder / "cache"), "HF_HOME": str(folder / "hub")}
    log = folder / "log"
    with log.open("w") as out:
        command = ["make", "ui", f"ARGS=--port {port}"]
        process = subprocess.Popen(command, cwd=clone, env=own, stdout=out, stderr=out, start_new_session=True)
        try:
            for sign, step in (("Loading smollm2", "make ui: installed"), ("The page is at", "page served")):
                while sign not in log.read_text():
                    if process.poll() is not None or time.monotonic() - began > patience:
                        sys.exit(f"make ui did not come to {sign!r}:\n{log.read_text()[-2000:]}")
                    time.sleep(0.1)
                done(step)
            with sync_playwright() as driver:
                page = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
                page.goto(f"http://127.0.0.1:{port}/")
                page.wait_for_selector("#status .ready")
                done("page shown")
                page.fill("#prompt textarea", question)
                page.press("#prompt textarea", "Enter")
                page.wait_for_selector("#steered .token", timeout=1000 * patience)
                done("first steered token")
                page.wait_for_selector("#status .done", timeout=1000 * patience)
                done("whole answer")
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return ends


def main() -> None:
    """Time the path once and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/ui_path.json")
    parser.add_argument("--port", type=int, default=7955)
    parser.add_argument("--question", default="How do I make good tea?")
    parser.add_argument("--patience", type=float, default=1800, help="seconds")
    parser.add_argument("--note", default="", help="what else is to be known, such as what ran beside it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = run(Path(folder), arguments.port, arguments.question, arguments.patience)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    found = {
        "date": date.today().isoformat(), "commit": commit, "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} threads", "note": arguments.note, "seconds": ends,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
