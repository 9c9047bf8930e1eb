"""A newcomer's path as typed: a reward of one's own in a file, a folder model, prompts in a .txt; every last word."""

from __future__ import annotations

import json
import re
import sys

import pytest

from chat_model import chat_model
from mavis_logits.cli import main
from mavis_logits.commands.generate import main as generate
from mavis_training import closing

REWARD = '''
def low(prompts, completions, **columns):
    """Share of small numbers."""
    words = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(number < 23 for number in row) / max(1, len(row)) for row in words]
'''
NOISE = """
import random


def noise(prompts, completions, **columns):
    return [random.random() for _ in prompts]
"""
TREES = ["--max_new_tokens", "10", "--layers", "2", "--root_children", "3", "--device", "cpu"]
HEAD = ["--width", "32", "--dropout", "0", "--epochs", "4", "--batch_size", "64", "--learning_rate", "0.01"]
MODEL = ["--num_layers", "1", "--lora.rank", "0", "--targets", "tokens", "--epochs", "2", "--learning_rate", "0.01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a model, two files of prompts and a file with a reward."""
    folder = tmp_path_factory.mktemp("newcomer")
    model, tokenizer = chat_model()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [f"w{i} w{i * 7 % 40}" for i in range(40)]
    (folder / "prompts.txt").write_text("\n".join(lines[:32]) + "\n\n")
    (folder / "held-out.txt").write_text("\n".join(lines[32:]))
    (folder / "my_reward.py").write_text(REWARD)
    return folder


def said(capsys, *words):
    """What `mavis` prints, given these words."""
    assert main(list(map(str, words))) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_every_step_says_what_it_made_how_good_it_is_and_what_comes_next(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    shown = said(capsys, "prompts", "--source", "prompts.txt", "--output", "prompts.jsonl")
    assert re.search(r"32  written\n(.*\n)*Next: mavis collect --prompts prompts.jsonl", shown)

    shown = said(capsys, "collect", "--prompts", "prompts.jsonl", "--store", "trees", "--model", "model", *TREES)
    assert re.search(r"trees: 32 trees with \d+ completions of \d+ tokens on average; \d+% were cut off", shown)
    assert "Next: mavis label --store trees" in shown

    shown = said(capsys, "label", "--store", "trees", "--rewards.low", "my_reward:low")
    assert re.search(
        r"low: \d+ rewards, mean 0\.\d+, standard deviation 0\.\d+ \(among completions of one prompt", shown
    )
    assert len(re.findall(r"^ +[\d.]+  w\d+ w\d+ -> ", shown, re.MULTILINE)) == 2  # the lowest and the highest
    assert "Next: mavis train-head --store trees --objectives low --output runs/head --model model" in shown

    shown = said(capsys, "train-head", "--store", "trees", "--objectives", "low", "--output", "head",
                 "--model", "model", "--validation_share", "0.3", "--device", "cpu", *HEAD)  # fmt: skip
    assert re.search(r"head: on \d+ held-out trees,\n  low: R2 0\.\d+; of two next tokens", shown)
    assert re.search(r"Next: mavis evaluate .* --rewards.low file.py:function$", shown, re.MULTILINE)

    shown = said(capsys, "train-model", "--store", "trees", "--objectives=low", "--output", "value", "--backbone",
                 "model", "--validation_share", "0.3", "--device", "cpu", *MODEL)  # fmt: skip
    assert "value: on" in shown

    shown = said(capsys, "evaluate", "--prompts", "held-out.txt", "--value_functions", "head", "--rewards.low",
                 "my_reward:low", "--model", "model", "--output", "results.json", "--completions", "completions",
                 "--max_new_tokens", "10", "--device", "cpu")  # fmt: skip
    assert "| unsteered |" in shown
    assert "| low |" in shown
    assert re.search(r"low: (raises low \+\d|no change that is more than chance)", shown)
    assert "Written: results.json and results.md" in shown

    shown = said(capsys, "bundle", "bundle", "--values", "head")
    assert "mavis generate --values bundle" in shown
    assert generate(["--model", "model", "--values", "bundle", "--prompt", "w3", "--max-new-tokens", "5"]) == 0


def test_a_head_that_foresees_nothing_is_said_to_and_neither_bundled_nor_pushed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "noise.py").write_text(NOISE)
    said(capsys, "collect", "--prompts", "prompts.txt", "--store", "few", "--model", "model", *TREES)
    said(capsys, "label", "--store", "few", "--rewards.noise", "noise:noise")
    shown = said(capsys, "train-head", "--store", "few", "--objectives", "noise", "--output", "weak",
                 "--model", "model", "--validation_share", "0.3", "--device", "cpu",
                 "--weight_decay", "0", "--bootstrap", "0",
                 "--patience", "50", "--epochs", "50", *HEAD[:4], *HEAD[6:])  # fmt: skip
    assert "noise: worse than always saying the mean" in shown
    assert "Not worth using: mavis bundle and mavis push refuse it" in shown
    for command in (["bundle", "no-bundle", "--values", "weak"], ["push", "weak", "org/weak"]):
        assert main(command) == 2
        assert "worse than their mean on held-out trees" in capsys.readouterr().err
    assert not (folder / "no-bundle").exists()
    assert main(["bundle", "weak-bundle", "--values", "weak", "--allow-weak"]) == 0


def test_rewards_that_do_not_vary_have_no_gain(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "same.py").write_text("def same(prompts, completions, **columns):\n    return [1.0 for _ in prompts]\n")
    (folder / "settings.yaml").write_text("settings: {unsteered: {}}\ncontrasts: [[unsteered, unsteered]]\nlimit: 1\n")
    shown = said(capsys, "evaluate", "--config", "settings.yaml", "--prompts", "held-out.txt", "--value_functions", "-",
                 "--rewards.same", "same:same", "--model", "model", "--output", "one.json", "--completions", "one",
                 "--max_new_tokens", "4", "--device", "cpu")  # fmt: skip
    assert "| unsteered | 1.00 (constant) | 0.0 |" in shown
    assert "| unsteered | unsteered | n/a |" in shown
    assert "nan" not in shown.lower()
    json.loads((folder / "one.json").read_text(), parse_constant=lambda word: pytest.fail(word))  # NaN is no JSON


def test_a_reward_lies_beside_the_recipe_that_names_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "beside.py").write_text(REWARD)
    places = f"prompts: {folder / 'prompts.txt'}\nmodel: {folder / 'model'}\n"
    (tmp_path / "recipes" / "collect.yaml").write_text(f"{places}store: trees\nlimit: 4\ndevice: cpu\n")
    (tmp_path / "recipes" / "label.yaml").write_text("store: trees\nrewards: {low: 'beside:low'}\n")
    said(capsys, "collect", "--config", "recipes/collect.yaml", "--max_new_tokens", 6, "--layers", 2)
    assert "low: " in said(capsys, "label", "--config", "recipes/label.yaml")


def test_the_next_command_can_be_pasted():
    told = closing.next_step("label", store="a b", objectives=["x", "y"])
    assert told == "Next: mavis label --store 'a b' --objectives x,y"
