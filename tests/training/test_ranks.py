from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import collecting
from chat_model import chat_model
from mavis_training.base.ranks import Ranks, join
from mavis_training.collect import collect
from mavis_training.label import LabelConfig, label
from mavis_training.trees.tree_store import TreeStore


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_are_all_of_the_work_and_even(work, count):
    shares = [Ranks(rank, count, torch.device("cpu")).share(work) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == sorted(work)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_started_by_itself_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join("cpu")
    assert (alone.rank, alone.count, alone.device) == (0, 1, torch.device("cpu"))
    assert alone.is_main
    assert alone.agree(lambda: [1]) == [1]
    alone.wait()
    assert not torch.distributed.is_initialized()


def launch(count, command, **settings):
    """`mavis COMMAND` with these settings, in `count` processes on the CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
    launcher += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    flags = [f"--{name}={value}" for name, value in settings.items()]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, "-m", "mavis_logits.cli", command, *flags],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    """What a process printed, which must have succeeded."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def process_of(rank, launcher):
    """The process that `launcher` started as `rank`."""
    return next(
        child
        for child in psutil.Process(launcher.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    collecting.write_inputs(folder, prompts=30)
    collect(collecting.config(folder, "one", **SETTINGS), *chat_model())
    return folder


SETTINGS = {"max_new_tokens": 24, "layers": 4, "prompts_per_shard": 1}


def flags(folder, store):
    return (
        collecting.SHAPE
        | SETTINGS
        | {
            "prompts": folder / "prompts.jsonl",
            "store": folder / store,
            "model": folder / "model",
            "device": "cpu",
        }
    )


@pytest.mark.slow
def test_two_ranks_write_the_shards_and_rewards_that_one_writes(folder):
    output = finish(launch(2, "collect", **flags(folder, "two")))
    assert "1 of 2 processes" in output
    collecting.assert_alike(folder / "two", folder / "one")
    finish(launch(2, "label", store=folder / "two", rewards='{"low": "text_rewards:low"}', tokenizer=folder / "model"))
    label(LabelConfig(str(folder / "one"), {"low": "text_rewards:low"}, str(folder / "model")))
    of_two, of_one = (TreeStore.open(folder / name).rewards("low") for name in ("two", "one"))
    assert [rewards.tolist() for rewards in of_two] == [rewards.tolist() for rewards in of_one]
    print(f"two ranks: {len(of_two)} trees and their rewards, equal to those of one")


@pytest.mark.slow
def test_a_rank_killed_half_way_costs_nothing_but_a_rerun_with_any_number_of_ranks(folder):
    job = launch(2, "collect", **flags(folder, "killed"))
    store = folder / "killed"
    while len(list(store.glob("trees-*.h5"))) < 5:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    process_of(1, job).kill()
    output, _ = job.communicate(timeout=240)
    assert job.returncode != 0, output
    begun = collecting.content(store)
    assert 5 <= len(begun) < 30
    finish(launch(3, "collect", **flags(folder, "killed")))
    collecting.assert_alike(store, folder / "one")
    assert not list(store.glob("*.tmp"))
    print(f"one of two ranks killed after {len(begun)} trees, rerun with three: the store that one rank writes")
