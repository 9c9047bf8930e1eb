from __future__ import annotations

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from mavis_training.base.prompts import encode_prompts, read_prompts
from mavis_training.make_prompts import PromptsConfig, load_rows, make_prompts
from tiny_models import tiny_tokenizer


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talk(question, answer="w3 w4"):
    return {
        "chosen": f"\n\nHuman: {question}\n\nAssistant: {answer}",
        "rejected": f"\n\nHuman: {question}\n\nAssistant: w0",
    }


@pytest.fixture
def hh(tmp_path):
    """HH-RLHF's schema: a duplicate, one without an answer, one of 203 tokens, one of just 200."""
    questions = ["w1 w2", "w3", "w1 w2", " ".join(["w1"] * 198), " ".join(["w1"] * 197)]
    rows = [talk(question) for question in questions] + [{"chosen": "\n\nHuman: w5", "rejected": ""}]
    return lines(tmp_path / "hh.jsonl", rows)


def config(source, tmp_path, **settings):
    return PromptsConfig(source, str(tmp_path / "out" / "prompts.jsonl"), **settings)


def make(source, tmp_path, **settings):
    made = config(source, tmp_path, **settings)
    counts = make_prompts(made, tiny_tokenizer())
    return counts, read_prompts(made.output)


def test_prompts_of_hh_and_what_was_dropped(hh, tmp_path):
    # "Human", ":", "Assistant", ":" are four tokens of this tokenizer
    counts, rows = make(hh, tmp_path, format="hh", tokenizer="any", max_tokens=201)
    assert [row["prompt"] for row in rows[:2]] == [f"\n\nHuman: {text}\n\nAssistant: " for text in ("w1 w2", "w3")]
    assert counts.dropped == {"duplicate": 1, "more than 201 tokens": 1, "no assistant turn": 1}
    assert (counts.rows, counts.written) == (6, 3)
    assert "dropped: more than 201 tokens" in str(counts)
    written = json.loads((tmp_path / "out" / "prompts.counts.json").read_text())
    assert written["dropped"] == counts.dropped
    assert written["config"]["format"] == "hh"
    assert len({row["id"] for row in rows}) == 3


def test_the_papers_bounds_hold_where_none_are_given(hh, tmp_path):
    counts, _ = make(hh, tmp_path, format="hh", tokenizer="any")
    assert counts.dropped["more than 200 tokens"] == 2
    counts, _ = make(hh, tmp_path, format="hh", max_tokens=0)
    assert "more than 200 tokens" not in counts.dropped
    assert config(hh, tmp_path, format="hh", completions=True).limits().max_tokens is None


def test_pairs_of_hh(hh, tmp_path):
    counts, rows = make(hh, tmp_path, format="hh", completions=True, style="turn", limit=2)
    assert [(row["prompt"], row["completion"]) for row in rows] == [("w1 w2", "w3 w4"), ("w3", "w3 w4")]
    assert counts.dropped["before skip or beyond limit"] == 2


def test_order_skip_and_limit(tmp_path):
    source = lines(tmp_path / "p.jsonl", [{"prompt": f"w{i}", "id": i, "kind": "k"} for i in range(20)])
    _, first = make(source, tmp_path, shuffle=3, limit=12)
    _, rest = make(source, tmp_path, shuffle=3, skip=12, keep=["kind"])
    assert {row["prompt"] for row in first + rest} == {f"w{i}" for i in range(20)}
    assert [row["prompt"] for row in first] != [f"w{i}" for i in range(12)]
    assert rest[0]["kind"] == "k"
    assert all(row["id"] == row["prompt"][1:] for row in first)
    counts, others = make(source, tmp_path, exclude=[lines(tmp_path / "first.jsonl", first)])
    assert {row["id"] for row in others} == {row["id"] for row in rest}
    assert counts.dropped == {"in exclude": 12}


def test_ids_are_unique_and_do_not_depend_on_what_else_is_there(tmp_path):
    source = lines(tmp_path / "p.jsonl", [{"prompt": "w1", "id": "a"}, {"prompt": "w2", "id": "a"}, {"prompt": "w3"}])
    _, rows = make(source, tmp_path)
    assert rows[0]["id"] == "a"
    _, alone = make(lines(tmp_path / "q.jsonl", [{"prompt": "w3"}]), tmp_path)
    assert alone[0] == rows[2]


