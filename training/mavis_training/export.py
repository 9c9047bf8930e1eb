"""`mavis export`: the trees of a store as a `datasets` data set in parquet files, with its card."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from datasets import Dataset, Features, List, Value
from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData, HfApi
from huggingface_hub.utils import validate_repo_id
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.hub.publish import push_errors
from mavis_logits.models import load_tokenizer

from .base.files import replace_when_whole
from .trees.targets import node_targets
from .trees.tree import Tree
from .trees.tree_store import TreeStore

_TEMPLATE = Path(__file__).parent / "dataset_card_template.md"
_IDS = List(Value("int32"))
_SHARED: dict[str, tuple[Any, str]] = {
    "prompt_id": (Value("string"), "id of the prompt"),
    "prompt": (Value("string"), "the prompt, before the chat template"),
    "prompt_tokens": (_IDS, "what the model read: token ids"),
    "columns": (Value("string"), "the prompt's other columns, as JSON"),
    "node": (Value("int32"), "index of the node in its tree"),
}
_NODE: dict[str, tuple[Any, str]] = {
    "parent": (Value("int32"), "index of the parent; -1: the prompt"),
    "depth": (Value("int32"), "1 for a node that goes on from the prompt"),
    "end": (Value("int32"), "tokens from the prompt to the end of the node"),
    "text": (Value("string"), "what the node adds to its parent's text, special tokens left out"),
    "tokens": (_IDS, "the same, as token ids"),
    "logp_gen": (Value("float64"), "log probability of these tokens under the policy that sampled them (nats)"),
    "logp_ref": (Value("float64"), "the same under the unsteered model"),
    "terminal": (Value("bool"), "the completion is finished here, by its end or by its greatest length"),
}
_LEAF: dict[str, tuple[Any, str]] = {
    "completion": (Value("string"), "the completion, special tokens left out"),
    "tokens": (_IDS, "the same, as token ids"),
    "logp_gen": (Value("float64"), "its log probability under the policy that sampled it (nats)"),
    "logp_ref": (Value("float64"), "the same under the unsteered model"),
    "ended": (Value("bool"), "it ended before its greatest length"),
}


@dataclass(frozen=True)
class ExportConfig:
    """Which trees to export, and what their card says.

    Attributes:
        store: folder of the tree store; its rewards go along where all trees have them.
        output: folder for the data set; what an earlier export wrote there is replaced.
        rows: "nodes": a row for every node, which trees can be made of again; "leaves": one for every finished
            completion.
        zeta: KL penalty multiplier of the value targets (equation 6).
        tokenizer: turns tokens into text; None for that of the model which the store names.
        name: title of the card; None for the id it is pushed to, or the folder's name.
        prompts: what the prompts are and where they come from, in a sentence.
        datasets: Hub ids of the data sets that the prompts come from.
        license: of the data, by its Hub identifier, such as `mit`: the prompts' licence must allow it.
        language: of the texts, such as `en`.
        push_to: id of the Hub data set to push to; None to push nothing.
        private: whether a new Hub data set is private.
    """

    store: str
    output: str
    rows: Literal["nodes", "leaves"] = "nodes"
    zeta: float = 0.0
    tokenizer: str | None = None
    name: str | None = None
    prompts: str | None = None
    datasets: list[str] = field(default_factory=list)
    license: str | None = None
    language: str | None = None
    push_to: str | None = None
    private: bool | None = None

    def __post_init__(self) -> None:
        if self.rows not in ("nodes", "leaves"):
            raise ValueError(f"rows must be 'nodes' or 'leaves', got {self.rows!r}")
        if self.push_to is not None:
            validate_repo_id(self.push_to)  # a ValueError that says what an id looks like


def export(config: ExportConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write the data set, a parquet file for each shard, and its card; push both if asked to. Returns the folder.

    Args:
        config: what to export.
        tokenizer: in place of the one that `config.tokenizer` names.

    Raises:
        ValueError: a store without trees, another tokenizer than the trees were sampled with, or an output folder that
            holds something else.
        OSError: no store there, a corrupt shard, or a push that did not get through.
    """
    store = TreeStore.open(config.store)
    tokenizer = tokenizer or load_tokenizer(config.tokenizer or store.metadata.model)
    store.require_origin(tokenizer_fingerprint(tokenizer))
    shards, objectives = store.shards(), store.objectives()
    if not shards:
        raise ValueError(f"{config.store} has no trees yet: run `mavis collect` first")
    output = Path(config.output)
    others = {path.name for path in output.iterdir()} - {"data", "README.md"} if output.is_dir() else set()
    if others:
        raise ValueError(f"{output} holds {sorted(others)[0]}, which no export wrote: give another folder")
    (output / "data").mkdir(parents=True, exist_ok=True)
    schema = Features({name: feature for name, (feature, _) in columns(config.rows, objectives, config.zeta).items()})
    written = []
    for i, shard in enumerate(shards):
        rows = [row for tree, rewards in shard.labelled(objectives) for row in
                tree_rows(tree, objectives, rewards, config.rows, config.zeta, tokenizer)]  # fmt: skip
        written.append(output / "data" / f"train-{i:05d}-of-{len(shards):05d}.parquet")
        with replace_when_whole(written[-1]) as temporary:
            Dataset.from_list(rows, features=schema).to_parquet(temporary)
    for stale in set((output / "data").glob("train-*.parquet")) - set(written):
        stale.unlink()
    with replace_when_whole(output / "README.md") as temporary:
        temporary.write_text(card(config, store), encoding="utf-8")
    if config.push_to is not None:
        push(output, config.push_to, config.private)
    return output


