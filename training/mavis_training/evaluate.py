"""Measure steering on held-out prompts: rewards and the KL divergence of equation 7, setting by setting."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits import MavisConfig, MavisLogitsProcessor
from mavis_logits.demo.smollm2 import load_chat_model

from .collect import encode_prompts, eos_token_ids, read_prompts
from .files import read_json, write_json
from .rewards import Reward, compute_rewards, load_reward


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure.

    Attributes:
        prompts: JSON-lines file with `id` and `prompt`, held out from training.
        output: JSON file of the results; a table of the same name ending in `.md` is written beside it.
        completions: folder in which completions are kept, one file a setting; settings found there are not run again.
        value_functions: Hub id or folder of the value functions: one, or by objective.
        rewards: the true rewards, by objective: folder, Hub id or `module:function`.
        settings: by name, fields of `MavisConfig`; an empty one is the base model left alone.
        limit: at most this many prompts.
        seeds: each prompt is answered once per seed.
        max_new_tokens: T.
        model: base model.
        dtype: of its weights.
        batch_size: prompts side by side.
        device: where to run; None for a GPU if there is one.
    """

    prompts: str
    output: str
    completions: str
    value_functions: str | dict[str, str]
    rewards: dict[str, str]
    settings: dict[str, dict[str, Any]] = field(default_factory=lambda: {"unsteered": {}})
    limit: int | None = 100
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_new_tokens: int = 48
    model: str = "smollm2"
    dtype: str = "float32"
    batch_size: int = 50
    device: str | None = None

    def __post_init__(self) -> None:
        for name, setting in self.settings.items():
            if not re.fullmatch(r"[\w .,=+-]+", name):
                raise ValueError(f"the setting's name {name!r} becomes a file name: use letters, digits and ' .,=+-_'")
            MavisConfig.from_dict(setting)
        if not any(not setting for setting in self.settings.values()):
            raise ValueError("settings need an empty one, the base model left alone, to compare with")
        if not self.seeds or not self.rewards:
            raise ValueError(f"seeds and rewards must not be empty, got {self.seeds} and {self.rewards}")


