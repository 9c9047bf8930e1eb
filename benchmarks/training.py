"""What reading a whole tree as one sequence saves in training, against one sequence per tree node, in one process.

All forms train the same value model from the same start on the same trees, with the same optimizer and validation
trees, and by the same `ValueTrainer`. What could favour one is made equal:

- Learning rate (`--learning-rates`) and terms per optimizer step: a step of the packed form takes `--trees-per-step`
  whole trees, a step of the per-node form as many nodes, of all trees mixed, as these have on average.
- Tokens per forward. The per-node form groups its sequences by length and batches them up to about the tokens of a
  tree, so that neither form pays for small matrix products or much padding.
- Length of the training. Each is trained for several numbers of epochs, the learning rate falling to 0 over them as it
  does in use, and is judged by the loss it ends with: not by the luckiest of many looks at a loss that jumps.
- Terms are those of the paper, the last token of every node, except in a third form: trees in which every token of a
  node regresses the node's value (`targets: tokens`), which costs a packed tree nothing.
- Chance. Every choice is trained with each of `--seeds` (of order and of the start of the weights).

The loss to reach is the smallest mean over the seeds that a choice of the per-node form ends with. Each form then
stands with its quickest choice that comes down to it, within the standard error of their difference. Validation counts
for none.

Trees come from a labelled store (`mavis collect`, `mavis label`; recipes/smollm2). Run it on a machine that does
nothing else. Results go to docs/results/training.json and training.md after every run; a rerun with the same settings
makes only the runs that are missing, so that choices and seeds can be added:

    python benchmarks/training.py                                               # about an hour on two cores
    python benchmarks/training.py --trees 16 --num-layers 1 --seeds 0 --out runs/quick/training     # a quick look
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PrinterCallback, set_seed

from mavis_logits.models import load_chat_model
from mavis_training.fitting.batches import TrainingSet
from mavis_training.fitting.value_trainer import Validation, ValueTrainer, training_arguments
from mavis_training.train_model import LoraSettings, TrainModelConfig, starting_model
from mavis_training.trees.data import (
    LabelledTree,
    load_trees,
    open_stores,
    reward_units,
    set_reward_units,
    split_by_prompt,
)
from mavis_training.trees.targets import kept_nodes

ROOT = Path(__file__).parents[1]
FORMS = {
    "nodes": "a sequence per node",
    "trees": "a tree as one sequence",
    "tokens": "the same, every token a term",
}
GRID = ("trees_per_step", "learning_rates", "epochs", "packed_epochs", "seeds")


@dataclass(frozen=True)
class Choice:
    """How a form is trained.

    Attributes:
        form: of `FORMS`.
        trees_per_step: of the packed form, and as many terms of the per-node form.
        learning_rate: at its peak.
        epochs: over which it falls to 0.
    """

    form: str
    trees_per_step: int
    learning_rate: float
    epochs: float


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        choice: of the form and its settings.
        seed: of order and start.
        sequences: of an epoch.
        tokens_per_epoch: forwarded, without padding.
        terms_per_step: on average.
        tokens: forwarded in all, with padding.
        seconds: in all, without validation.
        loss: of the validation trees at the end, in standardised units.
    """

    choice: Choice
    seed: int
    sequences: int
    tokens_per_epoch: int
    terms_per_step: float
    tokens: int
    seconds: float
    loss: float


