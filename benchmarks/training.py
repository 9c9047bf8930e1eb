"""What reading a whole tree as one sequence saves in training, against one sequence per tree node, in one process.

Both forms train the same value model from the same start on the same trees, with the same optimizer, learning rate and
validation trees, and by the same `ValueTrainer`. What could favour one is made equal:

- Terms per optimizer step. A step of the packed form takes `--trees-per-step` whole trees; a step of the per-node form
  takes as many nodes, of all trees mixed, as these have on average.
- Tokens per forward. The per-node form groups its sequences by length and batches them up to about the tokens of a
  tree, so that neither form pays for small matrix products or much padding.
- The learning rate is constant after its warm-up, so that neither form is helped by when its decay ends.
- The loss to reach is the smallest that the per-node form has at any of its checks, and its time is that of this
  check. The packed form must come down to it at one of its own checks. Time spent in validation counts for neither.

Trees come from a labelled store (`mavis collect`, `mavis label`; recipes/smollm2). Run it on a machine that does
nothing else. Results go to docs/results/training.json and training.md:

    python benchmarks/training.py                                            # about 20 minutes on two cores
    python benchmarks/training.py --trees 16 --num-layers 1 --out runs/quick # a quick look
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PrinterCallback, TrainingArguments, set_seed

from mavis_logits.demo.smollm2 import load_chat_model
from mavis_training.batches import TrainingSet
from mavis_training.data import LabelledTree, load_trees, reward_units, split_by_prompt
from mavis_training.targets import kept_nodes
from mavis_training.train_model import LoraSettings, TrainModelConfig, set_reward_units, starting_model
from mavis_training.tree_store import TreeStore
from mavis_training.value_trainer import Validation, ValueTrainer, training_arguments

ROOT = Path(__file__).parents[1]
FORMS = ("nodes", "trees")


@dataclass
class Check:
    """One look at the validation trees: when, after how many tokens, and their loss."""

    step: int
    seconds: float
    tokens: int
    loss: float


@dataclass
class Run:
    """One form's training.

    Attributes:
        sequences: of an epoch.
        tokens_per_epoch: forwarded, without padding.
        padded_tokens_per_epoch: the same with padding.
        seconds_per_epoch: without validation, averaged over the epochs run.
        terms_per_step: on average.
        checks: in order.
    """

    sequences: int
    tokens_per_epoch: int
    terms_per_step: float
    padded_tokens_per_epoch: int = 0
    seconds_per_epoch: float = 0.0
    checks: list[Check] = field(default_factory=list)

    def first_at(self, loss: float) -> Check | None:
        """The first check with this loss or a smaller one."""
        return next((check for check in self.checks if check.loss <= loss), None)


class TimedTrainer(ValueTrainer):
    """Keeps what validation finds, off the clock; stops when `goal` is reached and an epoch is over."""

    run: Run
    goal: float = -np.inf
    clock: float = 0.0
    paused: float = 0.0

    def seconds(self) -> float:
        """Time spent in training."""
        return time.perf_counter() - self.clock - self.paused

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, off the clock."""
        state, began = self.state, time.perf_counter()
        seconds = self.seconds()
        found = super().evaluate(*args, **kwargs)
        self.run.checks.append(
            Check(state.global_step, seconds, int(state.num_input_tokens_seen), self.metrics["loss"])
        )
        print(
            f"  step {state.global_step:4d}, {seconds:6.0f} s, validation loss {self.metrics['loss']:.4f}", flush=True
        )
        if self.metrics["loss"] <= self.goal and (state.epoch or 0.0) >= 1:
            self.control.should_training_stop = True
        self.paused += time.perf_counter() - began
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train both forms and write down what each took."""
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
    rng = np.random.default_rng(options.seed)
    training = [training[i] for i in rng.permutation(len(training))[: options.trees]]
    validation = [validation[i] for i in rng.permutation(len(validation))[: options.validation_trees]]
    runs: dict[str, Run] = {}
    goal = -np.inf
    for form in FORMS:
        print(f"{form}: {len(training)} trees", flush=True)
        runs[form] = train(form, training, validation, goal, options)
        goal = min(check.loss for check in runs[form].checks[1:])
    result = summary(runs, options, len(training), len(validation))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "training.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "training.md").write_text(page(result), encoding="utf-8")
    print(page(result))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="training.py", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--store", default=str(ROOT / "runs/smollm2/trees"), help="labelled tree store")
    add("--objective", default="helpful", help="reward to predict (default: %(default)s)")
    add("--backbone", default="smollm2", help="decoder to train (default: %(default)s)")
    add("--num-layers", type=int, default=4, help="of its layers (default: %(default)s)")
    add("--lora-rank", type=int, default=16, help="0 trains all weights (default: %(default)s)")
    add(
        "--targets", choices=("nodes", "tokens"), default="nodes", help="of a node: its end, as the paper, or all of it"
    )
    add("--drop-leaves", type=float, default=0.0, help="share of leaves left out (default: %(default)s, Algorithm 1)")
    add("--zeta", type=float, default=0.0, help="of equation 6 (default: %(default)s)")
    add("--trees", type=int, default=160, help="to train on (default: %(default)s)")
    add("--validation-trees", type=int, default=40, help="to validate on (default: %(default)s)")
    add("--trees-per-step", type=int, default=4, help="of the packed form (default: %(default)s)")
    add("--epochs", type=int, default=1, help="of the per-node form (default: %(default)s)")
    add("--checks", type=int, default=8, help="validations per epoch (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="of both (default: %(default)s)")
    add("--warmup-steps", type=int, default=4, help="of both (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    add("--out", default=str(ROOT / "docs/results"), help="folder for training.json and training.md")
    return parser


def train(
    form: str,
    training: Sequence[LabelledTree],
    validation: Sequence[LabelledTree],
    goal: float,
    options: argparse.Namespace,
) -> Run:
    """Train in one form; the packed one for up to four times the per-node form's epochs, until it is at `goal`."""
    kept = [kept_nodes(item.tree, options.drop_leaves, options.seed) for item in training]
    every_token = options.targets == "tokens"
    sequences = TrainingSet(training, kept, form, every_token)  # type: ignore[arg-type]
    terms = sum(
        1 + int(item.tree.length[k].sum() if every_token else k.sum()) for item, k in zip(training, kept, strict=True)
    )
    if form == "trees":
        batch_size, accumulation = 1, options.trees_per_step
    else:
        # As many nodes per step as the packed form's trees have, in forwards of about as many tokens as a tree has.
        packed = TrainingSet(training, kept, "trees", every_token)
        per_step = options.trees_per_step * len(sequences) / len(training)
        batch_size = max(1, round(np.mean(packed.lengths) / np.mean(sequences.lengths)))
        accumulation = max(1, round(per_step / batch_size))
    steps = -(-len(sequences) // (batch_size * accumulation))
    run = Run(len(sequences), int(sum(sequences.lengths)), terms / steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(form, sequences, validation, steps, (batch_size, accumulation), folder, options)
        trainer.run, trainer.goal = run, goal
        trainer.clock = time.perf_counter()
        trainer.evaluate()
        trainer.train()
        epochs = trainer.state.global_step / steps
        run.seconds_per_epoch = trainer.seconds() / epochs
        run.padded_tokens_per_epoch = round(trainer.state.num_input_tokens_seen / epochs)
    return run


def make_trainer(
    form: str,
    sequences: TrainingSet,
    validation: Sequence[LabelledTree],
    steps: int,
    batch: tuple[int, int],
    folder: str,
    options: argparse.Namespace,
) -> TimedTrainer:
    """A trainer of a new value model, the same in both forms but for its batches."""
    set_seed(options.seed)
    config = TrainModelConfig(
        store=options.store,
        objectives=[options.objective],
        output=folder,
        backbone=options.backbone,
        num_layers=options.num_layers,
        lora=LoraSettings(options.lora_rank, 2 * options.lora_rank, dropout=0.0),
        zeta=options.zeta,
        drop_leaves=options.drop_leaves,
        targets=options.targets,
        packing=form,  # type: ignore[arg-type]
        epochs=options.epochs * (1 if form == "nodes" else 4),
        batch_size=batch[0],
        gradient_accumulation=batch[1],
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        seed=options.seed,
        device="cpu",
        trainer={
            "lr_scheduler_type": "constant_with_warmup",
            "eval_strategy": "steps",
            "eval_steps": max(1, steps // options.checks),
            "save_strategy": "no",
            "load_best_model_at_end": False,
        },
    )
    model = starting_model(config, [TreeStore.open(options.store)], load_chat_model(config.backbone, torch.float32)[0])
    mean, scale = reward_units(sequences.trees)
    set_reward_units(model, mean.tolist(), scale.tolist())
    arguments: TrainingArguments = training_arguments(config)
    kept = [kept_nodes(item.tree, config.drop_leaves, config.seed) for item in validation]
    held_out = Validation(validation, kept, config.targets == "tokens")
    trainer = TimedTrainer(model, arguments, sequences, held_out, form)  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    return trainer


def summary(runs: dict[str, Run], options: argparse.Namespace, training: int, validation: int) -> dict[str, Any]:
    """The figures of both forms, and their ratios (packed to per-node)."""
    nodes, trees = runs["nodes"], runs["trees"]
    goal = min(check.loss for check in nodes.checks[1:])
    slow, quick = nodes.first_at(goal), trees.first_at(goal)
    assert slow is not None
    ratios = {
        "tokens_per_epoch": trees.tokens_per_epoch / nodes.tokens_per_epoch,
        "padded_tokens_per_epoch": trees.padded_tokens_per_epoch / nodes.padded_tokens_per_epoch,
        "seconds_per_epoch": trees.seconds_per_epoch / nodes.seconds_per_epoch,
        "seconds_to_loss": quick.seconds / slow.seconds if quick else None,
        "tokens_to_loss": quick.tokens / slow.tokens if quick else None,
    }
    settings = {name: value for name, value in vars(options).items() if name not in ("store", "out")}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": _cpu(), "threads": torch.get_num_threads(), "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "mavis-logits")},
        "settings": settings | {"training_trees": training, "validation_trees": validation},
        "loss": goal,
        "ratios": ratios,
        "runs": {form: asdict(run) for form, run in runs.items()},
        "at_loss": {"nodes": asdict(slow), "trees": asdict(quick) if quick else None},
    }


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings, ratios, runs, at = (result[name] for name in ("settings", "ratios", "runs", "at_loss"))
    nodes, trees = runs["nodes"], runs["trees"]
    rows = [
        ("sequences per epoch", nodes["sequences"], trees["sequences"], trees["sequences"] / nodes["sequences"]),
        (
            "tokens forwarded per epoch",
            nodes["tokens_per_epoch"],
            trees["tokens_per_epoch"],
            ratios["tokens_per_epoch"],
        ),
        (
            "the same, padding included (mean of the steps taken)",
            nodes["padded_tokens_per_epoch"],
            trees["padded_tokens_per_epoch"],
            ratios["padded_tokens_per_epoch"],
        ),
        ("terms per optimizer step", nodes["terms_per_step"], trees["terms_per_step"], None),
        (
            "seconds per epoch",
            nodes["seconds_per_epoch"],
            trees["seconds_per_epoch"],
            ratios["seconds_per_epoch"],
        ),
    ]
    if at["trees"]:
        loss = f"to validation loss {result['loss']:.4f}"
        rows += [
            (f"optimizer steps {loss}", at["nodes"]["step"], at["trees"]["step"], None),
            (f"tokens {loss}", at["nodes"]["tokens"], at["trees"]["tokens"], ratios["tokens_to_loss"]),
            (f"seconds {loss}", at["nodes"]["seconds"], at["trees"]["seconds"], ratios["seconds_to_loss"]),
        ]
    table = "\n".join(f"| {name} | {_number(a)} | {_number(b)} | {_ratio(r)} |" for name, a, b, r in rows)
    missed = "" if at["trees"] else f"\nThe packed form did not come down to {result['loss']:.4f} in its epochs.\n"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"""# Training: a tree as one sequence against a sequence per node

A value model of {settings["num_layers"]} layers of {settings["backbone"]}, LoRA rank {settings["lora_rank"]},
trained on {settings["training_trees"]} trees for "{settings["objective"]}" and validated on
{settings["validation_trees"]} others.
Terms: "{settings["targets"]}", {settings["drop_leaves"]:.0%} of the leaves left out.

| | a sequence per node | a tree as one sequence | ratio |
|---|---|---|---|
{table}
{missed}
Both forms take as many terms per optimizer step, have the same constant learning rate and start from the same weights.
The loss to reach is the smallest that the per-node form had at any of its checks ({settings["checks"]} per epoch); the
time is each form's own at the first check at which it had it, without the time spent in validation.
`benchmarks/training.py` says more.

Measured {result["date"]} on {result["machine"]["cpu"]}, {result["machine"]["threads"]} threads, seed
{settings["seed"]}; {versions}.
"""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


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