@dataclass
class Completions:
    """What one setting wrote: S seeds x P prompts, row by row, seed after seed."""

    prompt_ids: list[str]
    texts: list[str]
    lengths: list[int]
    log_ratios: list[float]  # log pi / pi_ref of the whole completion, nats


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run every setting, score all completions, write the results and return them.

    Raises:
        ValueError: an unknown objective or setting, or prompts that cannot be used, before anything is generated.
        OSError: a file that cannot be read.
    """
    rows = read_prompts(config.prompts, config.limit)
    judges = {objective: load_reward(spec) for objective, spec in config.rewards.items()}
    written = _generate_all(config, rows)
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "mavis-logits")},
        "config": asdict(config),
        "prompts": len(rows),
        "settings": {},
    }
    rewards = {name: _score(judges, rows * len(config.seeds), done.texts) for name, done in written.items()}
    plain = next(name for name, setting in config.settings.items() if not setting)
    for name, done in written.items():
        results["settings"][name] = summarise(done, rewards[name], rewards[plain], len(rows)) | {
            "setting": config.settings[name]
        }
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, results)
    output.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    return results


def _generate_all(config: EvaluateConfig, rows: list[dict[str, Any]]) -> dict[str, Completions]:
    folder = Path(config.completions)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.json" for name in config.settings}
    todo = [name for name, path in paths.items() if not path.exists()]
    if todo:
        model, tokenizer = load_chat_model(config.model, getattr(torch, config.dtype))
        model.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        prompts = encode_prompts(rows, tokenizer, 10**6)
        mavis = MavisLogitsProcessor.from_pretrained(
            config.value_functions, model=model, tokenizer=tokenizer, trace=True
        )
        for name in todo:  # weights of unknown objectives are found now
            mavis.weights = MavisConfig.from_dict(config.settings[name]).weights
        total = len(todo) * len(config.seeds) * len(prompts)
        with tqdm(total=total, desc="evaluate", unit="completion") as progress:
            for name in todo:
                progress.set_postfix_str(name)
                done = Completions([row["id"] for row in rows] * len(config.seeds), [], [], [])
                for seed in config.seeds:
                    for start in range(0, len(prompts), config.batch_size):
                        chunk = prompts[start : start + config.batch_size]
                        torch.manual_seed(1_000_003 * seed + start)
                        steer = apply(mavis, config.settings[name]) if config.settings[name] else None
                        _complete(model, tokenizer, chunk, config.max_new_tokens, steer, done)
                        progress.update(len(chunk))
                write_json(paths[name], {"setting": config.settings[name]} | asdict(done))
    return {name: _read(path, config.settings[name], len(rows) * len(config.seeds)) for name, path in paths.items()}


def apply(mavis: MavisLogitsProcessor, setting: Mapping[str, Any]) -> MavisLogitsProcessor:
    """Give a processor the settings of a `MavisConfig`, so that its value functions are loaded only once."""
    mavis.config = MavisConfig.from_dict(setting)
    mavis.weights, mavis.beta = mavis.config.weights, mavis.config.beta
    mavis.reset()
    return mavis


def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    mavis: MavisLogitsProcessor | None,
    done: Completions,
) -> None:
    """Sample one completion per prompt at temperature 1 over all that the processor leaves, and append it to `done`."""
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left").to(model.device)
    output = model.generate(  # type: ignore[operator]
        **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id, logits_processor=[mavis] if mavis is not None else [],
    )  # fmt: skip
    new = output[:, batch["input_ids"].shape[1] :]
    ends = torch.isin(new, torch.tensor(sorted(eos_token_ids(model, tokenizer)), device=new.device))
    lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, new.shape[1])
    done.texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    done.lengths += lengths.tolist()
    ratios = (
        mavis.trace.log_ratios(new).sum(dim=1)
        if mavis is not None and mavis.trace is not None
        else torch.zeros(len(new))
    )
    done.log_ratios += ratios.tolist()


def _read(path: Path, setting: Mapping[str, Any], count: int) -> Completions:
    content = read_json(path)
    if content.pop("setting") != setting or len(content["texts"]) != count:
        raise ValueError(
            f"{path} holds completions of other settings or prompts: delete it, or give another folder for completions"
        )
    return Completions(**content)


def _score(
    judges: Mapping[str, Reward], rows: Sequence[dict[str, Any]], texts: list[str]
) -> dict[str, NDArray[np.float64]]:
    """Every reward of every text, by objective; `rows` are the prompt rows that the texts answer."""
    prompts = [row["prompt"] for row in rows]
    shared = set(rows[0]).intersection(*rows) - {"prompt"}
    columns = {name: [row[name] for row in rows] for name in sorted(shared)}
    return {name: np.array(compute_rewards(judge, prompts, texts, columns, name)) for name, judge in judges.items()}


def summarise(
    done: Completions,
    rewards: Mapping[str, NDArray[np.float64]],
    plain: Mapping[str, NDArray[np.float64]],
    prompts: int,
) -> dict[str, Any]:
    """Means with standard errors over prompts; gains in standard deviations of the unsteered reward."""
    summary: dict[str, Any] = {"completions": len(done.texts)}
    for objective, values in rewards.items():
        mean, error = mean_and_error(values, prompts)
        gain, gain_error = mean_and_error((values - plain[objective]) / plain[objective].std(), prompts)
        summary[objective] = {"reward": mean, "error": error, "gain_sd": gain, "gain_sd_error": gain_error}
    kl, kl_error = mean_and_error(np.asarray(done.log_ratios), prompts)
    words = [text.split() for text in done.texts]
    pairs = [pair for text in words for pair in pairwise(text)]
    return summary | {
        "kl": kl,
        "kl_error": kl_error,
        "tokens": float(np.mean(done.lengths)),
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
    }


def mean_and_error(values: NDArray[np.float64], prompts: int) -> tuple[float, float]:
    """Mean of [seeds * prompts] values, and its standard error with the prompt as the unit of sampling."""
    by_prompt = np.asarray(values, dtype=np.float64).reshape(-1, prompts).mean(axis=0)
    error = float(by_prompt.std(ddof=1) / np.sqrt(prompts)) if prompts > 1 else float("nan")
    return float(by_prompt.mean()), error


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table."""
    objectives = list(results["config"]["rewards"])
    head = ["setting", *(f"{o} (gain in sd)" for o in objectives), "KL (nats)", "tokens", "distinct-2"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in results["settings"].items():
        rewards = [f"{row[o]['reward']:.2f} ± {row[o]['error']:.2f} ({row[o]['gain_sd']:+.2f})" for o in objectives]
        cells = [
            name,
            *rewards,
            f"{row['kl']:.1f} ± {row['kl_error']:.1f}",
            f"{row['tokens']:.0f}",
            f"{row['distinct_2']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    config, versions = results["config"], ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    note = (
        f"{results['prompts']} held-out prompts, seeds {config['seeds']}, {config['max_new_tokens']} tokens at most, "
        f"base model in {config['dtype']}; means ± standard errors over prompts; KL by equation 7, against the full "
        f"vocabulary. "
        f"{results['machine']}; {versions}; {results['date']}."
    )
    return "\n".join([*lines, "", note, ""])
