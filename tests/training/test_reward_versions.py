"""Kept rewards say which version of their reward gave them; an error says where in the user's code, at which prompt."""

from __future__ import annotations

import functools

import pytest

from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_training.label import LabelConfig, label
from mavis_training.rewards.identity import object_digest
from mavis_training.rewards.load import load_reward, reward_digest
from mavis_training.trees.tree_store import StoreMetadata, TreeStore
from random_trees import random_tree
from tiny_models import tiny_tokenizer

CODE = """
from {helper} import VALUE


def score(prompts, completions, **columns):
    return [{expression} + len(c) for c in completions]
"""


@pytest.fixture
def store(tmp_path):
    metadata = StoreMetadata("tiny", tokenizer_fingerprint(tiny_tokenizer()), {"max_new_tokens": 12})
    store = TreeStore.create(tmp_path / "store", metadata)
    store.write([random_tree(0), random_tree(1)])
    store.write([random_tree(2)])
    return store


@pytest.fixture
def reward(tmp_path, request):
    """Writes a reward and its helper beside it; returns the spec of its file."""
    name = "helper_" + "".join(filter(str.isalnum, request.node.name))

    def write(value=1, expression="VALUE"):
        (tmp_path / f"{name}.py").write_text(f"VALUE = {value}\n")
        (tmp_path / "mine.py").write_text(CODE.format(helper=name, expression=expression))
        return f"{tmp_path / 'mine.py'}:score"

    return write


def run(store, spec, **settings):
    return label(LabelConfig(str(store.folder), {"mine": spec}, **settings), tokenizer=tiny_tokenizer())


def first(store):
    return store.rewards("mine")[0][0]


@pytest.mark.parametrize("edit", [{"value": 20}, {"expression": "7"}])
def test_an_edited_reward_is_refused_and_both_ways_out_work(store, reward, edit):
    run(store, reward())
    before = first(store)
    run(store, reward())  # the same: nothing to do
    spec = reward(**edit)
    with pytest.raises(ValueError, match=r"text or weights have changed since .*--fresh true.*--keep true"):
        run(store, spec)
    run(store, spec, keep=True)
    assert first(store) == before
    run(store, spec, fresh=True)
    assert first(store) != before
    run(store, spec)


def test_comments_and_layout_are_no_edit(tmp_path, reward):
    spec = reward()
    before = reward_digest(spec)
    path = tmp_path / "mine.py"
    path.write_text(path.read_text().replace("    return [", "    # why\n\n    return  ["))
    assert reward_digest(spec) == before
    path.write_text(path.read_text().replace("len(c)", "2 * len(c)"))
    assert reward_digest(spec) != before


def test_rewards_of_functions_given_in_python_are_told_apart(store):
    def weighted(weight):
        return lambda prompts, completions: [weight * len(c) for c in completions]

    label(LabelConfig(str(store.folder), {"mine": "test"}), {"mine": weighted(1.0)}, tiny_tokenizer())
    label(LabelConfig(str(store.folder), {"mine": "test"}), {"mine": weighted(1.0)}, tiny_tokenizer())
    with pytest.raises(ValueError, match="have changed since"):
        label(LabelConfig(str(store.folder), {"mine": "test"}), {"mine": weighted(2.0)}, tiny_tokenizer())
    one, same, two = (functools.partial(weighted(1), prompts=n) for n in (1, 1, 2))
    assert object_digest(one) == object_digest(same) != object_digest(two)


def test_a_mended_reward_goes_on_as_the_message_says(store, reward, tmp_path):
    spec = reward(expression="(0 if columns['rank'][0] < 2 else 1 / 0)")
    with pytest.raises(ValueError, match=r"raised ZeroDivisionError in .*mine.py, line 6, .*of prompt 'p2'") as told:
        run(store, spec)
    assert "--keep true" in str(told.value)
    assert run(store, reward(), keep=True).objectives() == ["mine"]


def test_the_completion_that_raises_is_named_by_its_prompt(store):
    def fragile(prompts, completions):
        scores = []
        for prompt, completion in zip(prompts, completions, strict=True):
            if prompt.startswith("prompt number 1"):
                raise KeyError("score")
            scores.append(float(len(completion)))
        return scores

    with pytest.raises(ValueError, match=r"KeyError in fragile, .*line \d+, .*prompt 'p1'"):
        label(LabelConfig(str(store.folder), {"mine": "test"}), {"mine": fragile}, tiny_tokenizer())


def test_a_module_in_the_current_folder_and_what_is_wrong_with_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here_only.py").write_text("def score(prompts, completions):\n    return [1.0] * len(completions)\n")
    assert load_reward("here_only:score")(["w"], ["w"]) == [1.0]
    (tmp_path / "broken_one.py").write_text("def score(:\n")
    for spec, message in (
        ("here_only:scor", r"here_only.py: did you mean 'score'\?"),
        ("not_there:score", f"no module 'not_there' is installed, in {tmp_path} or beside a recipe"),
        ("broken_one:score", r"broken_one.py, line 1"),
        ("nowhere.py:score", "there is no file nowhere.py"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(spec)


def test_an_edited_file_is_read_again_in_a_process_that_lives_on(tmp_path):
    path = tmp_path / "lives.py"
    for value in (1.0, 20.0):
        path.write_text(f"def score(prompts, completions):\n    return [{value}] * len(completions)\n")
        assert load_reward(f"{path}:score")(["w"], ["w"]) == [value]


@pytest.mark.parametrize(
    ("values", "message"),
    [(lambda p: 0.5, "'mine' is constant: 0.5 for all 28"), (len, "depends on the prompt alone")],
)
def test_a_reward_without_anything_to_learn_is_told(store, values, message):
    def same(prompts, completions, rank):
        return [values("w" * n) for n in rank]

    with pytest.warns(UserWarning, match=message):
        label(LabelConfig(str(store.folder), {"mine": "test"}), {"mine": same}, tiny_tokenizer())
