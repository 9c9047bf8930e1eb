"""The stages of a fit. Killed at any instant, a rerun goes on where it stood; what was collected is kept.

fit.json            settings, time spent, what was planned and chosen
work/               prompts, trees, hidden states, the value function in training, trials, completions
bundle/             the value function with its settings and card
report.html         what came of it
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.models import load_chat_model

from ..base.files import read_json, write_json, write_json_lines
from ..base.kept import model_origin, require_same
from ..base.prompts import prompt_id, read_prompts
from ..base.ranks import join
from ..base.settings import torch_dtype
from ..calibrate import strength
from ..collect import collect
from ..evaluate import EvaluateConfig, evaluate
from ..label import LabelConfig, label, sameness
from ..measure.schedule import Measurement
from ..measure.validation import ValidationConfig, Validator
from ..pairs import Pair, pairs_digest, pairs_store, read_pairs
from ..rewards.load import reward_digest
from ..sampling.config import CollectConfig, PolicyConfig
from ..trees.tree_store import TreeStore
from .config import FitConfig, seconds, told
from .plan import TREES_SHARE, Split, answers_within, split, trees_within
from .report import judged, write_report
from .tune import GRIDS, STRENGTHS, Trial, choose
from .values import Values

STATE = "fit.json"
_FIRST = 8  # trees from which the time of one is told
_ROUNDS = 6  # in which the others are collected, with a look at the clock between them
_PLACES = ("output", "device", "fresh", "budget")
_TOP_P, _TEMPERATURE = 1.0, 0.7


def fit(
    config: FitConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Make a bundle as `config` says, and return what `fit.json` holds.

    Args:
        config: what to make.
        model: the model that is to be steered, if it is loaded already (then `tokenizer` too).
        tokenizer: its tokenizer.
        say: is told what happens, a line at a time.

    Raises:
        ValueError: too few prompts or some that are held out too, a reward that is constant, depends on the prompt
            alone or fails, a budget too small, or `output` of another run. What was collected is kept.
        OSError: a file that cannot be read or written.
    """
    return _Run(config, model, tokenizer, say).run()


