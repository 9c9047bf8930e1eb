"""Measure steering on held-out prompts: rewards and the KL divergence of equation 7, setting by setting."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.core.chat import ChatTemplate
from mavis_logits.models import DEFAULT_MODEL, load_chat_model

from .base.files import write_json
from .base.kept import digest, model_origin
from .base.made import made_here, made_in_words
from .base.prompts import encode_prompts, read_prompts
from .base.settings import check_sampling, torch_dtype
from .measure.completions import (
    Completions,
    Protocol,
    complete_all,
    completions_origin,
    read_completions,
    sampled_at,
    write_completions,
)
from .measure.judging import judge, perplexity
from .measure.settings import check_setting, steerings
from .measure.summary import Rewards, gains, reward_cell, summarise, taken, with_error
from .measure.win_rate import VERDICTS, Judge, JudgeSettings, judge_in_words, win_rate_cell
from .rewards.load import Reward, RewardSpec, describe_spec, load_reward, split_spec
from .sampling.reference import Reference, contexts, require_room

COMBINED = "combined"
_BY_REWARD = ", best by reward"


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure.

    Attributes:
        prompts: JSON-lines file with `id` and `prompt`, held out from training.
        output: JSON file of the results; a table of the same name ending in `.md` is written beside it.
        completions: folder in which completions and their rewards are kept, a file each for every setting; what is
            found there is not computed again. What was written under other settings, to other prompts or by other
            weights is refused.
        value_functions: Hub id or folder of the value functions: one, or by objective; None where all settings have
            their own, or objectives in words alone.
        rewards: the true rewards, by objective, as for `mavis label`.
        settings: by name, fields of `MavisConfig`, `value_functions` where they are not those above, and to decode by a
            strategy `strategy` with its own arguments; `objectives` are further ones in words, by name. What a setting
            does not say is as the value functions or their bundle recommend. An empty one is the base model left alone.
            Left out, that one, each reward's objective alone and, of several, all of them with equal weights. Where
            `num_return_sequences` is above 1, the first one returned is measured and, on a line of its own, the one of
            the highest combined reward.
        combined: weights by objective of a combined reward, which is measured too.
        contrasts: pairs of settings, the first of which is compared with the second, prompt by prompt.
        perplexity: measure that of the completions under the base model left alone: degenerate text shows there.
        judge: a language model that is asked, too, whether each answer is better than the unsteered one to the same
            prompt; None for none.
        limit: at most this many prompts.
        seeds: each prompt is answered once per seed.
        max_new_tokens: T.
        temperature, top_p: of the reference: what is sampled from where nothing steers, is tilted where something does,
            and what KL is taken against; the same for all settings.
        model: base model.
        chat_template: "auto" puts a prompt as one user turn of the tokenizer's chat template, or as raw text if it has
            none; "none" always as raw text.
        dtype: of its weights.
        batch_size: prompts side by side.
        device: where to run; None for a GPU if there is one.
        fresh: compute everything anew, in place of what the folder of completions holds.
    """

    prompts: str
    output: str
    completions: str
    value_functions: str | dict[str, str] | None = field(default=None, kw_only=True)
    rewards: dict[str, str | dict[str, Any]]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    combined: dict[str, float] | None = None
    contrasts: list[list[str]] = field(default_factory=list)
    perplexity: bool = False
    judge: JudgeSettings | None = field(default=None, kw_only=True)
    limit: int | None = 100
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_new_tokens: int = 48
    temperature: float = field(default=1.0, kw_only=True)
    top_p: float = field(default=1.0, kw_only=True)
    model: str = DEFAULT_MODEL
    chat_template: ChatTemplate = "auto"
    dtype: str = "float32"
    batch_size: int = 50
    device: str | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        if not self.settings:
            object.__setattr__(self, "settings", default_settings(list(self.rewards)))
        for name, setting in self.settings.items():
            if not re.fullmatch(r"[\w .,=+-]+", name):
                raise ValueError(f"the setting's name {name!r} becomes a file name: use letters, digits and ' .,=+-_'")
            check_setting(setting)
        if not any(not setting for setting in self.settings.values()):
            raise ValueError("settings need an empty one, the base model left alone, to compare with")
        check_sampling(self.temperature, self.top_p)
        if not self.seeds or not self.rewards:
            raise ValueError(f"seeds and rewards must not be empty, got {self.seeds} and {self.rewards}")
        for spec in self.rewards.values():
            split_spec(spec)
        unknown = set(self.combined or ()) - set(self.rewards)
        if unknown or COMBINED in self.rewards:
            raise ValueError(
                f"combined weighs {sorted(self.combined or ())}, but there are rewards for {sorted(self.rewards)}: "
                f"name only these, and none of them {COMBINED!r}"
            )
        names = {name + end for name in self.settings for end in ("", _BY_REWARD)}
        for pair in self.contrasts:
            if len(pair) != 2 or not names.issuperset(pair):
                raise ValueError(f"a contrast is a pair of settings among {sorted(names)}, got {pair}")


