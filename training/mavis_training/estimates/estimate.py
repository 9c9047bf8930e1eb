"""Dry runs: what a command would do, and the tokens, time and disk it would take, scaled from a short calibration.

Nothing is written to the folders that the command names. Estimates are for one process; what is done already is left
out, as a rerun would leave it out.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from ..base.prompts import read_prompts
from ..fitting.head_config import TrainHeadConfig
from ..fitting.model_config import TrainModelConfig
from ..fitting.states import states_path
from ..label import LabelConfig, unlabelled
from ..rewards.load import reward_digest
from ..sampling.config import CollectConfig
from ..trees.data import load_trees
from ..trees.tree_store import METADATA_FILE, TreeStore
from .calibrate import HEAD_TREES, TREES, Calibration, Counts, Sample, spread


@dataclass(frozen=True)
class Estimate:
    """One step of a job.

    Attributes:
        what: the step.
        amount: how much of it there is.
        unit: of the amount, e.g. "trees".
        seconds: it will take.
        bytes: it will write.
        tokens: it will sample or read; 0 where none are counted.
    """

    what: str
    amount: float
    unit: str
    seconds: float
    bytes: float
    tokens: float = 0.0


def scale(what: str, unit: str, amount: float, sample: Sample, tokens: float = 0.0, repeat: float = 1.0) -> Estimate:
    """From a short run to the whole job.

    Args:
        what: the step.
        unit: of the amounts.
        amount: of the whole job, in the unit of `sample.amount`. 0: there is nothing to do, at no cost.
        sample: the short run.
        tokens: of the whole job, once.
        repeat: passes over the amount: time and tokens grow with it, disk does not.
    """
    if not amount:
        return Estimate(what, 0, unit, 0.0, 0.0)
    ratio = amount / sample.amount
    seconds = sample.fixed_seconds + sample.seconds * ratio * repeat
    return Estimate(what, amount, unit, seconds, sample.fixed_bytes + sample.bytes * ratio, tokens * repeat)


@singledispatch
def estimate(config: Any, calibration: Calibration) -> list[Estimate]:
    """The steps of a command with this config.

    Args:
        config: of `mavis collect`, `label`, `train-model`, `train-head` or `iterate`.
        calibration: runs the real functions on samples, in a temporary folder.

    Raises:
        TypeError: a config of another command.
        ValueError, OSError: as the command itself: what it would refuse, a dry run refuses.
    """
    raise TypeError(f"there is no dry run for {type(config).__name__}.")


def dry_run(config: Any, console: Console | None = None) -> list[Estimate]:
    """Print what a command with this config would do and take, and return it. Nothing of it is done. Raises as
    `estimate`."""
    output = str(getattr(config, "output", None) or config.store)
    with TemporaryDirectory() as folder:
        names = ("model", "dtype", "device")
        settings = {name: getattr(config, name) for name in names if isinstance(getattr(config, name, None), str)}
        with redirect_stdout(io.StringIO()):  # what the short runs report of themselves means nothing
            estimates = estimate(config, Calibration(Path(folder), **settings))
    (console or Console()).print(table(estimates, output, free_space(Path(output))))
    return estimates


def table(estimates: Sequence[Estimate], output: str, free: int) -> Table:
    """Estimates and their sum, and whether the disk has room."""
    seconds, size = (sum(getattr(e, name) for e in estimates) for name in ("seconds", "bytes"))
    room = "" if size <= free else "  [bold red]more than there is: make room, or give another folder[/]"
    caption = f"Scaled from a short run. {output} has {human_bytes(free)} free.{room} Nothing has been written there."
    shown = Table(title="Dry run", caption=caption, caption_justify="left", show_footer=True)
    totals = ("together", "", "", human_time(seconds), human_bytes(size))
    for name, total in zip(("step", "amount", "tokens", "time", "disk"), totals, strict=True):
        shown.add_column(name, footer=total, justify="left" if name == "step" else "right")
    for e in estimates:
        tokens = f"{e.tokens:,.0f}" if e.tokens else ""
        shown.add_row(e.what, f"{e.amount:,.0f} {e.unit}", tokens, human_time(e.seconds), human_bytes(e.bytes))
    return shown


def human_time(seconds: float) -> str:
    """Two figures at most: `40 s`, `12 min`, `3.5 h`, `4.2 days`."""
    for limit, divisor, unit, digits in ((90, 1, "s", 0), (5400, 60, "min", 0), (172800, 3600, "h", 1)):
        if seconds < limit:
            return f"{seconds / divisor:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def human_bytes(size: float) -> str:
    """`0 B`, `12 kB`, `3.4 MB`, `1.2 GB`."""
    for limit, divisor, unit, digits in ((1e3, 1, "B", 0), (1e6, 1e3, "kB", 0), (1e9, 1e6, "MB", 1)):
        if size < limit:
            return f"{size / divisor:.{digits}f} {unit}"
    return f"{size / 1e9:.1f} GB"


def free_space(path: Path) -> int:
    """Bytes free where a file or folder lies or will lie."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


