"""Algorithm 1 whole: collect with the current policy, label, train from the previous value function, validate, repeat.

iterate.json                    what is done, under which settings (`mavis_training.iteration.stages`)
iterations.json, report.md      what was found (`mavis_training.iteration.report`)
validation.json                 the reference alone on the validation prompts
iteration-0/trees, states       labelled trees; their hidden states (value heads)
iteration-0/value               V^0
iteration-0/validation.json     MAVIS(pi_ref, V^0, k, beta_0) on the validation prompts
iteration-1/...
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.backbone.fingerprint import Identity, tokenizer_fingerprint
from mavis_logits.models import load_chat_model

from .base.files import replace_when_whole, write_json_lines
from .base.kept import digest, model_origin
from .base.prompts import read_prompts
from .base.ranks import join
from .base.settings import torch_dtype
from .collect import PolicyConfig, collect, describe, load_policy
from .iteration.config import IterateConfig, IterationConfig
from .iteration.record import Iterated
from .iteration.report import write_report
from .iteration.stages import Stage, StageLog
from .label import LabelConfig, label
from .measure.schedule import Measurement, TargetKl, find_zeta, gain, improves, raise_beta
from .measure.validation import RESULT_FILE, Base, ValidationConfig, Validator
from .rewards.load import reward_digest
from .train_head import TrainHeadConfig, train_head
from .train_model import TrainModelConfig, train_model
from .trees.tree_store import TreeStore

__all__ = ["Iterated", "IterateConfig", "IterationConfig", "TargetKl", "ValidationConfig", "iterate"]

STATE_FILE = "iterate.json"
# Settings of a trainer that say where, not what.
_PLACES = ("store", "states", "output", "initial", "device", "fresh")


def iterate(
    config: IterateConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Run Algorithm 1, write the report and return what `iterations.json` holds.

    Killed at any instant, a rerun goes on where it stood. More iterations may be added to a finished run. Several
    processes (`mavis_training.base.ranks`) share the collecting, labelling and training of each iteration.

    Args:
        config: all settings.
        model: the base model, if it is loaded already (then `tokenizer` too).
        tokenizer: its tokenizer.

    Raises:
        ValueError: validation prompts that are trained on, a stage that was begun under other settings (the message
            names the field), given trees of another policy, or what collecting, labelling and training refuse.
        OSError: a file that cannot be read or written.
    """
    run = _Run(config, model, tokenizer)
    run.require_held_out()
    reference = run.measure("", None, [], None)[1]
    done: list[Iterated] = []
    stopped = None
    for i in range(len(config.iterations)):
        done.append(run.iteration(i, done, reference))
        stopped = why_stop([iterated.measured for iterated in done], config) if i + 1 < len(config.iterations) else None
        results = write_report(config, reference, done, stopped, run.ranks)
        if stopped:
            break
    return results


def why_stop(measured: Sequence[Measurement], config: IterateConfig) -> str | None:
    """Why to stop after these iterations: none of the last `patience` is better than the best before; else None."""
    if not config.early_stop:
        return None
    best = 0
    for i in range(1, len(measured)):
        if improves(measured[i], measured[best], config.tolerance, config.kl_weight):
            best = i
    if len(measured) - 1 - best < config.patience:
        return None
    mean, error = gain(measured[-1], measured[best], config.kl_weight)
    return (
        f"iteration {len(measured) - 1} is not better than iteration {best} "
        f"(difference {mean:+.3f}, standard error {error:.3f})"
    )


