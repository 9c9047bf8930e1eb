from __future__ import annotations

import json

import pytest

from mavis_training.prompts import read_prompts


def test_rows_keep_their_columns_and_the_limit_holds(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "w1", "kind": "x"}\n{"id": "b", "prompt": "w2"}\nnot read\n')
    assert read_prompts(str(path), limit=2) == [
        {"id": "a", "prompt": "w1", "kind": "x"}, {"id": "b", "prompt": "w2"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 2: expected an object with 'prompt', it has nothing: rename the field"),
        ('{"id": "b", "question": "w"}', "line 2: expected .* it has id, question: .*--prompt_column NAME"),
        ("[]", "line 2: expected a JSON object, got list"),
        ("{", "line 2: not valid JSON"),
        ('{"id": "b", "prompt": " "}', "line 2: the prompt of 'b' is empty; remove the line"),
        ('{"id": "b", "prompt": ["w"]}', "line 2: column 'prompt' holds list, expected text or messages"),
        ('{"id": "b", "prompt": 5}', "line 2: the prompt of 'b' is of type int, not text"),
        ('{"id": [1], "prompt": "w"}', r"line 2: the id \[1\] is list, expected a text or a whole number"),
        ('{"id": "a", "prompt": "w"}', "line 2: the id 'a' occurs twice"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "w1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_prompts(str(path))


def test_any_character_may_stand_in_a_prompt(tmp_path):
    prompt = "a\u2028b\x85c\x0cd\u00e9"
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", "prompt": prompt}, ensure_ascii=False) + "\n", "utf-8")
    assert read_prompts(str(tmp_path / "p.jsonl"))[0]["prompt"] == prompt


def test_no_prompts(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(str(tmp_path / "empty.jsonl"))
    with pytest.raises(OSError, match=r"missing\.jsonl"):
        read_prompts(str(tmp_path / "missing.jsonl"))
