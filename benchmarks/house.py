"""How easily two checkouts of this repository are read: circles of imports, sizes, and what names travel through.

    git worktree add ../before COMMIT
    python benchmarks/house.py ../before                 # writes docs/results/house.json and house.md

The walk of a name is followed while `mavis generate` steers SmolLM2 by two value models: every call of a function of
the package that has an argument or a variable of that name is a stop. *Files* are those that it stops at, *back* how
often it returns to one that it had left. `weights` is followed from the command line to the end of the first step, the
others through one later step.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

from checkouts import ROOT, commit, environment

PACKAGES = {"src": "src/mavis_logits", "training": "training/mavis_training"}
NAMES = ("weights", "candidates", "input_ids")
COMMAND = [
    "generate", "--prompt", "How do I make good tea?", "--weights", "helpful=0.7,humour=0.3", "--max-new-tokens", "8",
    "--values", "helpful=model_cards/smollm2-135m-value-helpful", "humour=model_cards/smollm2-135m-value-humour",
]  # fmt: skip
STARTS = {
    "`import mavis_logits`": "import mavis_logits",
    "its processor": "import mavis_logits; mavis_logits.MavisLogitsProcessor",
    "`mavis --help`": "import sys; from mavis_logits.cli import main; sys.stdout = open('/dev/null', 'w'); main([])",
}
ROUNDS = 5
STEP = 5  # the step that is followed, counted from 1: the prompt has been read by then


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print and write."""
    options = parser().parse_args(argv)
    if options.walk:
        print(json.dumps(walks()))
        return 0
    sides = {"before": options.other, "now": ROOT}
    found = {name: look(checkout) for name, checkout in sides.items()}
    for title, code in STARTS.items():
        for name, seconds in start_seconds(sides, code).items():
            found[name].setdefault("starts", {})[title] = seconds
    kinds = {"moves": options.moves, "changes": options.changes}
    commits = {kind: [size_of(one) for one in given] for kind, given in kinds.items()}
    result = {"date": str(date.today()), "python": platform.python_version(), **found, "commits": commits}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = table(result)
    options.out.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("other", type=Path, help="folder of the other checkout")
    made.add_argument("--out", type=Path, default=ROOT / "docs/results/house.json")
    made.add_argument("--moves", nargs="*", default=[], metavar="COMMIT", help="those between that only move things")
    made.add_argument("--changes", nargs="*", default=[], metavar="COMMIT", help="those that change what is done")
    made.add_argument("--walk", action="store_true", help=argparse.SUPPRESS)
    return made


def look(checkout: Path) -> dict[str, Any]:
    """Everything about one checkout."""
    found: dict[str, Any] = {"commit": commit(checkout)}
    for title, place in PACKAGES.items():
        package = checkout / place
        circles = circular(graph(package))
        lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")}
        found[title] = {
            "circles": len(circles), "files in circles": sum(map(len, circles)), "files": len(lines),
            "folders": len({path.parent for path in lines}), "lines": sum(lines.values()),
            "longest file": max(lines.values()), "longest function": max(map(longest_function, lines)),
        }  # fmt: skip
    command = [sys.executable, __file__, str(checkout), "--walk"]
    own = environment(checkout)
    done = subprocess.run(command, env=own, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True)
    return found | {"walks": json.loads(done.stdout.splitlines()[-1])}


def start_seconds(sides: Mapping[str, Path], code: str) -> dict[str, float]:
    """Median of the seconds that a Python takes to start and run some code, all sides by turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, checkout in sides.items():
            own = environment(checkout)
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=own, check=True)
            taken[name].append(time.perf_counter() - started)
    return {name: round(statistics.median(seconds), 3) for name, seconds in taken.items()}


def size_of(commit: str) -> dict[str, Any]:
    """Subject of a commit, and how much it changed; a file that it renamed counts by the lines that changed in it."""
    command = ["git", "-C", str(ROOT), "show", "-M", "--shortstat", "--summary", "--format=%h %s", commit]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (file|insertion|deletion)", text)}
    return {"commit": text.splitlines()[0], "renamed": len(re.findall(r"^ rename ", text, re.MULTILINE)), **counts}


def graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of its package that it imports, those for types alone too."""
    files = {_module(package, path): path for path in package.rglob("*.py")}
    return {name: _imports(name, path, files) - {name} for name, path in files.items()}


def _module(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, path: Path, files: dict[str, Path]) -> set[str]:
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in files else base for a in node.names}
    return found & files.keys()


def circular(imports: dict[str, set[str]]) -> list[set[str]]:
    """Modules that import each other, however far around: every set of two or more that all reach each other."""
    reached = {name: _reached(name, imports) for name in imports}
    circles = {frozenset(b for b in reached[a] if a in reached[b]) for a in imports if a in reached[a]}
    return [set(circle) for circle in circles]


def _reached(name: str, imports: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = list(imports[name])
    while todo:
        if (at := todo.pop()) not in found:
            found.add(at)
            todo += imports[at]
    return found


def longest_function(path: Path) -> int:
    """Lines of the longest function of a file, its documentation and signature included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return max((node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno), default=0)


def walks() -> dict[str, dict[str, int]]:
    """Follow `NAMES` through `mavis generate` of the checkout that is imported."""
    import transformers

    from mavis_logits import cli

    transformers.utils.logging.disable_progress_bar()
    package = str(Path(cli.__file__).parent)
    stops: dict[str, list[str]] = {name: [] for name in NAMES}
    steps = 0

    def follow(frame: FrameType, event: str, _: Any) -> None:
        nonlocal steps
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package):
            return
        steps += code.co_qualname == "MavisLogitsProcessor.__call__"
        for name in NAMES:
            followed = steps <= 1 if name == "weights" else steps == STEP
            if name in code.co_varnames and followed:
                stops[name].append(code.co_filename.removeprefix(package))

    sys.setprofile(follow)
    try:
        cli.main(COMMAND)
    finally:
        sys.setprofile(None)
    return {name: _counted(found) for name, found in stops.items()}


def _counted(stops: list[str]) -> dict[str, int]:
    order = [file for file, _ in groupby(stops)]
    return {"files": len(set(order)), "back": sum(times - 1 for times in Counter(order).values()), "calls": len(stops)}


def table(result: dict[str, Any]) -> str:
    """A page of all that was found."""
    before, now = result["before"], result["now"]
    lines = [f"| | before ({before['commit']}) | now ({now['commit']}) |", "|---|---|---|"]
    for place in PACKAGES:
        for name, value in now[place].items():
            lines.append(f"| {place}: {name} | {before[place][name]:,} | {value:,} |")
    for name in NAMES:
        each = (f"{side['walks'][name]['files']} files, {side['walks'][name]['back']} back" for side in (before, now))
        lines.append(f"| the walk of `{name}` | {' | '.join(each)} |")
    for title, seconds in now["starts"].items():
        lines.append(f"| seconds to start: {title} | {before['starts'][title]:.2f} | {seconds:.2f} |")
    for kind, commits in result["commits"].items():
        lines += (
            ["", f"Commits, {kind}:", "", "| commit | files | renamed | lines |", "|---|---|---|---|"]
            if commits
            else []
        )
        for one in commits:
            changed = f"+{one.get('insertion', 0):,} -{one.get('deletion', 0):,}"
            lines.append(f"| {one['commit']} | {one['file']} | {one['renamed']} | {changed} |")
    return "\n".join([*lines, "", f"By `benchmarks/house.py`; {result['date']}.", ""])


if __name__ == "__main__":
    sys.exit(main())