@estimate.register
def _(config: CollectConfig, calibration: Calibration) -> list[Estimate]:
    rows = read_prompts(config.prompts, config.limit)
    begun = TreeStore.open(config.store) if (Path(config.store) / METADATA_FILE).exists() else None
    done = begun.prompt_ids() if begun else set()
    todo = [row for row in rows if str(row["id"]) not in done]
    if not todo:
        return [Estimate("collect", 0, "trees", 0.0, 0.0)]
    sample, store = calibration.collect(config, todo)
    if begun:
        begun.require_same(store.metadata)
    tokens = Counts.of(list(store)).for_trees(len(todo)).tokens
    return [scale("collect", "trees", len(todo), sample, tokens)]


@estimate.register
def _(config: LabelConfig, calibration: Calibration) -> list[Estimate]:
    store = TreeStore.open(config.store)
    todo = {name: unlabelled(store, config, name, reward_digest(spec)) for name, spec in config.rewards.items()}
    trees = {shard.path: shard.trees() for shards in todo.values() for shard in shards}
    every = [tree for shard in trees.values() for tree in shard]
    if not every:
        return [Estimate(f"label {objective}", 0, "completions", 0.0, 0.0) for objective in todo]
    small = calibration.copy(store.metadata, [(tree, None) for tree in spread(every, TREES)], [])
    wanted = {objective: config.rewards[objective] for objective, shards in todo.items() if shards}
    samples = calibration.label(small, wanted, config.tokenizer, config.device)
    estimates = []
    for objective, shards in todo.items():
        leaves = Counts.of([tree for shard in shards for tree in trees[shard.path]]).leaves
        sample = samples.get(objective, Sample(1, 0.0))
        estimates.append(scale(f"label {objective}", "completions", leaves, sample))
    return estimates


@estimate.register
def _(config: TrainModelConfig, calibration: Calibration) -> list[Estimate]:
    counts, small = _training_trees(config, calibration)
    sample, _ = calibration.train_model(config, small)
    return [train_estimate(config, counts, Counts.of(list(small)), sample)]


@estimate.register
def _(config: TrainHeadConfig, calibration: Calibration) -> list[Estimate]:
    counts, small = _training_trees(config, calibration)
    per_tree = Counts.of(list(small))
    states, sample, _ = calibration.train_head(config, small)
    stores = [config.store] if isinstance(config.store, str) else config.store
    missing = [
        tree
        for store, folder in zip(stores, config.states_folders(), strict=True)
        for shard in TreeStore.open(store).shards()
        if not states_path(folder, shard).exists()
        for tree in shard.trees()
    ]
    return [
        states_estimate(Counts.of(missing), per_tree, states),
        train_estimate(config, counts, per_tree, sample),
    ]


def states_estimate(counts: Counts, small: Counts, sample: Sample, what: str = "hidden states") -> Estimate:
    """The prefill pass over trees of these `counts`, from that over the `small` ones."""
    by_tokens = Sample(small.packed, sample.seconds, sample.bytes)
    done = scale(what, "tokens", counts.packed, by_tokens, counts.packed)
    return Estimate(what, counts.trees, "trees", done.seconds, done.bytes, done.tokens)


def train_estimate(
    config: TrainModelConfig | TrainHeadConfig, counts: Counts, small: Counts, sample: Sample, what: str = "train"
) -> Estimate:
    """All epochs over trees of these `counts`, at most; a head counts new tokens (its samples), a model packed ones."""
    kind = "tokens" if isinstance(config, TrainHeadConfig) else "packed"
    amount = getattr(counts, kind)
    per_token = Sample(getattr(small, kind), sample.seconds, 0.0, sample.fixed_seconds, sample.fixed_bytes)
    done = scale(what, "tokens", amount, per_token, amount, repeat=config.epochs)
    return Estimate(what, counts.trees * config.epochs, "trees", done.seconds, done.bytes, done.tokens)


def _training_trees(config: TrainModelConfig | TrainHeadConfig, calibration: Calibration) -> tuple[Counts, TreeStore]:
    """How many there are to train and validate on, and a small store of some."""
    sample = (config.trees, config.answers) if isinstance(config, TrainHeadConfig) else ()
    stores, trees = load_trees(config.store, config.objectives, config.zeta, config.penalty, *sample)
    once = list({item.tree.prompt_id: item for item in trees}.values())
    count = HEAD_TREES if isinstance(config, TrainHeadConfig) else TREES
    labelled = [(item.tree, item.rewards) for item in spread(once, count)]
    return Counts.of([item.tree for item in trees]), calibration.copy(stores[-1].metadata, labelled, config.objectives)
