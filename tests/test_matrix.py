"""The matrix of versions: what its environments ask for, and what it makes of pytest's reports."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

import matrix

RUN = {"passed": 90, "failed": 1, "skipped": 2, "seconds": 240, "failures": ["tests.test_a::test_b[1]"]}


def number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def test_the_oldest_environment_has_every_declared_floor_and_no_other_torch() -> None:
    oldest = matrix.environments()["oldest"]
    exact = dict(line.split("==") for line in oldest.constraints)
    assert matrix.floors().items() - {("torch", matrix.floors()["torch"])} <= exact.items()
    assert exact["torch"] == matrix.pins()["torch"]
    asked = {re.split(r"[>\[]", line)[0].lower() for line in oldest.requirements}
    assert set(matrix.floors()) - {"torch"} <= asked
    assert "pytest" in asked


def test_the_newest_environment_has_the_newest_releases_and_the_pins_for_the_rest() -> None:
    exact = dict(line.split("==") for line in matrix.environments()["newest"].constraints)
    assert exact == matrix.pins() | matrix.NEWEST
    for package, newest in matrix.NEWEST.items():
        assert number(matrix.floors()[package]) <= number(matrix.pins()[package]) <= number(newest)


def test_other_pythons_have_the_newest_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "python_of", lambda version: f"/opt/python{version}" if version != "3.14" else None)
    monkeypatch.setattr(matrix, "version_of", lambda python: python.removeprefix("/opt/python") + ".1")
    known = matrix.environments()
    assert [name for name in known if name.startswith("python")] == ["python3.12", "python3.13"]
    assert known["python3.12"].constraints == known["newest"].constraints
    assert len({one.digest for one in known.values()}) == len(known)
    assert len({one.folder for one in known.values()}) == len(known)


def test_a_python_is_one_that_runs_and_has_the_version(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ".".join(map(str, sys.version_info[:2]))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.python_of(own) is None
    (tmp_path / f"python{own}").write_text("#!/bin/sh\nexit 127\n")  # such as a shim of a version that is not chosen
    (tmp_path / f"python{own}").chmod(0o755)
    assert matrix.python_of(own) is None
    place = tmp_path / "versions" / f"{own}.99" / "bin"
    place.mkdir(parents=True)
    (place / "python").symlink_to(sys.executable)
    assert matrix.python_of(own) == str(place / "python")


def test_another_release_is_tried_beside_the_pins() -> None:
    known = matrix.environments({"transformers": "5.99.0"})
    assert "transformers==5.99.0" in known["trial"].constraints
    assert known["trial"].digest != known["newest"].digest
    assert known["newest"].digest == matrix.environments()["newest"].digest
    assert "trial" not in matrix.environments()


def test_an_unknown_environment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["trial"], ["latest"]):
        with pytest.raises(SystemExit):
            matrix.main(arguments)
        assert f"unknown {arguments[0]}: there are oldest, newest" in capsys.readouterr().err


def test_reports_are_counted() -> None:
    report = """<testsuites><testsuite name="pytest" tests="5" failures="1" errors="1" skipped="1" time="61.6">
        <testcase classname="tests.test_a" name="test_fine"/>
        <testcase classname="tests.test_a" name="test_b[1]"><failure message="no"/></testcase>
        <testcase classname="tests.test_a" name="test_c"><error message="no"/></testcase>
        <testcase classname="tests.test_a" name="test_d"><skipped/></testcase>
        <testcase classname="tests.test_a" name="test_e"/>
    </testsuite></testsuites>"""
    assert matrix.counted(report) == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "seconds": 62,
        "failures": ["tests.test_a::test_b[1]", "tests.test_a::test_c"],
    }


class Recorded(matrix.Environment):
    """An environment that is never made."""

    def install(self) -> None:
        pass

    def versions(self) -> dict[str, str]:
        return {"python": "3.11.7", **matrix.floors()}

    def test(self, name: str, arguments: Any) -> dict[str, Any]:
        return RUN


def test_every_result_is_kept_until_it_is_measured_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = matrix.environments
    monkeypatch.setattr(
        matrix,
        "environments",
        lambda other=None: {
            name: Recorded(name, one.requirements, one.constraints, one.interpreter)
            for name, one in made(other).items()
        },
    )
    result = property(lambda environment: tmp_path / f"{environment.name}-result.json")
    monkeypatch.setattr(matrix.Environment, "result", result)
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(matrix, "SWEEP", tmp_path / "none")
    assert matrix.main(["newest"]) == 1  # a test failed
    assert matrix.main(["oldest"]) == 1
    results = json.loads((tmp_path / "versions.json").read_text())
    assert list(results) == ["oldest", "newest"]
    assert results["newest"]["suite"] == RUN
    assert results["newest"]["sweep"] is None
    text = (tmp_path / "versions.md").read_text()
    assert "90 passed, 1 failed, 2 skipped in 4 min" in text
    assert "- `tests.test_a::test_b[1]`" in text
    before = (tmp_path / "versions.json").read_bytes()
    matrix.main(["oldest", "--tests", "tests/backbone/test_cache.py"])
    matrix.main(["--with", "transformers==5.99.0"])
    assert (tmp_path / "versions.json").read_bytes() == before


def test_the_committed_table_is_of_the_declared_versions() -> None:
    if not matrix.RESULTS.is_file():
        pytest.skip("not measured yet")
    results = json.loads(matrix.RESULTS.read_text())
    for package, floor in matrix.floors().items():
        if package != "torch":
            assert number(results["oldest"]["versions"][package])[: len(number(floor))] == number(floor), package
    assert matrix.NEWEST.items() <= results["newest"]["versions"].items()
    assert matrix.RESULTS.with_suffix(".md").read_text() == matrix.page(results)
