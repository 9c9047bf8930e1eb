"""What reading a whole tree as one sequence saves in training, against one sequence per tree node, in one process.

Both forms train the same value model from the same start on the same trees, with the same optimizer and validation
trees, and by the same `ValueTrainer`. What could favour one is made equal:

- Both are run at the same choices of learning rate (`--learning-rates`) and terms per optimizer step: a step of the
  packed form takes each of `--trees-per-step` whole trees, a step of the per-node form as many nodes, of all trees
  mixed, as these have on average. Each form then stands with the run that suits it best.
- Tokens per forward. The per-node form groups its sequences by length and batches them up to about the tokens of a
  tree, so that neither form pays for small matrix products or much padding.
- The learning rate is constant after its warm-up, so that neither form is helped by when its decay ends.
- The loss to reach is the smallest that any per-node run has at any of its checks, and the per-node form's time is
  that of this check. The packed form must come down to it at one of its own. Validation counts for neither.

Trees come from a labelled store (`mavis collect`, `mavis label`; recipes/smollm2). Run it on a machine that does
nothing else. Results go to docs/results/training.json and training.md after every run; a rerun with the same settings
makes only the runs that are missing:

    python benchmarks/training.py                                            # about an hour on one core
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
from mavis_training.data import LabelledTree, load_trees, reward_units, set_reward_units, split_by_prompt
from mavis_training.targets import kept_nodes
from mavis_training.train_model import LoraSettings, TrainModelConfig, starting_model
from mavis_training.tree_store import TreeStore
from mavis_training.value_trainer import Validation, ValueTrainer, training_arguments

ROOT = Path(__file__).parents[1]
FORMS = ("nodes", "trees")
GRID = ("trees_per_step", "learning_rates")


@dataclass
class Check:
    """One look at the validation trees: when, after how many tokens, and their loss."""

    step: int
    seconds: float
    tokens: int
    loss: float


@dataclass
class Run:
    """One training.

    Attributes:
        form: `nodes` or `trees`.
        trees_per_step, learning_rate: its settings.
        sequences: of an epoch.
        tokens_per_epoch: forwarded, without padding.
        padded_tokens_per_epoch: the same with padding.
        seconds_per_epoch: without validation, averaged over the epochs run.
        terms_per_step: on average.
        checks: in order.
    """

    form: str
    trees_per_step: int
    learning_rate: float
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
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name not in ("store", "out", *GRID)}
    settings |= {"training_trees": len(training), "validation_trees": len(validation)}
    runs = read_runs(out / "training.json", settings)
    for form in FORMS:
        goal = -np.inf if form == "nodes" else best(runs, "nodes")
        for trees_per_step in options.trees_per_step:
            for learning_rate in options.learning_rates:
                if any(
                    (r.form, r.trees_per_step, r.learning_rate) == (form, trees_per_step, learning_rate) for r in runs
                ):
                    continue
                print(f"{form}: {len(training)} trees, {trees_per_step} a step, {learning_rate:g}", flush=True)
                arguments = argparse.Namespace(
                    **vars(options) | {"trees_per_step": trees_per_step, "learning_rate": learning_rate}
                )
                runs.append(train(form, training, validation, goal, arguments))
                result = summary(runs, settings)
                (out / "training.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
                (out / "training.md").write_text(page(result), encoding="utf-8")
    print((out / "training.md").read_text(encoding="utf-8"))
    return 0


def read_runs(path: Path, settings: dict[str, Any]) -> list[Run]:
    """The runs that `path` has, if they were made with these settings."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        return []
    return [Run(**run | {"checks": [Check(**check) for check in run["checks"]]}) for run in found["runs"]]


