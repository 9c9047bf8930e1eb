"""What value functions say of every token of stored trees: computed once and kept beside the trees, for a student."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mavis_logits.backbone import Backbone
from mavis_logits.backbone.fingerprint import parameters_fingerprint
from mavis_logits.values.loading import load_value_functions
from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_model import ValueModel

from ..base.files import open_safetensors, replace_when_whole
from ..trees.packing import Layout, pack, packed_inputs
from ..trees.tree import Tree
from ..trees.tree_store import Shard, TreeStore
from .states import tree_states

VALUES_FOLDER = "teachers"
Array = NDArray[np.float32]


@dataclass
class Teacher:
    """A value function and those of its outputs that a student is to learn.

    Attributes:
        name: where it was loaded from.
        function: a value model or a value head, of any size and iteration.
        outputs: by objective, which of its outputs.
        base: the base model whose hidden states a value head reads; None for a value model.
    """

    name: str
    function: ValueModel | ValueHead
    outputs: dict[str, int]
    base: PreTrainedModel | None = None

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all that its values depend on: its weights, its reward units and its base model's."""
        config = self.function.config
        parts = (
            parameters_fingerprint(self.function),
            config.reward_mean,
            config.reward_scale,
            parameters_fingerprint(self.base) if self.base is not None else None,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def units(self, objective: str) -> tuple[float, float]:
        """Mean and scale of one of its rewards."""
        config, output = self.function.config, self.outputs[objective]
        return config.reward_mean[output], config.reward_scale[output]

    @torch.inference_mode()
    def values(self, tree: Tree) -> Array:
        """Value after every new token of a tree, in packed order, `[N, outputs]` in reward units.

        Raises:
            ValueError: some of them are NaN or infinite.
        """
        layout = pack(tree)
        found = self._of_head(layout) if isinstance(self.function, ValueHead) else self._of_model(layout)
        if not np.isfinite(found).all():
            raise ValueError(
                f"the teacher {self.name} has {(~np.isfinite(found)).sum()} values that are NaN or infinite on the "
                f"tree of prompt {tree.prompt_id!r}: train it anew, or load it in float32 (dtype)."
            )
        return found

    def _of_head(self, layout: Layout) -> Array:
        assert isinstance(self.function, ValueHead)
        assert self.base is not None
        states = tree_states(self.base, layout, self.function.config.layer)
        hidden = states[layout.previous].to(self.function.device).float()
        tokens = torch.from_numpy(layout.input_ids[layout.new]).to(self.function.device)
        return self.function(hidden, tokens[:, None])[:, 0].float().cpu().numpy()

    def _of_model(self, layout: Layout) -> Array:
        model = self.function
        assert isinstance(model, ValueModel)
        backbone = Backbone.of(model.backbone)
        if backbone.trees.kind == "packed":
            inputs = packed_inputs([layout], backbone.windows, model.dtype)
            values = model(**send_to_device(inputs, model.device)).values[0]
            return values[layout.new].cpu().numpy()
        ids = torch.from_numpy(layout.input_ids)
        found = layout.by_path(lambda where: model(ids[where][None].to(model.device)).values[0].cpu())
        return found.numpy()[layout.new]


def load_teachers(
    teachers: Mapping[str, str], base: PreTrainedModel | None, dtype: torch.dtype, device: torch.device | str
) -> list[Teacher]:
    """Load every teacher once, whatever the number of objectives that it teaches.

    Args:
        teachers: by objective, the Hub id or folder of a value model or a value head.
        base: the base model that value heads were trained on, and whose layers adapters may sit on.
        dtype: of value models' weights.
        device: where to put them; `base` is there already.

    Raises:
        ValueError: a teacher that lacks its objective, or a value head without its base model or with another one.
        OSError: nothing there.
    """
    functions = load_value_functions(dict(teachers), base, device, {"dtype": dtype}, fuse=False)
    loaded: dict[int, Teacher] = {}
    for objective, function in functions.items():
        names = function.config.objectives
        if len(names) > 1 and objective not in names:
            raise ValueError(
                f"the teacher {teachers[objective]} has no output for {objective!r}, only for {names}: "
                "name another teacher for it, or one of these objectives."
            )
        is_head = isinstance(function, ValueHead)
        if is_head and id(function) not in loaded:
            assert base is not None  # without one it could not be loaded
            function.bind(base)
        teacher = loaded.setdefault(
            id(function), Teacher(teachers[objective], function.eval(), {}, base if is_head else None)
        )
        teacher.outputs[objective] = names.index(objective) if len(names) > 1 else 0
    return list(loaded.values())


def check_tokenizer(teacher: Teacher, store: TreeStore) -> None:
    """Raise `ValueError` if a teacher reads other token ids than those of the trees."""
    reads, written = teacher.function.config.tokenizer_fingerprint, store.metadata.tokenizer_fingerprint
    if reads not in (None, written):
        raise ValueError(
            f"the teacher {teacher.name} reads tokens of another tokenizer ({reads}, of "
            f"{teacher.function.config.base_model}) than the trees in {store.folder} have ({written}, of "
            f"{store.metadata.model}): teachers, student and trees must share one tokenizer."
        )


def teacher_values(store: TreeStore, teacher: Teacher, keep: bool = True) -> list[Array]:
    """Values of all trees of a store, each `[N, outputs]`, in the order of iteration.

    They are kept in the store's folder under the teacher's fingerprint, one file per shard, written when done: a killed
    pass goes on where it stood, and a second student costs no pass.

    Args:
        store: the trees; they need no rewards.
        teacher: what to ask.
        keep: read and write the files; False: compute, and leave the disk alone.

    Raises:
        ValueError: values that are NaN or infinite, or files of another teacher or of other trees.
        OSError: a corrupt file.
    """
    fingerprint, found = teacher.fingerprint, []
    folder = store.folder / VALUES_FOLDER / fingerprint
    if keep:
        folder.mkdir(parents=True, exist_ok=True)
    with tqdm(store.shards(), desc=f"values of {Path(teacher.name).name}", unit="shard") as progress:
        for shard in progress:
            trees = shard.trees()
            path = values_path(folder, shard)
            origin = {"teacher": fingerprint, "trees": _digest(trees)}
            if keep and path.exists():
                found += _read(path, origin)
                continue
            values = [teacher.values(tree) for tree in trees]
            if keep:
                with replace_when_whole(path) as temporary:
                    save_file({str(i): v for i, v in enumerate(values)}, temporary, metadata=origin)
            found += values
    return found


def values_path(folder: Path, shard: Shard) -> Path:
    """Where a teacher's values for a shard lie."""
    return folder / f"{shard.path.stem}.safetensors"


def _read(path: Path, origin: Mapping[str, str]) -> list[Array]:
    with open_safetensors(path, "numpy") as file:
        metadata = file.metadata() or {}
        values = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
    for name, expected in origin.items():
        if metadata.get(name) != expected:
            raise ValueError(
                f"{path} holds values for {name} {metadata.get(name)}, expected {expected}: "
                "delete this one file and run again."
            )
    return values


def _digest(trees: Sequence[Tree]) -> str:
    """16 hex digits of every token and of what comes before it: all that values depend on."""
    digest = hashlib.sha256()
    for layout in map(pack, trees):
        digest.update(layout.input_ids.tobytes())
        digest.update(layout.previous.tobytes())
    return digest.hexdigest()[:16]