class _Run:
    def __init__(
        self,
        config: FitConfig,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        say: Callable[[str], object],
    ) -> None:
        self.config, self.say = config, say
        self.folder = Path(config.output)
        self.work = self.folder / "work"
        self.values = Values(config, self.work)
        self.device = str(join(config.device).device)
        if model is not None and tokenizer is not None:
            self.base = model.to(self.device).eval(), tokenizer  # type: ignore[arg-type]
        self.started = time.monotonic()
        self.pairs: list[Pair] = []
        if config.pairs is not None:
            self.pairs, self.left_out = read_pairs(config.pairs)
            rows = [_row(pair) for pair in self.pairs]
        else:
            assert config.prompts is not None
            rows = read_prompts(config.prompts)
        held_out = None if config.held_out is None else read_prompts(config.held_out)
        self.split: Split = split(rows, held_out, config.seed)
        self.state: dict[str, Any] = {}

    @cached_property
    def base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model that is to be steered, and its tokenizer."""
        model, tokenizer = load_chat_model(self.config.model, torch_dtype(self.config.dtype))
        return model.to(self.device).eval(), tokenizer  # type: ignore[arg-type]

    @property
    def spent(self) -> float:
        """Seconds, those of interrupted runs included."""
        return float(self.state.get("spent_before", 0.0)) + time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds of the budget that are left; below 0 if it is used up."""
        return seconds(self.config.budget) - self.spent

    def run(self) -> dict[str, Any]:
        config = self.config
        self._begin()
        model, tokenizer = self.base
        self.temperature = config.temperature or _asked(model, "temperature") or _TEMPERATURE
        self.top_p = config.top_p or _asked(model, "top_p") or _TOP_P
        for spec in config.measured.values():  # what is wrong with one is found before anything is sampled
            self._validator.load(spec)
        self._tell_begin(tokenizer)
        store = self._collected() if config.pairs is None else self._paired()
        self._train(store)
        chosen, tried = self._chosen()
        chosen = self._in_units(chosen)
        results = self._measured(chosen)
        bundle = self.folder / "bundle"
        self.say(f"[6/6] Writing {bundle} and {self.folder / 'report.html'}.")
        self.values.bundle(bundle, chosen, self.temperature, self.work / "evaluation.json")
        self._keep(temperature=self.temperature, top_p=self.top_p, bundle=str(bundle), results=results)
        metrics = self.values.metrics()
        write_report(self.folder / "report.html", config, self.state, results, tried, metrics, self._answers())
        return self.state

    def _begin(self) -> None:
        path = self.folder / STATE
        origin = {k: v for k, v in asdict(self.config).items() if k not in _PLACES}
        origin |= {"rewards_are": {name: reward_digest(spec) for name, spec in self.config.rewards.items()}}
        origin |= {"model_is": model_origin(self.config.model), "ids": [row["id"] for row in self.split.trees]}
        if self.pairs:
            origin["pairs_are"] = pairs_digest(self.pairs)
        if path.exists() and self.config.fresh:
            shutil.rmtree(self.work, ignore_errors=True)
            shutil.rmtree(self.folder / "bundle", ignore_errors=True)
            path.unlink()
        if path.exists():
            self.state = read_json(path)
            require_same(f"{self.folder} holds a fit of other settings", self.state["origin"], origin, "output")
            self.say(f"Going on with what {self.folder} holds.")
        self.state |= {"origin": origin, "spent_before": self.state.get("spent", 0.0)}
        self.work.mkdir(parents=True, exist_ok=True)
        for name in ("trees", "choosing", "measuring"):
            write_json_lines(self.work / f"{name}.jsonl", getattr(self.split, name))
        self._keep()

    def _keep(self, **more: Any) -> None:
        self.state |= more | {"spent": self.spent}
        write_json(self.folder / STATE, self.state)

    def _tell_begin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        counts = len(self.split.trees), len(self.split.choosing), len(self.split.measuring)
        self.say(
            f"[1/6] {counts[0]} prompts to learn from, {counts[1]} to choose settings on, {counts[2]} to measure on; "
            f"{self.config.model} at temperature {self.temperature:g}, top-p {self.top_p:g}; "
            f"{told(seconds(self.config.budget))} in all."
        )
        if self.config.chat_template == "auto" and tokenizer.chat_template is None:
            self.say("      The tokenizer has no chat template: prompts are given to the model as raw text.")

    # Trees

    def _paired(self) -> TreeStore:
        """The pairs of answers to the prompts to learn from, as trees."""
        known = {row["id"] for row in self.split.trees}
        pairs = [pair for pair in self.pairs if _row(pair)["id"] in known][: self.config.trees]
        why = ", ".join(f"{count} ({reason})" for reason, count in self.left_out.items())
        self.say(f"[2/6] {len(pairs)} pairs of answers to learn from" + (f"; left out: {why}." if why else "."))
        self._keep(trees=len(pairs), collected=len(pairs))
        model, tokenizer = self.base
        return pairs_store(
            pairs, self.work / "trees", self.config.objective, model, tokenizer, 4 * self.config.max_new_tokens,
            self.config.chat_template,
        )  # fmt: skip

    def _collected(self) -> TreeStore:
        """Trees with rewards: a first few, from which the time of one is told, then as many as there is time for."""
        budget, prompts = seconds(self.config.budget), len(self.split.trees)
        if "collected" in self.state:
            return TreeStore.open(self.work / "trees")
        begun = self.spent
        store = self._grow(min(_FIRST, prompts))
        if "trees" not in self.state:
            self._require_something_to_learn(store)
            count = min(_FIRST, prompts)
            sampling, tuning = (self.spent - begun) / count, self.values.tuning_cost(store, self.base[0])
            cost = max(1e-3, sampling + tuning)
            wanted = trees_within(budget, self.spent, cost, prompts, self.config.trees)
            self._keep(trees=wanted, sampling_share=sampling / (sampling + tuning))
            ahead = max(0.0, (wanted - count) * cost)
            answers = np.mean([len(tree.leaves()) for tree in store])
            self.say(
                f"[2/6] Sampling {wanted} trees of about {answers:.0f} answers, {cost:.1f} seconds each"
                f"{' with the tuning' if tuning else ''}: about {told(ahead)}."
            )
        wanted = int(self.state["trees"])
        share = TREES_SHARE * self.state.get("sampling_share", 1.0)  # which fits from before policies do not have
        step = max(_FIRST, -(-wanted // _ROUNDS))
        for limit in [*range(step, wanted, step), wanted]:
            store = self._grow(limit)
            done = len(store.prompt_ids())
            if done < wanted and self.spent > share * budget and done >= _FIRST:
                self.say(f"      {done} trees have taken longer than was thought: going on with these.")
                break
        self._keep(collected=len(store.prompt_ids()))
        return store

    def _grow(self, limit: int) -> TreeStore:
        """The store with trees of the first `limit` prompts, labelled."""
        config = self.config
        sampling = CollectConfig(
            str(self.work / "trees.jsonl"), str(self.work / "trees"), config.model, limit, config.max_new_tokens,
            layers=3, root_children=4, children=2, temperature=self.temperature, top_p=self.top_p,
            chat_template=config.chat_template, dtype=config.dtype, device=config.device, seed=config.seed,
        )  # fmt: skip
        collect(sampling, *self.base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rewards that are all the same: told by `_require_something_to_learn`
            return label(
                LabelConfig(sampling.store, config.rewards, device=config.device),
                tokenizer=self.base[1],
                load=self._validator.load,
            )

    def _require_something_to_learn(self, store: TreeStore) -> None:
        """Raise `ValueError` for a reward that no choice of words changes."""
        for name in self.config.rewards:
            rewards = store.rewards(name)
            same = sameness(rewards)
            if same == "constant":
                values = np.concatenate(rewards)
                raise ValueError(
                    f"the reward {name!r} is {values[0]:g} for all of {len(values)} answers to {len(rewards)} prompts: "
                    "there is nothing to steer by. Check what the function looks at"
                )
            if same == "by prompt":
                raise ValueError(
                    f"the reward {name!r} is the same for all answers to one prompt, in all of {len(rewards)} prompts: "
                    "it depends on the prompt alone, and nothing that the model writes can change it"
                )

    # Values

    def _train(self, store: TreeStore) -> None:
        what = "a policy for each reward" if self.config.kind == "policy" else f"a value {self.config.kind}"
        self.say(f"[3/6] Training {what} on {len(store.prompt_ids())} trees.")
        self.values.train(store, self.base)
        for line in judged(self.config, self.values.metrics()):
            self.say(f"      {line}")
        self._keep()

    # Settings

    def _chosen(self) -> tuple[dict[str, Any], list[Trial]]:
        """The settings that are best at the divergence that is wanted, and all that were tried."""
        kl = None if self.config.kl == "best" else float(self.config.kl)
        aim = "most reward" if kl is None else f"about {kl:g} nats from the model"
        if "chosen" in self.state:
            return self.state["chosen"], [Trial(**trial) for trial in self.state["tried"]]
        self.say(f"[4/6] Choosing strength, cut and normalisation on {len(self.split.choosing)} prompts, for {aim}.")
        begun = self.spent
        plain = self._validated("plain", None, None)
        answers = len(self._validator.config.seeds) * len(self.split.choosing)
        if "answer_takes" not in self.state:  # of a run that was cut off: these may lie there already
            self._keep(answer_takes=(self.spent - begun) / answers)
        deadline = self.spent + 0.5 * max(0.0, self.left)

        def measure(settings: dict[str, Any]) -> Trial:
            found = {}
            for name in self.config.objectives:
                policy = PolicyConfig(self.values.source, {**settings, "weights": {name: 1.0}})
                found[name] = self._validated(_file_name(settings, name), policy, plain)
            kls = [one.kl for one in found.values()]
            gains = {name: float(found[by].summary[name]["gain_sd"] or 0.0) for name, by in self.config.shown}
            trial = Trial(settings, float(np.mean(kls)), gains)
            told_gains = ", ".join(f"{name} {gain:+.2f}" for name, gain in gains.items())
            self.say(f"      {_in_words(settings)}: {trial.kl:.1f} nats, {told_gains} standard deviations")
            return trial

        best, tried = choose(measure, GRIDS[self.config.kind], kl, lambda: self.spent < deadline)
        if kl is not None and not 0.5 * kl <= best.kl <= 1.5 * kl:
            self.say(f"      The nearest that was found to {kl:g} nats is {best.kl:.1f}.")
        betas = self._alike(best, plain)
        self._keep(chosen=best.settings, tried=[asdict(trial) for trial in tried], betas=betas)
        return best.settings, tried

    def _alike(self, best: Trial, plain: Measurement) -> list[float] | None:
        """The strength of each of several objectives at which all diverge as far as `best` does on average."""
        if len(self.config.objectives) < 2 or best.settings["normalize"] != "standard":
            return None

        def spent(beta: float, name: str) -> float:
            policy = PolicyConfig(self.values.source, {**best.settings, "beta": beta, "weights": {name: 1.0}})
            return self._validated(_file_name({**best.settings, "beta": beta}, name), policy, plain).kl

        tried = {
            name: strength(partial(spent, name=name), best.kl, best.settings["beta"]) for name in self.config.objectives
        }
        found = {name: one for name, one in tried.items() if one is not None}
        if len(found) < len(tried):  # one makes no difference: all stay in standard deviations
            return None
        told_betas = ", ".join(f"{name} {one.beta:g} ({one.kl:.1f} nats)" for name, one in found.items())
        self.say(f"      Units of value in which one strength does for all: {told_betas}.")
        return [one.beta for one in found.values()]

    def _in_units(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """The chosen settings with the one strength that does for all objectives, whose units go into the config."""
        betas = self.state.get("betas")
        if betas is None:
            return chosen
        return {**chosen, "beta": self.values.put_in_units(betas)}

    def _validated(self, name: str, policy: PolicyConfig | None, plain: Measurement | None) -> Measurement:
        return self._validator.measure(self.work / "trials" / name, policy, plain)

    @cached_property
    def _validator(self) -> Validator:
        on = ValidationConfig(
            str(self.work / "choosing.jsonl"),
            None,
            [0, 1],
            self.config.max_new_tokens,
            32,
            self.temperature,
            self.top_p,
        )
        measured = self.config.measured
        equal = dict.fromkeys(measured, 1 / len(measured))
        return Validator(on, measured, equal, lambda: self.base, self.device, self.config.chat_template)

    # Numbers

    def _measured(self, chosen: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, dict[str, Any]] = {"unsteered": {}}
        objectives = self.config.objectives
        for name in objectives:
            for end, factor in STRENGTHS.items():
                settings[name + end] = {**chosen, "beta": chosen["beta"] * factor, "weights": {name: 1.0}}
        if len(objectives) > 1:
            settings["all alike"] = {**chosen, "weights": dict.fromkeys(objectives, 1 / len(objectives))}
        count = len(self.split.measuring)
        if "seeds" not in self.state:
            self._keep(seeds=answers_within(self.left, len(settings) * count * self.state["answer_takes"]))
        seeds = int(self.state["seeds"])
        self.say(
            f"[5/6] Measuring on {count} prompts that nothing has been learned from or chosen on, {seeds} "
            f"{'answer' if seeds == 1 else 'answers'} each."
        )
        results = evaluate(
            EvaluateConfig(
                prompts=str(self.work / "measuring.jsonl"), output=str(self.work / "evaluation.json"),
                completions=str(self.work / "completions"), value_functions=self.values.source,
                rewards=self.config.measured, settings=settings,
                limit=None, seeds=list(range(seeds)), max_new_tokens=self.config.max_new_tokens,
                temperature=self.temperature, top_p=self.top_p, model=self.config.model,
                chat_template=self.config.chat_template, dtype=self.config.dtype, device=self.config.device,
            ),
            self.base,
        )  # fmt: skip
        self._keep()
        return results

    def _answers(self) -> list[dict[str, str]]:
        """Answers of the model left alone, and steered to each objective, to some prompts side by side."""
        found: dict[str, list[str]] = {}
        for name in ("unsteered", *self.config.objectives):
            found[name] = read_json(self.work / "completions" / f"{name}.json")["texts"]
        rows = self.split.measuring[:6]
        return [{"prompt": row["prompt"]} | {name: found[name][i] for name in found} for i, row in enumerate(rows)]


def _row(pair: Pair) -> dict[str, Any]:
    """A pair's prompt as a row of a file of prompts."""
    row = {"id": prompt_id(pair.prompt, pair.conversation), "prompt": pair.prompt}
    return row if pair.conversation is None else row | {"conversation": pair.conversation}


def _asked(model: PreTrainedModel, name: str) -> float | None:
    """What the model's own generation config asks for; None if nothing."""
    value = getattr(getattr(model, "generation_config", None), name, None)
    return float(value) if value not in (None, 1.0) else None


def _in_words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def _file_name(settings: dict[str, Any], objective: str) -> str:
    words = "-".join(f"{name}-{value}" for name, value in sorted(settings.items()))
    return f"{objective}-{words}"