def default_settings(objectives: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The base model left alone, steered towards each objective and, if there are several, towards all of them."""
    steered = {name: {"weights": {name: 1.0}} for name in objectives}
    if len(objectives) > 1:
        steered["balanced"] = {"weights": dict.fromkeys(objectives, 1 / len(objectives))}
    return {"unsteered": {}} | steered


def evaluate(
    config: EvaluateConfig, loaded_base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
) -> dict[str, Any]:
    """Run every setting, score all completions, write the results and return them.

    Args:
        config: what to measure.
        loaded_base: the base model and its tokenizer, if they are loaded already.

    Raises:
        ValueError: an unknown objective or setting, or prompts that cannot be used, before anything is generated.
        OSError: a file that cannot be read.
    """
    rows = read_prompts(config.prompts, config.limit)
    loaded: dict[str, Reward] = {}

    def load(spec: RewardSpec) -> Reward:
        key = describe_spec(spec)
        if key not in loaded:
            loaded[key] = load_reward(spec, _device(config))
        return loaded[key]

    origins = _origins(config, rows)
    written = _kept(config, origins)
    if len(written) < len(origins):  # what is wrong with a reward, or a judge, is found now
        for spec in config.rewards.values():
            load(spec)
        if config.judge is not None:
            Judge(config.judge).require_there()
    base = (lambda: loaded_base) if loaded_base is not None else lru_cache(maxsize=None)(partial(_load_base, config))
    reused = list(written)
    written = _generate_all(config, rows, base, origins, written, load)
    if reused:
        tqdm.write(f"{config.completions}: taken as they are, under the same settings: {', '.join(reused)}")
    results: dict[str, Any] = {
        **made_here(),
        "config": asdict(config),
        "reference": next(iter(written.values())).reference,
        "prompts": len(rows),
        "settings": {},
    }
    scored = _scored(config, rows, written, load)
    alone, plain = scored[next(name for name, setting in config.settings.items() if not setting)]
    for name, (done, rewards) in scored.items():
        results["settings"][name] = summarise(done, rewards, plain, len(rows)) | {
            "setting": config.settings[name.removesuffix(_BY_REWARD)]
        }
        if config.judge is not None and done is not alone:
            path = Path(config.completions, f"{name}{VERDICTS}")
            asked = rows * len(config.seeds), done.texts, alone.texts
            results["settings"][name]["win_rate"] = Judge(config.judge).win_rate(path, *asked, len(rows))
    if config.perplexity:
        prompts = encode_prompts(rows, base()[1], 10**6, config.chat_template)
        for name, done in written.items():
            path = _paths(config)[name].with_suffix(".likelihood.json")
            value = perplexity(path, done, prompts, base, config.batch_size, origins[name])
            results["settings"][name]["perplexity"] = value
    results["contrasts"] = [
        {"setting": a, "against": b} | gains(scored[a][1], scored[b][1], plain, len(rows)) for a, b in config.contrasts
    ]
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, results)
    output.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    return results


def _scored(
    config: EvaluateConfig,
    rows: list[dict[str, Any]],
    written: dict[str, Completions],
    load: Callable[[RewardSpec], Reward],
) -> dict[str, tuple[Completions, Rewards]]:
    """The completions of every setting with their rewards; of several a prompt the first, and that of most reward."""
    scored: dict[str, tuple[Completions, Rewards]] = {}
    judged: dict[str, Path] = {}
    for name, done in written.items():
        path = _paths(config)[name].with_suffix(".rewards.json")
        twin = judged.setdefault(digest(done.texts), path)
        if not path.exists() and twin.exists():  # the same texts under another name
            shutil.copyfile(twin, path)
        rewards = judge(path, done, rows * len(config.seeds), config.rewards, load)
        if config.combined is not None:
            rewards[COMBINED] = sum(weight * rewards[m] for m, weight in config.combined.items())  # type: ignore[assignment]
        scored[name] = taken(done, rewards, np.zeros(len(done.prompt_ids), dtype=int))
        if config.combined is not None and done.returned > 1:
            best = rewards[COMBINED].reshape(-1, done.returned).argmax(axis=1)
            scored[name + _BY_REWARD] = taken(done, rewards, best)
    return scored


def _paths(config: EvaluateConfig) -> dict[str, Path]:
    """The file of each setting's completions."""
    return {name: Path(config.completions) / f"{name}.json" for name in config.settings}


def _load_base(config: EvaluateConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_chat_model(config.model, torch_dtype(config.dtype))
    model.to(_device(config))  # type: ignore[arg-type]
    return model, tokenizer


def _device(config: EvaluateConfig) -> str:
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _generate_all(
    config: EvaluateConfig,
    rows: list[dict[str, Any]],
    base: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    origins: Mapping[str, dict[str, Any]],
    kept: Mapping[str, Completions],
    load: Callable[[RewardSpec], Reward],
) -> dict[str, Completions]:
    """Completions of every setting: those kept, and the others."""
    Path(config.completions).mkdir(parents=True, exist_ok=True)
    paths = _paths(config)
    todo = {name: setting for name, setting in config.settings.items() if name not in kept}
    if todo:
        model, tokenizer = base()
        prompts = encode_prompts(rows, tokenizer, 10**6, config.chat_template)
        reference = Reference.of(model, tokenizer, config.temperature, config.top_p)
        if notice := reference.notice(config.model):
            tqdm.write(notice)
        require_room(rows, prompts, config.max_new_tokens, contexts(model))
        steering = steerings(todo, config.value_functions, model, tokenizer, reference.is_plain)
        for steered in steering.values():
            require_room(rows, prompts, config.max_new_tokens, contexts(model, steered))
        protocol = Protocol(
            config.seeds, config.max_new_tokens, config.batch_size, config.temperature, config.top_p,
            config.chat_template,
        )  # fmt: skip
        total = len(todo) * len(config.seeds) * len(prompts)
        with tqdm(total=total, desc="evaluate", unit="prompt") as progress:
            there = dict(kept)
            for name, setting in todo.items():
                progress.set_postfix_str(name)
                same = next((done for other, done in there.items() if origins[other] == origins[name]), None)
                if same is not None:  # under another name: it would write the same texts
                    there[name] = same
                    progress.update(len(config.seeds) * len(prompts))
                else:
                    there[name] = complete_all(
                        model, tokenizer, rows, protocol, steering[name], setting, progress.update, load
                    )
                for beside in (".rewards.json", ".likelihood.json", VERDICTS):
                    paths[name].with_suffix(beside).unlink(missing_ok=True)
                write_completions(paths[name], origins[name], there[name])
    return {name: read_completions(path, origins[name]) for name, path in paths.items()}


def _origins(config: EvaluateConfig, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By setting, everything that shapes its completions."""
    shared = {
        name: getattr(config, name) for name in ("seeds", "max_new_tokens", "batch_size", "dtype", "chat_template")
    }
    shared |= sampled_at(config.temperature, config.top_p)
    shared["model"] = model_origin(config.model)
    return {
        name: completions_origin(setting, rows, config.value_functions, **shared)
        for name, setting in config.settings.items()
    }


def _kept(config: EvaluateConfig, origins: Mapping[str, dict[str, Any]]) -> dict[str, Completions]:
    """Completions that an earlier run kept. Raises `ValueError` for some of another origin, before any work."""
    paths = {} if config.fresh else _paths(config)
    return {name: read_completions(path, origins[name]) for name, path in paths.items() if path.exists()}


def markdown(results: Mapping[str, Any]) -> str:
    """The results as Markdown: a table of the settings and, if there are any, one of the contrasts."""
    config = results["config"]
    objectives = [*config["rewards"], *([COMBINED] if config["combined"] is not None else [])]
    rows = []
    for name, row in results["settings"].items():
        rewards = [reward_cell(row[o]) for o in objectives]
        kl = "n/a" if row["kl"] is None else with_error(row["kl"], row["kl_error"], ".1f")
        rows.append([name, *rewards, kl, f"{row['tokens']:.0f}", f"{row['distinct_2']:.2f}"])
        if config.get("perplexity"):
            rows[-1].append(f"{row['perplexity']:.1f}" if "perplexity" in row else "")
        if config.get("judge"):
            rows[-1].append(win_rate_cell(row.get("win_rate")))
    head = ["setting", *(f"{o} (gain in sd)" for o in objectives), "KL (nats)", "tokens", "distinct-2"]
    head += ["perplexity"] if config.get("perplexity") else []
    lines = _table([*head, *(["preferred"] if config.get("judge") else [])], rows)
    if results["contrasts"]:
        differences = [
            [
                c["setting"],
                c["against"],
                *(with_error(c[o]["gain_sd"], c[o]["gain_sd_error"], "+.2f") for o in objectives),
            ]
            for c in results["contrasts"]
        ]
        lines += ["", *_table(["setting", "against", *(f"{o} (sd)" for o in objectives)], differences)]
    combined = " + ".join(f"{weight:g} {name}" for name, weight in (config["combined"] or {}).items())
    cooler = config.get("temperature", 1.0), config.get("top_p", 1.0)
    note = (
        f"{results['prompts']} held-out prompts, seeds {config['seeds']}, {config['max_new_tokens']} tokens at most, "
        + (f"temperature {cooler[0]:g}, top-p {cooler[1]:g}, " if cooler != (1.0, 1.0) else "")
        + f"base model in {config['dtype']}; means ± standard errors over prompts; KL by equation 7, "
        + ("against the full vocabulary. " if cooler == (1.0, 1.0) else "against the model at these. ")
        + (f"Combined: {combined}. " if combined else "")
        + (judge_in_words(config["judge"]) if config.get("judge") else "")
        + made_in_words(results)
    )
    return "\n".join([*lines, "", note, ""])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
