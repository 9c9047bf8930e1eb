"""Hidden states of a frozen base model over whole trees, computed once and kept on disk in bfloat16."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mavis_logits.backbone import Backbone
from mavis_logits.backbone.fingerprint import Identity
from mavis_logits.values.value_policy import ValuePolicy

from ..base.files import open_safetensors, replace_when_whole
from ..base.ranks import join
from ..trees.packing import Layout, pack, packed_inputs
from ..trees.targets import stable_hash
from ..trees.tree import Tree
from ..trees.tree_store import Shard, TreeStore
from .efficiency import sample_actions
from .policies import said_by_policies


def compute_states(store: TreeStore, model: PreTrainedModel, folder: str | Path, layer: int | None = None) -> None:
    """One tree-packed prefill pass over a store: the states at every token of every tree.

    One file per shard, written when done, so that a killed pass goes on where it stood. Several processes
    (`mavis_training.base.ranks`) share the shards.

    Args:
        store: the trees; they need no rewards yet.
        model: the frozen base model, on this process's device.
        folder: for the files.
        layer: of the model whose states they are; None for what enters the output embedding.

    Raises:
        ValueError: the model is not the one they were sampled from, or the folder holds states of another model, of
            another layer or of other trees.
    """
    _write_missing(
        store, model, folder, _Kept("states", layer), lambda tree: {"": tree_states(model, pack(tree), layer)}
    )


def compute_actions(store: TreeStore, model: PreTrainedModel, folder: str | Path, count: int, seed: int) -> None:
    """Tokens that the reference would choose at every token of every tree, for the rules of `fitting.paths`.

    A whole forward pass over all trees, written and shared as `compute_states` does.

    Args:
        store: the trees, of the reference at the temperature and nucleus of its metadata.
        model: the base model, on this process's device.
        folder: for the files.
        count: of tokens at each place.
        seed: of the draws.

    Raises:
        ValueError: the model is not the one they were sampled from, or the folder holds actions of another model, of
            other trees or another number.
    """
    embedding = Backbone.of(model).output_embedding
    how = {name: float(store.metadata.sampling.get(name, 1.0)) for name in ("temperature", "top_p")}

    def draw(tree: Tree) -> dict[str, Tensor]:
        generator = torch.Generator(embedding.device).manual_seed(stable_hash(f"{seed}/{tree.prompt_id}"))
        return {"": sample_actions(embedding, tree_states(model, pack(tree)), count, generator, **how)}

    _write_missing(store, model, folder, _Kept("actions", None, {"actions": str(count)}), draw)


def compute_taught(
    store: TreeStore, model: PreTrainedModel, policies: Mapping[str, ValuePolicy], folder: str | Path, count: int
) -> None:
    """What tuned policies make likelier at every state of every tree, for a head to learn (`fitting.policies`).

    A forward pass of each policy over all trees, written and shared as `compute_states` does.

    Args:
        store: the trees; they need no rewards.
        model: the base model, on this process's device.
        policies: by objective, on `model`.
        folder: for the files.
        count: of tokens at each state.

    Raises:
        ValueError: the model is not the one they were sampled from, or the folder holds what other policies say, or
            what is said of other trees or another number of tokens.
    """
    names = {name: policy.fingerprint for name, policy in policies.items()}
    kept = _Kept("policies", None, {"policies": json.dumps(names), "tokens": str(count)})
    _write_missing(store, model, folder, kept, lambda tree: said_by_policies(tree, model, policies, count))


@dataclass(frozen=True)
class _Kept:
    """What is kept of every tree: its kind, after which layer, and what a file records besides."""

    kind: str
    layer: int | None
    details: Mapping[str, str] = field(default_factory=dict)

    def path(self, folder: Path, shard: Shard) -> Path:
        """Where a shard's lie."""
        return folder / f"{shard.path.stem}.{self.kind}.safetensors"

    def origin(self, fingerprint: str, trees: list[Tree]) -> dict[str, str]:
        """What a file records: the weights, the layer and the trees that it is of, and the details."""
        return {"base_fingerprint": fingerprint, "layer": str(self.layer), "trees": _digest(trees), **self.details}


