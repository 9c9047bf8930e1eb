"""Values from pairs of answers: how they are read, and that a head trained on them steers."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from chat_model import chat_model
from mavis_training.fit.config import FitConfig
from mavis_training.fit.run import fit
from mavis_training.pairs import Pair, pairs_store, read_pairs
from mavis_training.trees.data import load_trees

LOW = """
def low(prompts, completions, **columns):
    return [sum(int(w[1:]) < 20 for w in t.split() if w[0] == "w") / max(1, len(t.split())) for t in completions]
"""


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turn(role, text):
    return {"role": role, "content": text}


def test_texts_and_messages_are_read(tmp_path):
    rows = [
        {"prompt": "w1", "chosen": " w2 ", "rejected": "w3"},
        {"prompt": [turn("user", "w1")], "chosen": [turn("assistant", "w2")], "rejected": [turn("assistant", "w3")]},
        {"chosen": [turn("user", "w1"), turn("assistant", "w2")], "rejected": [turn("assistant", "w3")]},
        {"prompt": [turn("system", "w9"), turn("user", "w1")], "chosen": "w2", "rejected": "w3"},
    ]  # fmt: skip
    pairs, dropped = read_pairs(written(tmp_path / "pairs.jsonl", *rows))
    assert pairs[:3] == [Pair("w1", None, "w2", "w3")] * 3
    assert pairs[3].conversation == rows[3]["prompt"]
    assert not dropped


def test_pairs_that_tell_nothing_are_left_out_and_counted(tmp_path):
    rows = [
        {"prompt": "w1", "chosen": "w2", "rejected": "w3"},
        {"prompt": "w1", "chosen": "w2", "rejected": " w2"},
        {"prompt": "w1", "chosen": " ", "rejected": "w3"},
    ]
    pairs, dropped = read_pairs(written(tmp_path / "pairs.jsonl", *rows))
    assert len(pairs) == 1
    assert dropped == {"both answers are the same": 1, "empty chosen": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "w1", "good": "w2", "rejected": "w3"}], "line 1: a row has no 'chosen', only good"),
        ([{"chosen": "w2", "rejected": "w3"}], "no 'prompt', and 'chosen' is no list of messages"),
        ([{"prompt": "w1", "chosen": 3, "rejected": "w3"}], "'chosen' holds int"),
        ([{"prompt": "w1", "chosen": "w2", "rejected": "w2"}], "has no pairs: 1 left out .both answers"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_told(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(written(tmp_path / "pairs.jsonl", *rows))


def test_a_pair_is_a_tree_of_two_answers(tmp_path):
    model, tokenizer = chat_model()
    pairs = [Pair("w1", None, "w2 w3", "w4"), Pair("w1", None, "w5", "w6 w7"), Pair("w8", None, "w2 w3 w4 w5 w6", "w9")]
    store = pairs_store(pairs, tmp_path / "trees", "liked", model, tokenizer, 4)
    assert len(set(store.prompt_ids())) == 3  # two of one prompt are told apart
    _, items = load_trees(str(tmp_path / "trees"), ["liked"], 0.0)
    end = tokenizer.eos_token_id
    texts = [[tokenizer.decode(i.tree.completion(leaf)) for leaf in i.tree.leaves()] for i in items]
    assert texts[0] == [f"w2 w3 {tokenizer.decode([end])}", f"w4 {tokenizer.decode([end])}"]
    assert texts[2][0] == "w2 w3 w4 w5"  # cut off
    assert all(np.array_equal(item.rewards, [[1.0], [0.0]]) for item in items)
    again = pairs_store(pairs, tmp_path / "trees", "liked", model, tokenizer, 4)
    assert len(again.shards()) == 1
    with pytest.raises(ValueError, match="use another folder"):
        pairs_store(pairs[:2], tmp_path / "trees", "liked", model, tokenizer, 4)


def test_a_head_from_pairs_raises_what_they_prefer(tmp_path):
    rng = random.Random(1)

    def words(first, last, count):
        return " ".join(f"w{rng.randrange(first, last)}" for _ in range(count))

    rows = [{"prompt": words(0, 40, 5), "chosen": words(0, 20, 8), "rejected": words(20, 40, 8)} for _ in range(150)]
    (tmp_path / "rewards.py").write_text(LOW)
    model, tokenizer = chat_model()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "chat")
    config = FitConfig(
        pairs=written(tmp_path / "pairs.jsonl", *rows), rewards={"low": f"{tmp_path / 'rewards.py'}:low"},
        objective="liked", output=str(tmp_path / "out"), model=str(tmp_path / "chat"), budget="5m", max_new_tokens=10,
        train={"learning_rate": 3e-3},
    )  # fmt: skip
    said = []
    state = fit(config, say=said.append)
    row = state["results"]["settings"]["liked"]["low"]
    assert row["gain_sd"] > 2 * row["gain_sd_error"]
    assert any("liked: of" in line and "held-out pairs it puts the chosen answer first in" in line for line in said)
    assert "pairs of answers" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "either prompts, with a reward, or pairs"),
        ({"pairs": "p", "prompts": "q"}, "either prompts"),
        ({"pairs": "p", "kind": "model"}, "pairs train a value head"),
        ({"pairs": "p", "rewards": {"preferred": "r.py:r"}}, "for an objective of its own"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(output="out", **changes)
