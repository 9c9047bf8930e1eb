"""The dry run of `mavis iterate`: a miniature of every iteration, each on the value function of the one before.

Stages that are finished already cost nothing; an unfinished search of the target-KL schedule counts as a whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..base.prompts import read_prompts
from ..fitting.head_config import TrainHeadConfig
from ..iterate import STATE_FILE
from ..iteration.config import IterateConfig
from ..iteration.stages import finished_stages
from ..label import LabelConfig
from ..measure.validation import RESULT_FILE, Validator
from ..sampling.config import PolicyConfig
from ..trees.tree_store import TreeStore
from .calibrate import HEAD_TREES, TREES, Calibration, Counts, Sample, spread
from .estimate import Estimate, dry_run, estimate, scale, states_estimate, train_estimate

__all__ = ["dry_run"]

T = TypeVar("T")
# Prompts of the validation's short run, at most.
_PROMPTS = 16
# What differs from iteration to iteration without any effect on its cost.
_FREE = {"seed", "iteration", "zeta", "initial", "policy", "store", "output", "states", "prompts", "limit", "beta"}


@dataclass(frozen=True)
class _Trees:
    """An iteration's trees: how many and how large they will be, and a small labelled store of such trees."""

    counts: Counts
    small: TreeStore


class _Plan:
    """Estimates of all iterations, in order. Early stopping may end a run sooner."""

    def __init__(self, config: IterateConfig, calibration: Calibration) -> None:
        self.config, self.calibration = config, calibration
        self.rewards = {objective: config.rewards[objective] for objective in config.objectives}
        self.device = str(calibration.base[0].device)
        self.estimates: list[Estimate] = []
        self._finished = finished_stages(Path(config.output) / STATE_FILE)
        self._done: dict[str, Any] = {}

    def run(self) -> list[Estimate]:
        """Go through the iterations."""
        self.validate("", None, 1)
        trees: list[_Trees] = []
        value: str | None = None
        for i in range(len(self.config.iterations)):
            trees.append(self.trees(i, None if value is None else self.policy(i - 1, value)))
            mixed = trees[max(0, i - self.config.iterations[i].mix) :]
            value = self.train(i, mixed, value)
            self.validate(f"iteration-{i}", self.policy(i, value), self.validations(i))
        return self.estimates

    def add(self, stage: str, step: Estimate) -> None:
        """A step of a stage of the run, which is none where the stage is finished."""
        done = stage in self._finished
        self.estimates.append(Estimate(step.what, 0, step.unit, 0.0, 0.0) if done else step)

    def trees(self, i: int, policy: PolicyConfig | None) -> _Trees:
        """Collect and label."""
        given = self.config.iterations[i].trees
        if given is not None:
            store, labels = (
                TreeStore.open(given),
                estimate(LabelConfig(given, self.rewards, device=self.device), self.calibration),
            )
            every = list(store)
            small = self.calibration.copy(store.metadata, [(tree, None) for tree in spread(every, TREES)], [])
            self.calibration.label(small, self.rewards, None, self.device)
            for e in labels:
                self.add(f"iteration-{i}/rewards", replace(e, what=f"iteration {i}: {e.what}"))
            return _Trees(Counts.of(every), small)
        config = self.config.collect_config(i, "", policy)
        skip = self.config.iterations[i].skip_prompts
        rows = read_prompts(self.config.prompts, config.limit, skip)
        sample, small = self.once(
            ("collect", policy is None, _costly(asdict(config)), policy and _costly(policy.settings)),
            lambda: self.calibration.collect(config, rows),
        )
        counts = Counts.of(list(small)).for_trees(len(rows))
        self.add(f"iteration-{i}/trees", scale(f"iteration {i}: collect", "trees", len(rows), sample, counts.tokens))
        samples = self.once(
            ("label", small.folder), lambda: self.calibration.label(small, self.rewards, None, self.device)
        )
        for objective, labelled in samples.items():
            step = scale(f"iteration {i}: label {objective}", "completions", counts.leaves, labelled)
            self.add(f"iteration-{i}/rewards", step)
        return _Trees(counts, small)

    def train(self, i: int, mixed: list[_Trees], before: str | None) -> str:
        """Train, as often as a target-KL schedule may; returns where a value function of that kind lies."""
        given, small = self.config.iterations[i], mixed[-1].small
        if given.value_function is not None:
            return given.value_function
        stage, counts = f"iteration-{i}/value", mixed[0].counts
        for other in mixed[1:]:
            counts += other.counts
        if self.config.kind == "head":
            small = self.once(("many", small.folder), lambda: self.many(small))
        config = self.config.train_config(i, [str(small.folder)], None, "", before, self.config.zeta_of(i))
        key = ("train", before is None, _costly(asdict(config)), small.folder)
        per_tree = Counts.of(list(small))
        if isinstance(config, TrainHeadConfig):
            states, sample, output = self.once(key, lambda: self.calibration.train_head(config, small))
            if given.states is None:
                what = f"iteration {i}: hidden states"
                self.add(stage, states_estimate(mixed[-1].counts, per_tree, states, what))
        else:
            sample, output = self.once(key, lambda: self.calibration.train_model(config, small))
        trained = train_estimate(config, counts, per_tree, sample, f"iteration {i}: train")
        self.add(stage, _times(trained, self.trials(i)))
        return str(output)

    def many(self, small: TreeStore) -> TreeStore:
        """The trees of a small store under several names, as many as it takes to time a head's epochs."""
        objectives, labelled = self.config.objectives, list(small.labelled(self.config.objectives))
        copies = -(-HEAD_TREES // len(labelled))
        renamed = [
            (replace(tree, prompt_id=f"{tree.prompt_id}/{n}", prompt=f"{tree.prompt} {n}"), rewards)
            for n in range(copies)
            for tree, rewards in labelled
        ]
        return self.calibration.copy(small.metadata, renamed[:HEAD_TREES], objectives)

    def validate(self, place: str, policy: PolicyConfig | None, times: int) -> None:
        """Measure a policy on the validation prompts, so many times; `place` is its folder in the run."""
        config = self.config.validation
        rows = read_prompts(config.prompts, config.limit)

        def work() -> Sample:
            few = spread(rows, min(config.batch_size, _PROMPTS))
            prompts = self.calibration.place()
            prompts.write_text("\n".join(map(json.dumps, few)), encoding="utf-8")
            validator = Validator(
                replace(config, prompts=str(prompts), limit=None, seeds=[0]), self.config.rewards,
                self.config.weights(), lambda: self.calibration.base, self.device, self.config.chat_template,
            )  # fmt: skip
            return self.calibration.measure(len(few), lambda folder: validator.measure(folder, policy))

        sample = self.once(("validate", policy and (policy.value_functions, _costly(policy.settings))), work)
        count = len(rows) * len(config.seeds)
        step = scale(f"{place.replace('-', ' ') or 'reference'}: validate", "completions", count, sample)
        self.add(str(Path(place, RESULT_FILE)), _times(step, times))

    def policy(self, i: int, value: str) -> PolicyConfig:
        """The policy that V^i guides, with a stand-in for V^i."""
        functions = dict.fromkeys(self.config.objectives, value)
        return PolicyConfig(functions, self.config.policy_settings(i, self.config.beta_of(i)))

    def trials(self, i: int) -> int:
        """Value functions that are trained in iteration i, at most: a target-KL schedule halves its grid of zetas."""
        target = self.config.target_kl
        return 1 if target is None or i == 0 else math.ceil(math.log2(len(target.zetas) + 1)) + 1

    def validations(self, i: int) -> int:
        """Policies that are measured in iteration i, at most."""
        target = self.config.target_kl
        return 1 if target is None else len(target.betas) + (self.trials(i) if i else 0)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """`make()`, once for iterations that cost the same."""
        if repr(key) not in self._done:
            self._done[repr(key)] = make()
        return self._done[repr(key)]  # type: ignore[no-any-return]


@estimate.register
def _(config: IterateConfig, calibration: Calibration) -> list[Estimate]:
    return _Plan(config, calibration).run()


def _times(estimate: Estimate, count: int) -> Estimate:
    """The same step, done so many times."""
    return Estimate(
        estimate.what, estimate.amount * count, estimate.unit, estimate.seconds * count, estimate.bytes * count,
        estimate.tokens * count,
    )  # fmt: skip


def _costly(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an iteration's cost depends on."""
    return {name: value for name, value in settings.items() if name not in _FREE}