def _write_missing(
    store: TreeStore,
    model: PreTrainedModel,
    folder: str | Path,
    kept: _Kept,
    make: Callable[[Tree], Mapping[str, Tensor]],
) -> None:
    """Write the shards that are not there, `make` giving the tensors of each tree; those that are there are checked."""
    store.require_base(model)
    identity, folder = Identity(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def missing() -> list[Shard]:
        there = [shard for shard in store.shards() if kept.path(folder, shard).exists()]
        for shard in there:
            _require_same_origin(kept.path(folder, shard), identity, kept.origin(identity.fingerprint, shard.trees()))
        return [shard for shard in store.shards() if shard not in there]

    ranks = join(str(model.device))
    todo = ranks.share(ranks.agree(missing))
    started, tokens = time.monotonic(), 0
    title = {"states": "hidden states", "actions": "actions of the reference", "policies": "what policies say"}
    with tqdm(todo, desc=title[kept.kind], unit="shard", disable=not ranks.is_main) as progress:
        for shard in progress:
            trees = shard.trees()
            tensors = {
                f"{i}.{name}".rstrip("."): tensor for i, tree in enumerate(trees) for name, tensor in make(tree).items()
            }
            with replace_when_whole(kept.path(folder, shard)) as temporary:
                save_file(tensors, temporary, metadata=kept.origin(identity.fingerprint, trees))
            tokens += sum(len(tree.prompt_tokens) + len(tree.tokens) for tree in trees)
            progress.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s")
    ranks.wait()


def read_actions(store: TreeStore, folder: str | Path) -> list[Tensor]:
    """The actions that `compute_actions` kept for a store: int32 `[P + N, J]` per tree, in packed order.

    Raises:
        OSError: they are missing, truncated or corrupt.
    """
    return _read(_Kept("actions", None).path(Path(folder), shard) for shard in store.shards())


def read_taught(store: TreeStore, folder: str | Path) -> list[dict[str, Tensor]]:
    """What `compute_taught` kept for a store: per tree, as `said_by_policies`.

    Raises:
        OSError: they are missing, truncated or corrupt.
    """
    trees = []
    for shard in store.shards():
        with open_safetensors(_Kept("policies", None).path(Path(folder), shard), "pt") as file:
            keys = list(file.keys())
            names = sorted({key.partition(".")[2] for key in keys})
            count = len(keys) // max(1, len(names))
            trees += [{name: file.get_tensor(f"{i}.{name}") for name in names} for i in range(count)]
    return trees


def read_states(store: TreeStore, folder: str | Path) -> list[Tensor]:
    """The states that `compute_states` kept for a store: bfloat16 `[P + N, d]` per tree, in packed order.

    Raises:
        OSError: they are missing, truncated or corrupt.
    """
    return _read(states_path(Path(folder), shard) for shard in store.shards())


def _read(paths: Iterable[Path]) -> list[Tensor]:
    """One tensor per tree, file by file."""
    tensors = []
    for path in paths:
        with open_safetensors(path, "pt") as file:
            tensors += [file.get_tensor(str(i)) for i in range(len(file.keys()))]
    return tensors


def states_path(folder: Path, shard: Shard) -> Path:
    """Where a shard's states lie."""
    return _Kept("states", None).path(folder, shard)


class _Caught(Exception):
    """Leaves a forward pass once the layer that is wanted has been computed."""


@torch.inference_mode()
def tree_states(model: PreTrainedModel, layout: Layout, layer: int | None = None) -> Tensor:
    """States of one packed tree after `layer`, bfloat16 `[P + N, d]`; None for what enters the output embedding.

    A model that cannot read a packed tree reads it path by path.
    """
    backbone = Backbone.of(model)
    packed = backbone.trees.kind == "packed"
    if packed and layer is None:  # then the whole model reads, not its decoder alone
        packed = backbone.why_not_handed_on(model.device) is None
    if packed:
        inputs = packed_inputs([layout], backbone.windows, backbone.decoder.dtype)
        return _states(backbone, send_to_device(inputs, model.device), layer)
    ids = torch.from_numpy(layout.input_ids)
    return layout.by_path(lambda where: _states(backbone, {"input_ids": ids[where][None].to(model.device)}, layer))


def _states(backbone: Backbone, inputs: dict[str, Any], layer: int | None) -> Tensor:
    """States `[T, d]` of the one sequence in `inputs`, in bfloat16 on the CPU."""
    if layer is None:
        with output_embedding_input(backbone) as caught:
            backbone.logits(**inputs, use_cache=False, every=True)
    else:
        caught = []

        def catch(states: Tensor) -> None:
            caught.append(states)
            raise _Caught

        hook = backbone.catch(layer, catch)
        try:
            with suppress(_Caught):
                backbone.states(**inputs, use_cache=False)
        finally:
            hook.remove()
    return caught[0][0].to(torch.bfloat16).cpu().contiguous()


@contextmanager
def output_embedding_input(backbone: Backbone) -> Iterator[list[Tensor]]:
    """Catch what enters the output embedding, `[B, T, d]` per forward; logits are computed for one position only."""
    caught: list[Tensor] = []

    def catch(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0])
        return (args[0][:, -1:], *args[1:])  # nobody reads the logits: spare the product over the vocabulary

    hook = backbone.output_layer.register_forward_pre_hook(catch)
    try:
        yield caught
    finally:
        hook.remove()


def _require_same_origin(path: Path, identity: Identity, origin: dict[str, str]) -> None:
    with open_safetensors(path, "pt") as file:
        found = file.metadata() or {}
    found = {"layer": str(None)} | found  # the first files named neither their layer nor their trees
    base = found.get("base_fingerprint")
    if identity.difference(base) is None:
        origin["base_fingerprint"] = base or origin["base_fingerprint"]  # perhaps of an older version
    for name, what in (("base_fingerprint", "a model with weights"), ("layer", "layer"), ("trees", "trees")):
        if found.get(name, origin[name]) != origin[name]:
            raise ValueError(f"{path} holds states of {what} {found[name]}, not {origin[name]}: use another folder.")
    for name, what in (
        ("actions", "actions at each place"),
        ("tokens", "tokens at each state"),
        ("policies", "policies"),
    ):
        if found.get(name) != origin.get(name):
            raise ValueError(f"{path} holds {found.get(name)} {what}, not {origin.get(name)}: use another folder.")


def _digest(trees: Sequence[Tree]) -> str:
    """16 hex digits of the trees' tokens and shapes: stores share prompts and the names of their shards."""
    digest = hashlib.sha256()
    for tree in trees:
        for array in (tree.prompt_tokens, tree.tokens, tree.parent, tree.start, tree.length):
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]