def main(argv: Sequence[str] | None = None) -> int:
    """Train all forms and write down what each took."""
    options = parser().parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        _, trees = load_trees(options.store, [options.objective], options.zeta)
    except (OSError, ValueError) as error:
        print(
            f"training.py: {error}\nThe trees are made by "
            "`mavis collect --config training/recipes/smollm2/collect.yaml` and "
            "`mavis label --config training/recipes/smollm2/label-helpful.yaml`.",
            file=sys.stderr,
        )
        return 2
    training, validation = split_by_prompt(trees, 0.2)
    rng = np.random.default_rng(0)  # the same trees for all seeds
    training = [training[i] for i in rng.permutation(len(training))[: options.trees]]
    validation = [validation[i] for i in rng.permutation(len(validation))[: options.validation_trees]]
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name not in ("store", "out", *GRID)}
    settings |= {"training_trees": len(training), "validation_trees": len(validation)}
    runs = read_runs(out.with_suffix(".json"), settings)
    for seed, choice in itertools.product(options.seeds, choices(options)):
        if (choice, seed) in {(run.choice, run.seed) for run in runs}:
            continue
        runs.append(train(choice, seed, training, validation, options))
        run = runs[-1]
        print(f"{choice}, seed {seed}: {run.seconds:.0f} s, validation loss {run.loss:.4f}", flush=True)
        write(runs, settings, out)
    write(runs, settings, out)
    print(out.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


def choices(options: argparse.Namespace) -> list[Choice]:
    """All that are to be compared."""
    return [
        Choice(form, trees_per_step, learning_rate, epochs)
        for form in FORMS
        for trees_per_step in options.trees_per_step
        for learning_rate in options.learning_rates
        for epochs in (options.epochs if form == "nodes" else options.packed_epochs)
    ]


def read_runs(path: Path, settings: dict[str, Any]) -> list[Run]:
    """The runs that `path` has, if they were made with these settings."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        return []
    return [Run(**run | {"choice": Choice(**run["choice"])}) for run in found["runs"]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="training.py", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--store", default=str(ROOT / "runs/smollm2/trees"), help="labelled tree store")
    add("--objective", default="humour", help="reward to predict (default: %(default)s)")
    add("--backbone", default="smollm2", help="decoder to train (default: %(default)s)")
    add("--num-layers", type=int, default=4, help="of its layers (default: %(default)s)")
    add("--lora-rank", type=int, default=16, help="0 trains all weights (default: %(default)s)")
    add("--drop-leaves", type=float, default=0.0, help="share of leaves left out (default: %(default)s, Algorithm 1)")
    add("--zeta", type=float, default=0.0, help="of equation 6 (default: %(default)s)")
    add("--trees", type=int, default=96, help="to train on (default: %(default)s)")
    add("--validation-trees", type=int, default=24, help="to validate on (default: %(default)s)")
    add("--trees-per-step", type=int, nargs="+", default=[1], help="of the packed form (default: %(default)s)")
    add("--epochs", type=float, nargs="+", default=[1, 2], help="of the per-node form (default: %(default)s)")
    add("--packed-epochs", type=float, nargs="+", default=[1, 2, 4], help="of the packed forms (default: %(default)s)")
    add("--learning-rates", type=float, nargs="+", default=[1e-3], help="of all (default: %(default)s)")
    add("--optimizer", default="adafactor", help="of all (default: %(default)s, section F.4)")
    add("--warmup-steps", type=int, default=4, help="of all (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of every choice (default: %(default)s)")
    add("--out", default=str(ROOT / "docs/results/training"), help="write to .json and .md (default: %(default)s)")
    return parser


def train(
    choice: Choice,
    seed: int,
    training: Sequence[LabelledTree],
    validation: Sequence[LabelledTree],
    options: argparse.Namespace,
) -> Run:
    """Train a value model and validate it at the end."""
    every_token, packing = choice.form == "tokens", "nodes" if choice.form == "nodes" else "trees"
    kept = [kept_nodes(item.tree, options.drop_leaves, 0) for item in training]
    sequences = TrainingSet(training, kept, packing, every_token)  # type: ignore[arg-type]
    terms = sum(
        1 + int(item.tree.length[k].sum() if every_token else k.sum()) for item, k in zip(training, kept, strict=True)
    )
    if packing == "trees":
        batch_size, accumulation = 1, choice.trees_per_step
    else:
        # As many nodes per step as the packed form's trees have, in forwards of about as many tokens as a tree has.
        packed = TrainingSet(training, kept, "trees", False)
        per_step = choice.trees_per_step * len(sequences) / len(training)
        batch_size = max(1, round(np.mean(packed.lengths) / np.mean(sequences.lengths)))
        accumulation = max(1, round(per_step / batch_size))
    steps = -(-len(sequences) // (batch_size * accumulation))
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainModelConfig(
            store=options.store,
            objectives=[options.objective],
            output=folder,
            backbone=options.backbone,
            num_layers=options.num_layers,
            lora=LoraSettings(options.lora_rank, 2 * options.lora_rank, dropout=0.0),
            zeta=options.zeta,
            drop_leaves=options.drop_leaves,
            packing=packing,  # type: ignore[arg-type]
            epochs=choice.epochs,
            batch_size=batch_size,
            gradient_accumulation=accumulation,
            learning_rate=choice.learning_rate,
            warmup_steps=options.warmup_steps,
            optimizer=options.optimizer,
            seed=seed,
            device="cpu",
            trainer={"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False},
        )
        trainer = make_trainer(config, sequences, validation)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        trainer.evaluate()
    return Run(
        choice=choice,
        seed=seed,
        sequences=len(sequences),
        tokens_per_epoch=int(sum(sequences.lengths)),
        terms_per_step=terms / steps,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=seconds,
        loss=trainer.metrics["loss"],
    )


def make_trainer(config: TrainModelConfig, sequences: TrainingSet, validation: Sequence[LabelledTree]) -> ValueTrainer:
    """A trainer of a new value model, the same in all forms but for its batches."""
    model = starting_model(config, open_stores(config.store), load_chat_model(config.backbone, torch.float32)[0])
    mean, scale = reward_units(sequences.trees)
    set_reward_units(model, mean.tolist(), scale.tolist())
    kept = [kept_nodes(item.tree, config.drop_leaves, 0) for item in validation]
    held_out = Validation(validation, kept, every_token=False)
    trainer = ValueTrainer(model, training_arguments(config), sequences, held_out, config.packing)
    trainer.remove_callback(PrinterCallback)
    return trainer


def write(runs: Sequence[Run], settings: dict[str, Any], out: Path) -> None:
    """Write the result and its page."""
    result = summary(runs, settings)
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(page(result), encoding="utf-8")


def summary(runs: Sequence[Run], settings: dict[str, Any]) -> dict[str, Any]:
    """What an epoch of each form takes, means over the seeds, and each form's quickest way to the loss to reach."""
    by_choice: dict[Choice, list[Run]] = {}
    for run in runs:
        by_choice.setdefault(run.choice, []).append(run)
    means = [asdict(choice) | _mean(made) for choice, made in by_choice.items()]
    goal = min((mean for mean in means if mean["form"] == "nodes"), key=lambda mean: mean["loss"])
    to_loss = {"nodes": goal}
    for form in set(FORMS) - {"nodes"}:
        reached = [mean for mean in means if mean["form"] == form and _is_level(mean, goal)]
        if reached:
            to_loss[form] = min(reached, key=lambda mean: mean["seconds"])
    per_epoch: dict[str, dict[str, float]] = {}
    for form in FORMS:
        made = [run for run in runs if run.choice.form == form]
        if made:
            epochs = sum(run.choice.epochs for run in made)
            per_epoch[form] = {
                "sequences": made[0].sequences,
                "tokens": made[0].tokens_per_epoch,
                "padded_tokens": sum(run.tokens for run in made) / epochs,
                "seconds": sum(run.seconds for run in made) / epochs,
            }
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": _cpu(), "threads": torch.get_num_threads(), "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "mavis-logits")},
        "settings": settings,
        "loss": goal["loss"],
        "per_epoch": per_epoch,
        "to_loss": to_loss,
        "means": means,
        "runs": [asdict(run) for run in runs],
    }