@pytest.mark.parametrize("kind", ["csv", "parquet", "json.gz", "saved", "folder"])
def test_any_data_set(tmp_path, kind):
    rows = [{"question": f"w{i}", "answer": "w9"} for i in range(5)]
    data = Dataset.from_list(rows)
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        data.to_csv(path)
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "json.gz":
        path = tmp_path / "data.jsonl.gz"  # as in HH-RLHF's repository
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "saved":
        data.save_to_disk(path)
    else:
        path.mkdir()
        data.to_parquet(path / "train.parquet")
    settings = {"prompt_column": "question", "completion_column": "answer", "completions": True}
    _, made = make(str(path), tmp_path, **settings)
    assert [(row["prompt"], row["completion"]) for row in made] == [(row["question"], "w9") for row in rows]


def test_a_conversation_is_read_through_the_chat_template(tmp_path):
    turns = [{"role": role, "content": f"w{i}"} for i, role in enumerate(["user", "assistant", "user"])]
    _, rows = make(lines(tmp_path / "c.jsonl", [{"prompt": turns}]), tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    )
    assert rows[0]["prompt"] == "w2"
    assert encode_prompts(rows, tokenizer, 4) == [tokenizer("w0 w1 w2 w9")["input_ids"]]
    with pytest.raises(ValueError, match=r"more than 3 tokens: .* \(4\)"):
        encode_prompts(rows, tokenizer, 3)


def test_bad_settings(tmp_path):
    for settings, message in (
        ({"format": "hhh"}, "format must be one of column, hh, summarize"),
        ({"style": "chat"}, "style must be 'raw' or 'turn'"),
        ({"template": "no place"}, r"\{text\}"),
        ({"limit": 0}, "limit at least 1"),
        ({"completions": True}, "completion_column"),
        ({"format": "hh"}, "give the base model's tokenizer"),
        ({"format": "summarize"}, "8 to 512 tokens"),
        ({"min_tokens": 2}, "2 to any number of tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            config("x", tmp_path, **settings)


def test_bad_data(tmp_path):
    source = lines(tmp_path / "p.jsonl", [{"prompt": "w1"}, {"text": "w2"}])
    with pytest.raises(ValueError, match=r"p\.jsonl, row 2 read as format 'column': a row has no 'prompt', only text"):
        make(source, tmp_path)
    with pytest.raises(ValueError, match="no column 'kind' to keep, only prompt"):
        make(source, tmp_path, keep=["kind"])
    with pytest.raises(ValueError, match=r"passes:(.|\n)*dropped: empty"):
        make(lines(tmp_path / "e.jsonl", [{"prompt": ""}]), tmp_path)
    for name in ("missing.jsonl", "missing.csv"):
        with pytest.raises(OSError, match=name):
            load_rows(str(tmp_path / name))
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read"):
        load_rows(str(tmp_path / "bad.parquet"))
    Dataset.from_list([{"prompt": "x"}]).to_csv(tmp_path / "good.csv")
    with pytest.raises(ValueError, match=r"good\.csv cannot be read as a data set: .*nowhere"):
        load_rows(str(tmp_path / "good.csv"), split="nowhere")
    assert not (tmp_path / "out").exists()


def test_columns_that_are_left_out_are_told_with_the_way_to_keep_them(tmp_path):
    source = lines(tmp_path / "p.jsonl", [{"prompt": "w1", "id": 1, "solution": "4", "kind": "k"}])
    counts, rows = make(source, tmp_path)
    assert counts.left_out == ["kind", "solution"]
    assert """--keep '["kind", "solution"]'""" in str(counts)
    counts, rows = make(source, tmp_path, keep=["kind", "solution"])
    assert rows[0]["solution"] == "4"
    assert not counts.left_out
    assert "left out" not in str(counts)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "saved", "saved splits"])
def test_a_part_of_a_split_is_taken_and_one_that_is_not_there_refused(tmp_path, kind):
    texts = [f"w{i}" for i in range(8)]
    path, data = tmp_path / f"p.{kind}", Dataset.from_list([{"prompt": text} for text in texts])
    if kind == "jsonl":
        lines(path, [{"prompt": text} for text in texts])
    elif kind == "txt":
        path.write_text("\n".join(texts))
    else:
        (data if kind == "saved" else DatasetDict({"train": data})).save_to_disk(path)
    assert [row["prompt"] for row in load_rows(str(path), "train[:1]+train[-1:]")] == ["w0", "w7"]
    assert len(list(load_rows(str(path), "train[:50%]"))) == 4
    with pytest.raises(ValueError, match="has no split 'test', only train"):
        load_rows(str(path), "test")
