from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
from collections import deque
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mavis_training.base.files import read_json, read_json_lines, replace_when_whole, write_bytes, write_json
from mavis_training.trees.tree_store import StoreMetadata, TreeStore
from random_trees import random_tree


@contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to let a file of this process grow beyond `size` bytes (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": "ä"})
    assert read_json(path) == {"a": "ä"}

    def fail_half_way(temporary):
        temporary.write_text("{")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"), replace_when_whole(path) as temporary:
        fail_half_way(temporary)
    assert read_json(path) == {"a": "ä"}
    write_json(path, [1])
    assert read_json(path) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_that_is_none_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(path)
    path.write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(ValueError, match="line 3: expected a JSON object, got list"):
        read_json_lines(path)
    path.write_text('{"a": 1}\n\n{"b"\n')
    with pytest.raises(ValueError, match="line 3: not valid JSON"):
        read_json_lines(path)


def test_a_file_for_which_there_is_no_room(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with files_of_at_most(10_000), pytest.raises(OSError, match="File too large") as raised:
        write_bytes(path, bytes(3_000_000))
    assert raised.value.errno == errno.EFBIG
    told = str(raised.value)
    assert str(path) in told
    assert re.search(r"it needs 3\.0 MB and [\d,]+\.\d MB are free", told)
    assert "run the same command again" in told
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_safetensors_for_which_there_is_no_room(tmp_path):
    path = tmp_path / "a.safetensors"
    with (
        files_of_at_most(10_000),
        pytest.raises(OSError, match=r"a\.safetensors could not be written") as raised,
        replace_when_whole(path) as temporary,
    ):
        save_file({"states": torch.zeros(100_000)}, temporary)
    assert raised.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_found_full_at_the_last_moment(tmp_path, monkeypatch, code):
    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_json(tmp_path / "a.json", {})
    assert not list(tmp_path.iterdir())


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "nothing" / "a", b"")


def test_a_full_disk_keeps_what_was_written_and_a_rerun_goes_on(small_disk):
    metadata = StoreMetadata("tiny", "abc", {"max_new_tokens": 12})
    store = TreeStore.create(small_disk / "store", metadata)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(100_000))
    trees = (random_tree(i, layers=5) for i in range(1000))
    with pytest.raises(OSError, match=r"trees-\d+\.h5 could not be written.*No space left") as raised:
        deque(map(store.write, ([tree] for tree in trees)), maxlen=0)
    assert raised.value.errno == errno.ENOSPC
    done = len(store)
    assert done > 0
    assert list(store) == [random_tree(i, layers=5) for i in range(done)]
    assert not list(store.folder.glob("*.tmp"))

    shard = store.shards()[0]
    rewards = [np.zeros(len(tree.leaves())) for tree in shard.trees()]
    (small_disk / "rest").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(OSError, match=r"reward-helpful\.h5 could not be written.*No space left"):
        shard.write_rewards("helpful", rewards, source="test")
    with pytest.raises(OSError, match="No space left"):
        write_json(small_disk / "state.json", {"a": "b" * 5000})
    assert not shard.has_rewards("helpful")
    assert not list(small_disk.rglob("*.tmp"))

    filler.unlink()
    again = TreeStore.create(store.folder, metadata)
    again.write([random_tree(done, layers=5)])
    again.shards()[0].write_rewards("helpful", rewards, source="test")
    assert len(again) == done + 1
