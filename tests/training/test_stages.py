from __future__ import annotations

import json

import pytest
import torch

from mavis_training.base.ranks import Ranks
from mavis_training.iteration.stages import StageLog as Log

ALONE = Ranks(0, 1, torch.device("cpu"))


def StageLog(path, reuse=None):
    return Log(path, ALONE, reuse)


@pytest.fixture
def done():
    return []


def work(done, name, **result):
    return lambda: done.append(name) or result


def test_a_stage_is_done_once(tmp_path, done):
    path = tmp_path / "run" / "log.json"
    first = StageLog(path).run("a", {"x": 1}, [], work(done, "a", found=3))
    again = StageLog(path).run("a", {"x": 1}, [], work(done, "again"))
    assert done == ["a"]
    assert first == again
    assert again.result == {"found": 3}
    assert again.path == tmp_path / "run" / "a"
    given = StageLog(path).run("b", {}, [again], work(done, "b", existing="elsewhere/b"))
    assert str(given.path) == "elsewhere/b"


def test_a_killed_stage_is_done_again(tmp_path, done):
    path = tmp_path / "log.json"

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StageLog(path).run("a", {"x": 1}, [], killed)
    assert "seconds" not in json.loads(path.read_text())["stages"]["a"]
    assert StageLog(path).run("a", {"x": 1}, [], work(done, "a", n=1)).result == {"n": 1}
    assert done == ["a"]


def test_changed_settings_are_refused_by_name(tmp_path, done):
    path = tmp_path / "log.json"
    StageLog(path).run("a", {"x": {"rate": 1, "none": {}}, "old": 1}, [], work(done, "a"))
    with pytest.raises(ValueError, match=r"a was begun with x\.rate = 1, this run has 2.*reuse"):
        StageLog(path).run("a", {"x": {"rate": 2, "none": {}}, "old": 1}, [], work(done, "a"))
    with pytest.raises(ValueError, match="old = 1, this run has None"):
        StageLog(path).run("a", {"x": {"rate": 1, "none": {}}}, [], work(done, "a"))
    newer = {"x": {"rate": 1, "none": {}}, "old": 1, "new": 5}  # a field that the older version did not know
    StageLog(path).run("a", newer, [], work(done, "a"))
    assert done == ["a"]


def test_stages_of_another_run_are_reused_if_all_they_rest_on_is_the_same(tmp_path, done):
    one, two, three = (tmp_path / name / "log.json" for name in ("one", "two", "three"))

    def run(log, rate):
        a = log.run("a", {"x": 1}, [], work(done, "a"))
        b = log.run("b", {"rate": rate}, [a], work(done, "b"))
        return a, b, log.run("c", {}, [b], work(done, "c"))

    run(StageLog(one), 1)
    a, b, c = run(StageLog(two, reuse=one.parent), 2)
    assert done == ["a", "b", "c", "b", "c"]
    assert (a.run, b.run, c.run) == (one.parent, two.parent, two.parent)
    assert a.path == one.parent / "a"
    a, b, c = run(StageLog(three, reuse=two.parent), 2)
    assert len(done) == 5
    assert (a.run, b.run, c.run) == (one.parent, two.parent, two.parent)
    assert run(StageLog(three), 2)[0] == a  # once taken over, the other run need not be named again


def test_an_unfinished_stage_is_not_reused(tmp_path, done):
    one, two = tmp_path / "one" / "log.json", tmp_path / "two" / "log.json"
    with pytest.raises(ZeroDivisionError):
        StageLog(one).run("a", {}, [], lambda: 1 / 0)
    assert StageLog(two, reuse=one.parent).run("a", {}, [], work(done, "a")).run == two.parent


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not the folder of a run \(it has no log\.json"):
        StageLog(tmp_path / "run" / "log.json", reuse=tmp_path)
    path = tmp_path / "log.json"
    path.write_text('{"format_version": 99, "stages": {}}')
    with pytest.raises(ValueError, match="format_version 99"):
        StageLog(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        StageLog(path)