def push(folder: Path, repo_id: str, private: bool | None = None) -> CommitInfo:
    """Publish an exported folder as a Hub data set, in one commit; files of an earlier export are deleted in it.

    Raises:
        ValueError: `repo_id` is none.
        OSError: no permission, or no connection; the message says which.
    """
    api = HfApi(library_name="mavis-logits")
    with push_errors(repo_id):
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=["README.md", "data/*.parquet"],
            delete_patterns=["data/*.parquet"],
            commit_message="Upload trees of completions",
        )


def columns(rows: str, objectives: Iterable[str], zeta: float) -> dict[str, tuple[Any, str]]:
    """The columns of the data set: their feature and what they hold, by name."""
    result = _SHARED | (_NODE if rows == "nodes" else _LEAF)
    penalty = f" - {zeta:g} log(pi_gen/pi_ref)" if zeta else ""
    means = ", averaged over the finished completions below by levels" if rows == "nodes" else ""
    empty = "; empty where nothing is finished" if rows == "nodes" else ""
    for objective in objectives:
        result[f"reward_{objective}"] = (Value("float64"), f"reward{empty}")
        result[f"value_{objective}"] = (Value("float64"), f"value target: reward{penalty}{means}")
    return result


def tree_rows(
    tree: Tree,
    objectives: Sequence[str],
    rewards: NDArray[np.float64],
    rows: str,
    zeta: float,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[dict[str, Any]]:
    """Rows of one tree.

    Args:
        tree: n nodes.
        objectives: names of the M rewards.
        rewards: `[leaves, M]`, in the order of `tree.leaves()`.
        rows: "nodes" or "leaves".
        zeta: of the value targets.
        tokenizer: turns tokens into text.
    """
    leaves = tree.leaves().tolist()
    targets, place, ends = node_targets(tree, rewards, zeta), {leaf: i for i, leaf in enumerate(leaves)}, tree.end()
    shared = {
        "prompt_id": tree.prompt_id,
        "prompt": tree.prompt,
        "prompt_tokens": tree.prompt_tokens.tolist(),
        "columns": json.dumps(tree.columns, ensure_ascii=False),
    }
    for node in range(len(tree)) if rows == "nodes" else leaves:
        row = shared | {"node": node}
        if rows == "nodes":
            tokens = tree.own_tokens(node).tolist()
            row |= {"parent": int(tree.parent[node]), "depth": len(tree.path(node)), "end": int(ends[node])}
            row |= {"text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens}
            row |= {name: getattr(tree, name)[node].item() for name in ("logp_gen", "logp_ref", "terminal")}
        else:
            tokens = tree.completion(node).tolist()
            path = tree.path(node)
            row |= {"completion": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens}
            row |= {name: float(getattr(tree, name)[path].sum()) for name in ("logp_gen", "logp_ref")}
            row["ended"] = tokens[-1] in tokenizer.all_special_ids
        for m, objective in enumerate(objectives):
            row[f"reward_{objective}"] = float(rewards[place[node], m]) if node in place else None
            row[f"value_{objective}"] = float(targets[node, m])
        yield row


def trees_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[Tree]:
    """The trees that rows of nodes were exported from: the inverse of `tree_rows`, rewards aside.

    Args:
        rows: of an exported data set, in its order.

    Raises:
        ValueError: rows of leaves, or nodes out of order or missing.
    """
    for prompt_id, group in itertools.groupby(rows, key=lambda row: row["prompt_id"]):
        nodes = list(group)
        if "parent" not in nodes[0]:
            raise ValueError("these rows are finished completions; trees are made of an export with rows 'nodes'")
        if [row["node"] for row in nodes] != list(range(len(nodes))):
            raise ValueError(f"nodes of {prompt_id!r} are missing or out of order: give the rows as they were exported")
        lengths = [len(row["tokens"]) for row in nodes]
        yield Tree(
            prompt_id,
            nodes[0]["prompt"],
            np.array(nodes[0]["prompt_tokens"]),
            np.array([token for row in nodes for token in row["tokens"]]),
            start=np.cumsum([0, *lengths[:-1]]),
            length=np.array(lengths),
            columns=json.loads(nodes[0]["columns"]),
            **{name: np.array([row[name] for row in nodes]) for name in ("parent", "logp_gen", "logp_ref", "terminal")},
        )


def card(config: ExportConfig, store: TreeStore) -> str:
    """The text of the data set's card."""
    objectives, shards = store.objectives(), store.shards()
    sizes = np.array([[1, len(tree), len(tree.leaves()), len(tree.tokens)] for tree in store]).sum(axis=0)
    rewards = {objective: np.concatenate(store.rewards(objective)) for objective in objectives}
    name = config.name or config.push_to or Path(config.output).resolve().name
    metadata = asdict(store.metadata)
    data = DatasetCardData(
        pretty_name=name,
        license=config.license,
        language=config.language,
        source_datasets=config.datasets or None,
        task_categories=["text-generation"],
        tags=["mavis", "rollouts", "reward-modeling", "not-for-all-audiences", *objectives],
        configs=[{"config_name": config.rows, "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    text = DatasetCard.from_template(
        data,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        id=config.push_to or "path/to/this/folder",
        metadata=metadata,
        prompts=config.prompts,
        license=config.license,
        rows=config.rows,
        columns={name: meaning for name, (_, meaning) in columns(config.rows, objectives, config.zeta).items()},
        rewards=[
            {"objective": o, "mean": r.mean(), "deviation": r.std(), "source": shards[0].reward_source(o)}
            for o, r in rewards.items()
        ],
        provenance=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        **dict(zip(("trees", "nodes", "leaves", "tokens"), sizes.tolist(), strict=True)),
    )
    return str(text).rstrip() + "\n"
