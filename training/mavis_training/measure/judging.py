"""What completions are worth: rewards and perplexity, kept in files beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.backbone import Backbone

from ..base.files import read_json, write_json
from ..base.kept import as_json, digest
from ..base.likelihoods import log_likelihoods
from ..rewards.load import Reward, RewardSpec, compute_rewards, reward_digest, shared_columns
from .completions import Completions


def perplexity(
    path: Path,
    done: Completions,
    prompts: Sequence[list[int]],
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    batch_size: int,
    origin: Mapping[str, Any],
) -> float:
    """Perplexity of the texts, tokenized anew, under the base model left alone; what is found in `path` is taken.

    Args:
        path: JSON file in which the log-likelihoods are kept.
        done: S * P * n texts.
        prompts: token ids of the P prompts.
        load: gives the base model and its tokenizer.
        batch_size: texts per forward.
        origin: of the texts.
    """
    texts = digest([done.texts, origin])
    kept = read_json(path) if path.exists() else {}
    if kept.get("texts") != texts:
        model, tokenizer = load()
        repeated = [
            p for _ in range(len(done.prompt_ids) // len(prompts)) for p in prompts for _ in range(done.returned)
        ]
        # Tokenized anew, a text may be a few tokens longer: what the context has no room for is left out.
        longest = Backbone.of(model).longest or max(map(len, repeated)) + 10**6
        ends = [
            tokenizer(text, add_special_tokens=False)["input_ids"][: longest - len(prompt)]
            for text, prompt in zip(done.texts, repeated, strict=True)
        ]
        order = np.argsort([len(p) + len(c) for p, c in zip(repeated, ends, strict=True)], kind="stable")
        sums = np.zeros(len(ends))
        for batch in np.split(order, range(batch_size, len(order), batch_size)):
            sums[batch] = log_likelihoods(model, [repeated[i] for i in batch], [ends[i] for i in batch])
        kept = {"texts": texts, "log_likelihood": sums.tolist(), "tokens": [len(ids) for ids in ends]}
        write_json(path, kept)
    return float(np.exp(-np.sum(kept["log_likelihood"]) / max(1, np.sum(kept["tokens"]))))


def judge(
    path: Path,
    done: Completions,
    rows: Sequence[dict[str, Any]],
    rewards: Mapping[str, RewardSpec],
    load: Callable[[RewardSpec], Reward],
) -> dict[str, NDArray[np.float64]]:
    """Every reward of every text by objective, [S * P * n]; those found in `path` are not computed again.

    Args:
        path: JSON file in which they are kept, with digests of what was judged and of what judged it.
        done: S * P * n texts.
        rows: the S * P prompt rows that they answer.
        rewards: what each objective's reward is loaded from.
        load: loads one of them.
    """
    texts = digest([done.texts, list(rows)])
    kept = read_json(path) if path.exists() else {}
    if kept.get("texts") != texts:
        kept = {"texts": texts, "rewards": {}}
    sources = {name: {"of": spec, "digest": reward_digest(spec)} for name, spec in rewards.items()}
    missing = [name for name in rewards if not _is_of(kept["rewards"].get(name, {}), sources[name])]
    rows = [row for row in rows for _ in range(done.returned)]
    columns = shared_columns(rows)
    for name in missing:
        values = compute_rewards(load(rewards[name]), [row["prompt"] for row in rows], done.texts, columns, name)
        kept["rewards"][name] = sources[name] | {"values": values}
    if missing:
        write_json(path, kept)
    return {name: np.array(kept["rewards"][name]["values"]) for name in rewards}


def _is_of(kept: Mapping[str, Any], source: Mapping[str, Any]) -> bool:
    return all(kept.get(key) == as_json(value) for key, value in source.items())
