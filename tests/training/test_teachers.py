from __future__ import annotations

import numpy as np
import pytest
import torch

from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_model import ValueModel
from mavis_training.fitting.teachers import VALUES_FOLDER, Teacher, check_tokenizer, load_teachers, teacher_values
from random_trees import add_shard, make_store, random_tree
from tiny_models import TOKENIZER, tiny_llama, tiny_mamba


def value_model(*objectives, base=None, seed=0, **config):
    model = ValueModel.from_backbone(base or tiny_llama(seed=seed), objectives, **config)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def value_head(base, *objectives):
    torch.manual_seed(5)
    return ValueHead.for_model(base, objectives, width=8, tokenizer_fingerprint=TOKENIZER).eval()


@pytest.fixture
def store(tmp_path):
    store = make_store(tmp_path / "trees", [random_tree(i) for i in range(3)])
    add_shard(store, [random_tree(3), random_tree(4)])
    return store


def read_path_by_path(tree, read):
    """What `read(tokens) -> [T, M]` says of every new token, each completion read by itself."""
    starts = np.cumsum(tree.length) - tree.length
    expected = np.full((tree.length.sum(), 2), np.nan)
    for leaf in tree.leaves():
        tokens = torch.from_numpy(np.concatenate([tree.prompt_tokens, tree.completion(leaf)]).astype(np.int64))[None]
        where = np.concatenate([np.arange(starts[i], starts[i] + tree.length[i]) for i in tree.path(leaf)])
        with torch.inference_mode():
            expected[where] = read(tokens)[len(tree.prompt_tokens) :]
    assert np.isfinite(expected).all()
    return expected


@pytest.mark.parametrize("backbone", ["llama", "mamba"])
def test_a_value_models_values_are_those_of_reading_each_completion(backbone):
    base = tiny_mamba() if backbone == "mamba" else None
    model = value_model("a", "b", base=base, reward_mean=[1, 2], reward_scale=[3, 4])
    tree = random_tree(1)
    values = Teacher("t", model, {"a": 0, "b": 1}).values(tree)
    np.testing.assert_allclose(values, read_path_by_path(tree, lambda t: model(t).values[0]), atol=2e-4)


def test_a_value_heads_values_come_from_the_state_before_each_token():
    base = tiny_llama()
    head = value_head(base, "a", "b")

    def read(tokens):
        hidden = base.model(tokens).last_hidden_state[0].to(torch.bfloat16).float()  # as states are kept
        before = torch.cat([hidden[:1], hidden[:-1]])
        return head(before, tokens[0][:, None])[:, 0]

    tree = random_tree(2)
    values = Teacher("t", head, {"a": 0, "b": 1}, base).values(tree)
    np.testing.assert_allclose(values, read_path_by_path(tree, read), atol=0.02)


def test_a_teacher_of_several_objectives_is_loaded_once(tmp_path):
    base = tiny_llama()
    value_model("a", "b").save_pretrained(tmp_path / "two")
    value_head(base, "c").save_pretrained(tmp_path / "head")
    given = {"b": str(tmp_path / "two"), "mine": str(tmp_path / "head"), "a": str(tmp_path / "two")}
    two, head = load_teachers(given, base, torch.float32, "cpu")
    assert (two.outputs, head.outputs) == ({"b": 1, "a": 0}, {"mine": 0})
    assert two.base is None
    assert head.base is base
    assert two.units("b") == (0.0, 1.0)
    assert not two.function.training


def test_values_are_kept_and_a_killed_pass_goes_on(store, monkeypatch):
    teacher = Teacher("t", value_model("a", "b"), {"a": 0})
    on_the_fly = teacher_values(store, teacher, keep=False)
    assert not (store.folder / VALUES_FOLDER).exists()
    asked = []
    ask = Teacher.values

    def die_at_the_fifth(self, tree):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(tree.prompt_id)
        return ask(self, tree)

    monkeypatch.setattr(Teacher, "values", die_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        teacher_values(store, teacher)
    monkeypatch.setattr(Teacher, "values", lambda self, tree: asked.append(tree.prompt_id) or ask(self, tree))
    kept = teacher_values(store, teacher)
    assert asked == ["p0", "p1", "p2", "p3", "p3", "p4"]  # the first shard was whole
    again = teacher_values(store, teacher)
    assert len(asked) == 6
    for one, two, three in zip(on_the_fly, kept, again, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
        np.testing.assert_array_equal(two, three)
    with torch.no_grad():
        teacher.function.head.weight.mul_(2)
    other = teacher_values(store, teacher)  # another teacher: files of its own
    assert len(asked) == 11
    assert np.abs(other[0] - kept[0]).max() > 0.1


def test_files_of_other_trees_and_damaged_ones_are_refused(store):
    teacher = Teacher("t", value_model("a"), {"a": 0})
    teacher_values(store, teacher)
    one, two = sorted((store.folder / VALUES_FOLDER).rglob("*.safetensors"))
    one.write_bytes(two.read_bytes())
    with pytest.raises(ValueError, match=r"trees-00000\.safetensors holds values for trees .* delete this one file"):
        teacher_values(store, teacher)
    one.write_bytes(two.read_bytes()[:50])
    with pytest.raises(OSError, match="truncated or corrupt"):
        teacher_values(store, teacher)


def test_fingerprints_tell_teachers_apart():
    base = tiny_llama()
    model, head = value_model("a"), value_head(base, "a")
    scaled = value_model("a", reward_scale=[2.0])
    fingerprints = [
        Teacher("t", model, {"a": 0}).fingerprint,
        Teacher("t", scaled, {"a": 0}).fingerprint,
        Teacher("t", head, {"a": 0}, base).fingerprint,
        Teacher("t", head, {"a": 0}, tiny_llama(seed=1)).fingerprint,
    ]
    assert len(set(fingerprints)) == 4
    assert Teacher("elsewhere", model, {"a": 0}).fingerprint == fingerprints[0]


def test_bad_teachers(store, tmp_path):
    folder = str(tmp_path / "two")
    value_model("a", "b").save_pretrained(folder)
    with pytest.raises(ValueError, match=r"two has no output for 'funny', only for \['a', 'b'\]"):
        load_teachers({"funny": folder}, None, torch.float32, "cpu")
    value_head(tiny_llama(), "a").save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="is a value head, which needs its base model"):
        load_teachers({"a": str(tmp_path / "head")}, None, torch.float32, "cpu")
    with pytest.raises(ValueError, match="was trained on the hidden states"):
        load_teachers({"a": str(tmp_path / "head")}, tiny_llama(seed=1), torch.float32, "cpu")
    with pytest.raises(OSError, match="nowhere"):
        load_teachers({"a": str(tmp_path / "nowhere")}, None, torch.float32, "cpu")
    stranger = Teacher("stranger", value_model("a", tokenizer_fingerprint="0" * 16), {"a": 0})
    with pytest.raises(ValueError, match=r"the teacher stranger reads tokens of another tokenizer .* must share one"):
        check_tokenizer(stranger, store)
    broken = value_model("a")
    with torch.no_grad():
        broken.head.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the teacher broken has .* NaN or infinite on the tree of prompt 'p0'"):
        teacher_values(store, Teacher("broken", broken, {"a": 0}))
    assert not list(store.folder.rglob("*.safetensors"))
