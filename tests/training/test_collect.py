from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import collecting
from chat_model import chat_model
from collecting import config, content
from mavis_training import collect as collect_module
from mavis_training.base.ranks import Ranks
from mavis_training.collect import CollectConfig, collect, plan_shards
from mavis_training.trees.tree_store import TreeStore


@dataclass(frozen=True)
class InTurn(Ranks):
    """Ranks that run one after another in this process: the first plan holds for all."""

    plans: list[Any] = field(default_factory=list)

    def agree(self, make: Callable[[], Any]) -> Any:
        if self.is_main:
            self.plans.append(make())
        return self.plans[-1]

    def wait(self) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collect")
    collecting.write_inputs(folder)
    collect(config(folder, "whole"), *chat_model())
    return folder


def run(monkeypatch, folder, store, ranks, **changes):
    """Collect as each of the `ranks`, in turn."""
    for rank in ranks:
        monkeypatch.setattr(collect_module, "join", lambda device, rank=rank: rank)
        collect(config(folder, store, **changes), *chat_model())


def ranks_of(count):
    plans: list[Any] = []
    return [InTurn(rank, count, torch.device("cpu"), plans) for rank in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_ranks_writes_what_one_writes(folder, monkeypatch, count):
    run(monkeypatch, folder, f"by-{count}", ranks_of(count))
    assert content(folder / f"by-{count}") == content(folder / "whole")
    assert len(content(folder / "whole")) == 5


def test_what_a_lost_rank_left_undone_is_divided_anew(folder, monkeypatch):
    main, _, third = ranks_of(3)
    run(monkeypatch, folder, "lost", [main, third])
    missing = {"trees-00001.h5", "trees-00004.h5"}
    assert content(folder / "whole").keys() - content(folder / "lost").keys() == missing
    run(monkeypatch, folder, "lost", ranks_of(2))
    assert content(folder / "lost") == content(folder / "whole")


def test_a_plan_takes_the_free_numbers_in_order(folder):
    store = TreeStore.open(folder / "whole")
    prompts = [f"p{i}" for i in range(13)]
    assert plan_shards(store, prompts, 3) == [(5, ["p9", "p10", "p11"]), (6, ["p12"])]
    assert plan_shards(store, prompts[:9], 3) == []


def test_more_prompts_are_added_to_a_store(folder):
    collect(config(folder, "more", limit=4), *chat_model())
    collect(config(folder, "more"), *chat_model())
    assert content(folder / "more") == content(folder / "whole")


def test_ids_that_are_numbers_are_sampled_once(folder, tmp_path):
    (tmp_path / "numbers.jsonl").write_text('{"id": 1, "prompt": "w1"}\n{"id": 2, "prompt": "w2"}')
    settings = replace(config(folder, "numbers"), prompts=str(tmp_path / "numbers.jsonl"))
    for _ in range(2):
        assert [tree.prompt_id for tree in collect(settings, *chat_model())] == ["1", "2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "sglang"}, "transformers, vllm"),
        ({"vllm": {"seed": 1}}, "no effect under backend 'transformers'"),
        ({"backend": "vllm", "temperature": 0.7}, "temperature 1 from all tokens only, got temperature 0.7"),
        ({"backend": "vllm", "top_p": 0.9}, "got temperature 1.0, top_p 0.9"),
        (
            {"backend": "vllm", "policy": collect_module.PolicyConfig("head"), "top_p": 0.9},
            "got temperature 1.0, top_p 0.9",
        ),
        ({"layers": 0}, "layers must be at least 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"dtype": "real"}, "torch dtype"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CollectConfig("prompts", "store", **changes)


def test_a_store_records_how_it_was_sampled_only_where_it_is_not_as_always():
    assert not {"backend", "top_p"} & set(CollectConfig("prompts", "store").sampling())
    assert CollectConfig("prompts", "store", top_p=0.9).sampling()["top_p"] == 0.9
    assert CollectConfig("prompts", "store", backend="vllm").sampling()["backend"] == "vllm"