class _Run:
    """One run: its stages, and what they share."""

    def __init__(
        self, config: IterateConfig, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.config, self.folder = config, Path(config.output)
        self.ranks = join(config.device)
        self.device = str(self.ranks.device)
        self.log = StageLog(self.folder / STATE_FILE, self.ranks, config.reuse)
        if model is not None and tokenizer is not None:
            self.base = model.to(self.device).eval(), tokenizer  # type: ignore[arg-type]
            self.base_origin: Any = Identity(model).fingerprint
        else:
            self.base_origin = model_origin(config.model)
        self.validator = Validator(
            config.validation, config.rewards, config.weights(), lambda: self.base, self.device, config.chat_template
        )

    @cached_property
    def base(self) -> Base:
        """The base model and its tokenizer, loaded once."""
        model, tokenizer = load_chat_model(self.config.model, torch_dtype(self.config.dtype))
        return model.to(self.device).eval(), tokenizer  # type: ignore[arg-type]

    def alone(self, work: Callable[[], object]) -> dict[str, Any]:
        """Minutes of work that rank 0 does while the others wait."""
        if self.ranks.is_main:
            work()
        self.ranks.wait()
        return {}

    def require_held_out(self) -> None:
        """Refuse validation prompts that are sampled from."""
        held_out = {row["prompt"]: row["id"] for row in self.validator.rows}
        for i, it in enumerate(self.config.iterations):
            if it.trees is None:
                shared = [row["id"] for row in self.prompts(i) if row["prompt"] in held_out]
                if shared:
                    raise ValueError(
                        f"{len(shared)} prompts of iteration {i} are validation prompts too ({shared[:3]}): validate "
                        "on others, or give a limit or skip_prompts"
                    )

    def iteration(self, i: int, earlier: Sequence[Iterated], reference: Measurement) -> Iterated:
        """Iteration i, whatever of it has not been done."""
        before = earlier[-1] if earlier else None
        stages = {"collect": self.collect(i, before)}
        stages["label"] = self.label(i, stages["collect"])
        mixed = [*(it.stages for it in earlier[max(0, i - self.config.iterations[i].mix) :]), stages]
        if self.config.target_kl is not None:
            return _Search(self, i, mixed, before, reference, self.config.target_kl).found()
        zeta, beta = self.config.zeta_of(i), self.config.beta_of(i)
        stages["train"] = self.train(i, mixed, before, zeta)
        policy = self.policy(i, beta, stages["train"])
        stages["validate"], measured = self.measure(f"iteration-{i}", policy, [stages["train"]], reference)
        return Iterated(zeta, beta, policy, stages, measured, [])

    def prompts(self, i: int) -> list[dict[str, Any]]:
        """The prompt rows that iteration i samples from."""
        limit, skip = self.config.collect_config(i, "", None).limit, self.config.iterations[i].skip_prompts
        return read_prompts(self.config.prompts, limit, skip)

    def collect(self, i: int, before: Iterated | None) -> Stage:
        """GET_DATA: trees of the policy that the previous value function guides; of the reference in iteration 0."""
        given, name = self.config.iterations[i], f"iteration-{i}/trees"
        policy, after = (None, []) if before is None else (before.policy, [before.stages["train"]])
        if (trees := given.trees) is not None:
            # What they rest on is checked, not recorded: the same trees do for any run of the same policy.
            return self.log.run(name, {"trees": trees}, [], lambda: self.given_trees(trees, policy))
        folder = self.folder / name
        path = folder.parent / "prompts.jsonl" if given.skip_prompts else Path(self.config.prompts)
        config = self.config.collect_config(i, str(folder), policy, str(path))

        def sample() -> dict[str, Any]:
            if given.skip_prompts and self.ranks.is_main:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json_lines(path, self.prompts(i))
            self.ranks.wait()
            return _count(collect(config, *self.base))

        settings = {k: v for k, v in asdict(config).items() if k not in ("store", "device", "prompts", "policy")}
        settings |= {"prompts": self.config.prompts, "skip_prompts": given.skip_prompts}
        settings |= {"base": self.base_origin, "prompts_read": digest(self.prompts(i))}
        settings["policy"] = policy and policy.settings
        return self.log.run(name, settings, after, sample)

    def given_trees(self, trees: str, policy: PolicyConfig | None) -> dict[str, Any]:
        """Existing trees, if they are of this policy."""
        model, tokenizer = self.base
        store = TreeStore.open(trees, tokenizer_fingerprint(tokenizer))
        wanted = json.loads(json.dumps(describe(load_policy(policy, model, tokenizer))))
        if store.metadata.policy != wanted:
            raise ValueError(
                f"{trees} was sampled under the policy {store.metadata.policy}, but this iteration's is {wanted}: "
                "remove `trees` to collect anew, or change the settings of the iteration before."
            )
        return {"existing": trees} | _count(store)

    def label(self, i: int, collected: Stage) -> Stage:
        """Rewards of all leaves, for objectives that have none yet."""
        rewards = {objective: self.config.rewards[objective] for objective in self.config.objectives}

        def work() -> dict[str, Any]:
            label(LabelConfig(str(collected.path), rewards), tokenizer=self.base[1], load=self.validator.load)
            return {"existing": str(collected.path)}

        digests = {objective: reward_digest(spec) for objective, spec in rewards.items()}
        return self.log.run(f"iteration-{i}/rewards", {"rewards": rewards, "of": digests}, [collected], work)

    def train(
        self, i: int, mixed: Sequence[dict[str, Stage]], before: Iterated | None, zeta: float, trial: str = ""
    ) -> Stage:
        """V^i, from V^(i-1) on unless `initial` says otherwise."""
        given, name = self.config.iterations[i].value_function, f"iteration-{i}/{trial}value"
        if given is not None:
            return self.log.run(name, {"value_function": given}, [], lambda: {"existing": given})
        stores = [str(stages["collect"].path) for stages in mixed]
        states = [self.states(i - len(mixed) + 1 + n, stages["collect"]) for n, stages in enumerate(mixed)]
        initial = None if before is None else str(before.stages["train"].path)
        config = self.config.train_config(i, stores, states, str(self.folder / name), initial, zeta)
        after = [stages["label"] for stages in mixed] + ([before.stages["train"]] if before else [])
        settings = {k: v for k, v in asdict(config).items() if k not in _PLACES}
        settings |= {"kind": self.config.kind, "from": "previous" if config.initial == initial else config.initial}
        settings["base"] = self.base_origin
        if isinstance(config, TrainModelConfig) and config.backbone != self.config.model:
            settings["backbone_is"] = model_origin(config.backbone)

        def work() -> dict[str, Any]:
            if isinstance(config, TrainHeadConfig):
                train_head(config, self.base[0])
            else:
                train_model(config)
            return {}

        return self.log.run(name, settings, after, work)

    def states(self, i: int, collected: Stage) -> str:
        """Where the hidden states of iteration i's trees lie, or will."""
        given = self.config.iterations[i]
        run = self.folder if given.trees is not None else collected.run
        return given.states or str(run / f"iteration-{i}" / "states")

    def policy(self, i: int, beta: float, trained: Stage) -> PolicyConfig:
        """MAVIS(pi_ref, V^i, k, beta)."""
        functions = dict.fromkeys(self.config.objectives, str(trained.path))
        return PolicyConfig(functions, self.config.policy_settings(i, beta))

    def measure(
        self, place: str, policy: PolicyConfig | None, after: Sequence[Stage], reference: Measurement | None
    ) -> tuple[Stage, Measurement]:
        """A policy on the validation prompts; its files lie in the folder `place` of the run."""
        settings = self.validator.settings() | {"policy": policy and policy.settings, "base": self.base_origin}

        def work() -> None:
            self.validator.measure(self.folder / place, policy, reference)

        stage = self.log.run(str(Path(place, RESULT_FILE)), settings, after, lambda: self.alone(work))
        return stage, self.validator.read(stage.path.parent)


@dataclass
class _Search:
    """One iteration of the target-KL schedule (section 3.3): zeta at the beta that its trees have, then beta.

    Every trial is a stage of its own, so that a killed search goes on where it stood.
    """

    run: _Run
    i: int
    mixed: Sequence[dict[str, Stage]]
    before: Iterated | None
    reference: Measurement
    target: TargetKl

    def __post_init__(self) -> None:
        self.tried: list[dict[str, Any]] = []

    def found(self) -> Iterated:
        """The iteration at the zeta and beta that were found."""
        run, i, log = self.run, self.i, self.run.log
        zeta = 0.0 if self.before is None else find_zeta(self.with_zeta, self.target)
        if self.before is None:
            trained = run.train(i, self.mixed, None, zeta)
        else:
            best = self.train(zeta)
            place = run.folder / f"iteration-{i}" / "value"
            copy = partial(_copy, best.path, place)
            trained = log.run(f"iteration-{i}/value", {"zeta": zeta}, [best], lambda: run.alone(copy))
        last = i + 1 == len(run.config.iterations)
        lowest = self.before.beta if self.before else self.target.betas[0]
        betas = [lowest, *(beta for beta in self.target.betas if beta > lowest)]
        beta = raise_beta(lambda b: self.with_beta(trained, b)[1], betas, self.target, may_exceed=not last)
        policy = run.policy(i, beta, trained)
        chosen, measured = self.with_beta(trained, beta)
        keep = partial(_copy_files, chosen.path.parent, run.folder / f"iteration-{i}")
        validated = log.run(f"iteration-{i}/{RESULT_FILE}", {"beta": beta}, [chosen], lambda: run.alone(keep))
        stages = self.mixed[-1] | {"train": trained, "validate": validated}
        return Iterated(zeta, beta, policy, stages, measured, self.tried)

    def train(self, zeta: float) -> Stage:
        """V^i with this zeta."""
        return self.run.train(self.i, self.mixed, self.before, zeta, f"zeta-{zeta:g}/")

    def with_zeta(self, zeta: float) -> Measurement:
        """The policy at the beta of the trees, with a value function trained at this zeta."""
        assert self.before is not None
        trained = self.train(zeta)
        policy = self.run.policy(self.i, self.before.beta, trained)
        place = f"iteration-{self.i}/zeta-{zeta:g}"
        measured = self.run.measure(place, policy, [trained], self.reference)[1]
        kept = not improves(self.before.measured, measured, self.target.tolerance)
        self.note(measured, beta=self.before.beta, zeta=zeta, reward_kept=kept)
        return measured

    def with_beta(self, trained: Stage, beta: float) -> tuple[Stage, Measurement]:
        """The policy of V^i at this beta."""
        policy = self.run.policy(self.i, beta, trained)
        place = f"iteration-{self.i}/beta-{beta:g}"
        stage, measured = self.run.measure(place, policy, [trained], self.reference)
        self.note(measured, beta=beta)
        return stage, measured

    def note(self, measured: Measurement, **setting: Any) -> None:
        """Keep what was tried, once."""
        row = setting | {"reward": float(measured.rewards.mean()), "kl": measured.kl}
        if row not in self.tried:
            self.tried.append(row)


def _count(store: TreeStore) -> dict[str, Any]:
    """Trees and new tokens of a store."""
    lengths = [len(tree.tokens) for tree in store]
    return {"trees": len(lengths), "tokens": sum(lengths)}


def _copy(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all."""
    unfinished = target.with_name(target.name + ".tmp")
    for leftover in (unfinished, target):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, unfinished)
    unfinished.rename(target)


def _copy_files(source: Path, target: Path) -> None:
    """Copy the JSON files of a folder, each whole or not at all."""
    for path in source.glob("*.json"):
        with replace_when_whole(target / path.name) as temporary:
            shutil.copy(path, temporary)