def _mean(runs: Sequence[Run]) -> dict[str, Any]:
    """Of one choice."""
    losses = [run.loss for run in runs]
    return {
        "seeds": sorted(run.seed for run in runs),
        "terms_per_step": runs[0].terms_per_step,
        "tokens": float(np.mean([run.tokens for run in runs])),
        "seconds": float(np.mean([run.seconds for run in runs])),
        "loss": float(np.mean(losses)),
        "standard_error": float(np.std(losses, ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else None,
    }


def _is_level(mean: dict[str, Any], goal: dict[str, Any]) -> bool:
    """Whether a choice's loss is at most the goal's, within the standard error of their difference."""
    return bool(mean["loss"] - goal["loss"] <= np.hypot(mean["standard_error"] or 0, goal["standard_error"] or 0))


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings = result["settings"]
    names = {
        "sequences": "sequences per epoch",
        "tokens": "tokens forwarded per epoch",
        "padded_tokens": "the same, padding included",
        "seconds": "seconds per epoch",
    }
    rows = [(name, {form: found[key] for form, found in result["per_epoch"].items()}) for key, name in names.items()]
    rows += [
        (
            f"{key} to validation loss {result['loss']:.3f}",
            {form: mean[key] for form, mean in result["to_loss"].items()},
        )
        for key in ("tokens", "seconds")
    ]
    table = "\n".join(f"| {name} | {' | '.join(_against(found, form) for form in FORMS)} |" for name, found in rows)
    every = "\n".join(
        f"| {FORMS[mean['form']]} | {mean['trees_per_step']} ({mean['terms_per_step']:.0f} terms) "
        f"| {mean['learning_rate']:g} | {mean['epochs']:g} | {mean['seconds']:,.0f} | {mean['loss']:.3f}"
        + (f" ± {mean['standard_error']:.3f}" if mean["standard_error"] is not None else "")
        + f" ({len(mean['seeds'])}) |"
        for mean in result["means"]
    )
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"""# Training: a tree as one sequence against a sequence per node

A value model of {settings["num_layers"]} layers of {settings["backbone"]}, LoRA rank {settings["lora_rank"]}, trained
on {settings["training_trees"]} trees for "{settings["objective"]}", {settings["drop_leaves"]:.0%} of their leaves left
out, and validated on {settings["validation_trees"]} others. In brackets the ratio to a sequence per node.

| | {" | ".join(FORMS.values())} |
|---|---|---|---|
{table}

The loss is the smallest that a choice of a sequence per node ends with, a mean over seeds; each form stands with its
quickest choice that ends no higher, within the standard error of the difference:

| form | trees a step | learning rate | epochs | seconds | validation loss ± standard error (seeds) |
|---|---|---|---|---|---|
{every}

Per-node runs take as many nodes a step as the trees of a packed step have, of all trees mixed. The learning rate falls
to 0 over a run's epochs. `benchmarks/training.py` says more.

Measured {result["date"]} on {result["machine"]["cpu"]}, {result["machine"]["threads"]} threads; {versions}.
"""


def _against(found: dict[str, float], form: str) -> str:
    """A form's figure and its ratio to the per-node form's."""
    if form not in found:
        return "not reached"
    ratio = f" ({found[form] / found['nodes']:.2f})" if form != "nodes" else ""
    return f"{found[form]:,.0f}{ratio}"


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