def best(runs: Sequence[Run], form: str) -> float:
    """The smallest loss that a form has at any check after its first step."""
    return min(check.loss for run in runs if run.form == form for check in run.checks[1:])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="training.py", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--store", default=str(ROOT / "runs/smollm2/trees"), help="labelled tree store")
    add("--objective", default="humour", help="reward to predict (default: %(default)s)")
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
    add("--trees-per-step", type=int, nargs="+", default=[1, 4], help="of the packed form (default: %(default)s)")
    add("--epochs", type=int, default=1, help="of the per-node form (default: %(default)s)")
    add("--checks", type=int, default=8, help="validations per epoch (default: %(default)s)")
    add("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3], help="of both (default: %(default)s)")
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
    settings = form, options.trees_per_step, options.learning_rate
    run = Run(*settings, len(sequences), int(sum(sequences.lengths)), terms / steps)
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


def summary(runs: Sequence[Run], settings: dict[str, Any]) -> dict[str, Any]:
    """The figures of both forms and their ratios (packed to per-node), each form by its quickest run to the goal."""
    goal = best(runs, "nodes")
    reached = {
        form: [(run, check) for run in runs if run.form == form and (check := run.first_at(goal))] for form in FORMS
    }
    quickest = {form: min(found, key=lambda x: x[1].seconds) for form, found in reached.items() if found}
    per_epoch = {}
    if any(run.form == "trees" for run in runs):
        for name in ("sequences", "tokens_per_epoch", "padded_tokens_per_epoch", "seconds_per_epoch"):
            values = {form: float(np.mean([getattr(r, name) for r in runs if r.form == form])) for form in FORMS}
            per_epoch[name] = values | {"ratio": values["trees"] / values["nodes"]}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": _cpu(), "threads": torch.get_num_threads(), "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "mavis-logits")},
        "settings": settings,
        "loss": goal,
        "per_epoch": per_epoch,
        "to_loss": {
            form: {"trees_per_step": run.trees_per_step, "learning_rate": run.learning_rate} | asdict(check)
            for form, (run, check) in quickest.items()
        },
        "runs": [asdict(run) for run in runs],
    }


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings, at = result["settings"], result["to_loss"]
    names = {
        "sequences": "sequences per epoch",
        "tokens_per_epoch": "tokens forwarded per epoch",
        "padded_tokens_per_epoch": "the same, padding included",
        "seconds_per_epoch": "seconds per epoch (mean of the runs)",
    }
    rows = [(names[name], found["nodes"], found["trees"]) for name, found in result["per_epoch"].items()]
    if "trees" in at:
        rows += [
            (f"{name} to validation loss {result['loss']:.4f}", at["nodes"][key], at["trees"][key])
            for name, key in (("tokens", "tokens"), ("seconds", "seconds"))
        ]
    table = "\n".join(f"| {name} | {a:,.0f} | {b:,.0f} | {b / a:.2f} |" for name, a, b in rows)
    missed = "" if "trees" in at else f"\nThe packed form did not come down to {result['loss']:.4f} in its epochs.\n"
    every = "\n".join(
        f"| {run['form']} | {run['trees_per_step']} ({run['terms_per_step']:.0f} terms) | {run['learning_rate']:g} "
        f"| {min(check['loss'] for check in run['checks'][1:]):.4f} | {run['checks'][-1]['seconds']:,.0f} "
        f"| {_first_at(run, result['loss'])} |"
        for run in result["runs"]
    )
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
The loss to reach is the smallest that any per-node run had at any of its checks ({settings["checks"]} per epoch,
{settings["epochs"]} epochs). Each form stands with its quickest run to it; time spent in validation is not counted.

| form | trees a step | learning rate | smallest loss | seconds in all | seconds to {result["loss"]:.4f} |
|---|---|---|---|---|---|
{every}

Per-node runs take as many nodes a step as the trees of a packed step have, of all trees mixed; all start from the same
weights, and the learning rate is constant. A packed run ends when it has come down to the loss and an epoch is over.
`benchmarks/training.py` says more.

Measured {result["date"]} on {result["machine"]["cpu"]}, {result["machine"]["threads"]} threads, seed
{settings["seed"]}; {versions}.
"""


def _first_at(run: dict[str, Any], loss: float) -> str:
    return next((f"{check['seconds']:,.0f}" for check in run["checks"][1:] if check["loss"] <= loss), "not reached")


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
