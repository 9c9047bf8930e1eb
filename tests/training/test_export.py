from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.errors import HFValidationError

from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_training.export import ExportConfig, export, trees_of
from mavis_training.trees.targets import log_ratios
from mavis_training.trees.tree_store import StoreMetadata, TreeStore
from random_trees import random_tree
from tiny_models import tiny_tokenizer


@pytest.fixture
def store(tmp_path):
    """Six trees in two shards, labelled for one objective everywhere and for another in one shard only."""
    metadata = StoreMetadata(
        "org/model", tokenizer_fingerprint(tiny_tokenizer()), {"max_new_tokens": 12, "seed": 0},
        policy={"beta": 5.0}, created="2030-01-02T03:04:05+00:00",
    )  # fmt: skip
    store = TreeStore.create(tmp_path / "store", metadata)
    rng = np.random.default_rng(0)
    for start, count in ((0, 4), (4, 2)):
        shard = store.write([random_tree(start + i) for i in range(count)])
        rewards = [rng.normal(size=len(tree.leaves())) for tree in shard.trees()]
        shard.write_rewards("helpful", rewards, "org/reward")
        if start:
            shard.write_rewards("humour", rewards, "org/other")
    return store


def exported(store, tmp_path, **settings):
    config = ExportConfig(str(store.folder), str(tmp_path / "export"), **settings)
    return export(config, tiny_tokenizer())


def load(folder, tmp_path):
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))


def test_an_export_equals_the_store(store, tmp_path):
    data = load(exported(store, tmp_path, zeta=0.5), tmp_path)
    assert list(trees_of(data)) == list(store)
    for tree, rewards in store.labelled(["helpful"]):
        rows = [row for row in data if row["prompt_id"] == tree.prompt_id]
        leaves = [row for row in rows if row["reward_helpful"] is not None]
        assert [row["node"] for row in leaves] == tree.leaves().tolist()
        assert [row["reward_helpful"] for row in leaves] == rewards[:, 0].tolist()
        penalised = rewards[:, 0] - 0.5 * log_ratios(tree)[tree.leaves()]
        np.testing.assert_allclose([row["value_helpful"] for row in leaves], penalised)
        for row in rows:
            below = [child["value_helpful"] for child in rows if child["parent"] == row["node"]]
            assert not below or row["value_helpful"] == pytest.approx(np.mean(below))
            assert row["end"] == len(tree.completion(row["node"]))
            assert row["depth"] == len(tree.path(row["node"]))
            assert row["text"] == tiny_tokenizer().decode(row["tokens"], skip_special_tokens=True)
    assert not {"reward_humour", "value_humour"} & set(data.column_names)


def test_rows_of_finished_completions(store, tmp_path):
    data = load(exported(store, tmp_path, rows="leaves"), tmp_path)
    rows = iter(data)
    for tree, rewards in store.labelled(["helpful"]):
        for leaf, reward in zip(tree.leaves(), rewards[:, 0], strict=True):
            row = next(rows)
            assert row["prompt_id"] == tree.prompt_id
            assert row["tokens"] == tree.completion(leaf).tolist()
            assert row["logp_gen"] - row["logp_ref"] == pytest.approx(log_ratios(tree)[leaf])
            assert row["reward_helpful"] == row["value_helpful"] == reward
            assert json.loads(row["columns"]) == tree.columns
    assert next(rows, None) is None
    with pytest.raises(ValueError, match="finished completions; trees are made of"):
        list(trees_of(data))


def test_the_card(store, tmp_path):
    folder = exported(
        store, tmp_path, license="mit", language="en", datasets=["org/prompts"], prompts="Questions about bread.",
        name="Trees",
    )  # fmt: skip
    card = DatasetCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "mit"
    assert data["language"] == "en"
    assert data["source_datasets"] == ["org/prompts"]
    assert data["task_categories"] == ["text-generation"]
    assert data["configs"][0]["config_name"] == "nodes"
    leaves = sum(len(tree.leaves()) for tree in store)
    mean = np.concatenate(store.rewards("helpful")).mean()
    for text in (
        "# Trees", "Questions about bread.", f"| finished completions (leaves) | {leaves} |", f"`helpful` | {mean:.3f}",
        "`org/reward`", "`org/model`, steered,", "beta: 5.0", "max_new_tokens: 12", "unsafe", "| `logp_ref` |",
        "2030-01-02", "trees_of(data)",
    ):  # fmt: skip
        assert text in card.text
    assert "No licence" not in card.text
    plain = DatasetCard.load(exported(store, tmp_path, rows="leaves") / "README.md")
    assert "license" not in plain.data.to_dict()
    assert "No licence was given" in plain.text
    assert "trees_of" not in plain.text
    assert "\n\n\n" not in plain.text + card.text


def test_trees_without_rewards(tmp_path):
    store = TreeStore.create(tmp_path / "plain", StoreMetadata("m", tokenizer_fingerprint(tiny_tokenizer()), {}))
    with pytest.raises(ValueError, match="no trees yet"):
        exported(store, tmp_path)
    store.write([random_tree(0)])
    folder = exported(store, tmp_path)
    assert list(trees_of(load(folder, tmp_path))) == list(store)
    assert "Rewards" not in (folder / "README.md").read_text()


def test_an_earlier_export_is_replaced_and_nothing_else(store, tmp_path):
    folder = exported(store, tmp_path)
    (folder / "data" / "train-00000-of-00009.parquet").write_text("old")
    exported(store, tmp_path)
    assert len(list((folder / "data").iterdir())) == 2
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which no export wrote"):
        exported(store, tmp_path)


def test_pushing(store, tmp_path, monkeypatch):
    calls = {}

    class Made:
        repo_id = "me/trees"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: calls.update(create=options) or Made)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.update(upload=options))
    folder = exported(store, tmp_path, push_to="me/trees", private=True)
    assert calls["create"] == {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert calls["upload"]["folder_path"] == folder
    assert calls["upload"]["repo_type"] == "dataset"
    assert 'load_dataset("me/trees"' in (folder / "README.md").read_text()

    def refused(self, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "upload_folder", refused)
    with pytest.raises(OSError, match="me/trees was left as it was"):
        exported(store, tmp_path, push_to="me/trees")


def test_bad_input(store, tmp_path):
    with pytest.raises(ValueError, match="rows must be 'nodes' or 'leaves', got 'trees'"):
        ExportConfig("s", "o", rows="trees")
    with pytest.raises(HFValidationError):
        ExportConfig("s", "o", push_to="not an id")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    with pytest.raises(ValueError, match="tokenizer"):
        export(ExportConfig(str(store.folder), str(tmp_path / "out")), tokenizer)
    with pytest.raises(OSError, match="not a tree store"):
        export(ExportConfig(str(tmp_path / "nothing"), str(tmp_path / "out")), tokenizer)
    data = load(exported(store, tmp_path), tmp_path)
    with pytest.raises(ValueError, match="nodes of 'p0' are missing or out of order"):
        list(trees_of(data.select(range(1, len(data)))))
