"""`benchmarks/tuning.py` on a tiny model: both methods run, and what it says is the ratio of their times."""

from __future__ import annotations

import json
import statistics

from chat_model import chat_model
from tuning import main


def test_both_methods_are_timed_on_the_same_answers(tmp_path, capsys) -> None:
    model, tokenizer = chat_model()
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [{"id": f"p{i}", "prompt": f"w{i} w{i + 1}"} for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text("def longer(prompts, completions):\n    return [len(c) for c in completions]\n")
    given = {
        "--rounds": 2, "--steps": 1, "--batch-size": 8, "--model": tmp_path / "chat", "--dtype": "float32",
        "--prompts": tmp_path / "prompts.jsonl", "--reward": f"{tmp_path / 'reward.py'}:longer",
        "--out": tmp_path / "out",
    }  # fmt: skip
    assert main([str(part) for pair in given.items() for part in pair]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    seconds = found["seconds_a_step"]
    assert {method: len(own) for method, own in seconds.items()} == {"on_policy": 2, "rloo": 2}
    ratios = [a / b for a, b in zip(seconds["on_policy"], seconds["rloo"], strict=True)]
    assert found["ratio"] == statistics.median(ratios)
    assert f"on_policy takes {found['ratio']:.2f} of the time of rloo" in capsys.readouterr().out
