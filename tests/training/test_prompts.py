from __future__ import annotations

import json

import pytest

from mavis_training.base.prompts import read_prompts


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"id": "a", "prompt": "w"}\n{"id": "b", "prompt": "caf\u00e9"}'.encode("latin-1"),
            "line 2: not UTF-8 .*iconv",
        ),
        (b"PAR1" + bytes(9), "a Parquet file: name it .parquet"),
        ('{"id": "a", "prompt": "w"}'.encode("utf-16"), "UTF-16"),
        (b"\x1f\x8b\x08", "compressed by gzip"),
    ],
)
def test_what_is_no_utf8_text_is_named(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"p\.jsonl.*{message}"):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_a_mark_windows_lines_and_blank_ones_are_read_past(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(
        b'\xef\xbb\xbf{"id": "a", "prompt": "w"}\r\n\r\n{"id": "b", "prompt": "v"}\r\n \n'
    )
    assert [row["prompt"] for row in read_prompts(str(tmp_path / "p.jsonl"))] == ["w", "v"]


def test_a_text_file_has_a_prompt_a_line_and_repeats_are_told(tmp_path):
    (tmp_path / "p.txt").write_text("one two\nthree\none two\n\n")
    with pytest.warns(UserWarning, match="1 lines repeat a prompt"):
        rows = read_prompts(str(tmp_path / "p.txt"))
    assert [row["prompt"] for row in rows] == ["one two", "three"]
    assert len({row["id"] for row in rows}) == 2


def test_ids_are_texts_and_messages_are_conversations(tmp_path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"id": 1, "prompt": parts}, {"prompt": turns})))
    first, second = read_prompts(str(path))
    assert (first["id"], first["prompt"]) == ("1", "w1 w2")
    assert (second["prompt"], second["conversation"]) == ("c", turns)
    path.write_text('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}\n')
    with pytest.raises(ValueError, match="line 2: the id '1' occurs twice"):
        read_prompts(str(path))
