"""`kill -9` at random instants of every stage: a rerun completes, and nothing is lost, repeated or changed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from datetime import date
from importlib.metadata import version

import pytest

import killing
from collecting import assert_alike
from mavis_training.trees.tree_store import TreeStore

KILLS = 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    return killing.server()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    killing.write_inputs(folder)
    return folder


def start(server, work, stage, run, other=False):
    process = server.Process(target=killing.run_stage, args=(stage, work, run, work / "log.txt", other))
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(server, work):
    """Of every stage, the folder where it ran undisturbed and the seconds that it took."""
    before, runs = None, {}
    for stage in killing.STAGES:
        run = work / f"whole-{stage}"
        begin(run, before)
        started = time.monotonic()
        process = start(server, work, stage, run)
        process.join()
        assert process.exitcode == 0, (work / "log.txt").read_text()
        runs[stage] = run, time.monotonic() - started
        before = run
    return runs


def begin(run, before):
    """A folder in which the stage before has run."""
    if before is None:
        run.mkdir()
    else:
        shutil.copytree(before, run)


def test_every_stage_survives_kills_at_random_instants(server, work, whole):
    rng, stages = random.Random(20), list(killing.STAGES)
    killed: Counter[str] = Counter()
    for attempt in range(2 * KILLS):
        stage = stages[attempt % len(stages)]
        run = work / f"run-{attempt}"
        position = stages.index(stage)
        begin(run, whole[stages[position - 1]][0] if position else None)
        process = start(server, work, stage, run)
        process.join(rng.uniform(0.02, 0.95) * whole[stage][1])
        process.kill()
        process.join()
        killed[stage] += process.exitcode == -9
        rerun = start(server, work, stage, run)
        rerun.join()
        assert rerun.exitcode == 0, f"{stage}, attempt {attempt}\n" + (work / "log.txt").read_text()[-5000:]
        assert_same(run, whole[stage][0])
        shutil.rmtree(run)
        if killed.total() == KILLS:
            break
    assert killed.total() == KILLS
    assert all(killed[stage] for stage in stages), killed
    print(f"killed at random instants (seed 20): {dict(killed)}; every rerun left what an undisturbed run leaves")
    print(f"torch {version('torch')}, transformers {version('transformers')}, {date.today()}")


@pytest.mark.parametrize("stage", list(killing.STAGES))
def test_after_ctrl_c_other_settings_are_refused_and_the_same_go_on(server, work, whole, stage):
    stages, log = list(killing.STAGES), work / "log.txt"
    position, interrupted, refused = stages.index(stage), 0, 0
    for share in (0.35, 0.5, 0.65, 0.8):
        run = work / f"ctrl-c-{stage}-{share}"
        begin(run, whole[stages[position - 1]][0] if position else None)
        process = start(server, work, stage, run)
        process.join(share * whole[stage][1])
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
        process.join()
        interrupted += process.exitcode == 1  # KeyboardInterrupt came through
        log.write_text("")
        other = start(server, work, stage, run, other=True)
        other.join()
        if other.exitcode != 0:
            refused += 1
            assert re.search(r"another folder|another output|--fresh true", log.read_text()), log.read_text()
        if other.exitcode != 0 or stage == "train-head":  # a head takes minutes: what was begun is replaced
            rerun = start(server, work, stage, run)
            rerun.join()
            assert rerun.exitcode == 0, log.read_text()
            assert_same(run, whole[stage][0])
        shutil.rmtree(run)
    # Stages of a second or two may be over, or have kept nothing yet, wherever the signal comes.
    assert interrupted or stage not in ("collect", "iterate")
    assert refused or stage not in ("collect", "iterate")


def assert_same(run, other):
    """What a stage and those before it left in two folders."""
    stores = sorted(path.parent.relative_to(other) for path in other.rglob("metadata.json"))
    assert stores == sorted(path.parent.relative_to(run) for path in run.rglob("metadata.json"))
    for store in stores:
        assert_alike(run / store, other / store)
        ours, theirs = TreeStore.open(run / store), TreeStore.open(other / store)
        prompts = [tree.prompt_id for tree in ours]
        assert len(prompts) == len(set(prompts)) == 16
        assert ours.objectives() == theirs.objectives()
        for objective in ours.objectives():
            rewards, its = ([r.tolist() for r in s.rewards(objective)] for s in (ours, theirs))
            assert rewards == its
    for name in ("metrics.json", "validation.json", "iterations.json"):
        paths = sorted(path.relative_to(other) for path in other.rglob(name))
        assert paths == sorted(path.relative_to(run) for path in run.rglob(name))
        for path in paths:
            found, expected = (numbers(json.loads((folder / path).read_text())) for folder in (run, other))
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-3), path
    left = {path.relative_to(run) for path in run.rglob("*.safetensors")}
    assert left == {path.relative_to(other) for path in other.rglob("*.safetensors")}


def numbers(content, place=""):
    """Every number in a JSON value by its place, but how long things took."""
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        inner = [numbers(value, f"{place}/{key}") for key, value in items if "seconds" not in str(key)]
        return {key: value for part in inner for key, value in part.items()}
    return {place: content} if isinstance(content, int | float) and not isinstance(content, bool) else {}
