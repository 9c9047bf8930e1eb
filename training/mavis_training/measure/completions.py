"""What settings of steered decoding write to prompts, and how reward models judge it; both are kept in files.

A setting is a mapping of fields of `MavisConfig`, of `value_functions` where they are not those of all settings, of
`objectives` in words beside them, and of `strategy` with that strategy's own arguments where it is not to be a logits
processor. An empty one is the base model left alone. In words, beta 1 over all candidates is a system prompt, measured
like everything else.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits import MavisConfig, MavisLogitsProcessor
from mavis_logits.backbone import Backbone
from mavis_logits.decoding import strategies
from mavis_logits.decoding.strategies import MavisSampling, MavisStrategy
from mavis_logits.steering.steering import Steering
from mavis_logits.values.ensemble import load_value_functions

from ..base.files import read_json, write_json
from ..base.kept import as_json, digest, function_origin, require_same
from ..base.likelihoods import log_likelihoods
from ..rewards.load import Reward, RewardSpec, compute_rewards, reward_digest
from ..sampling.reference import Reference

STRATEGIES: dict[str, type[MavisStrategy]] = {
    "sampling": MavisSampling,
    "beam_search": strategies.MavisBeamSearch,
    "best_of_n": strategies.MavisBestOfN,
    "blockwise": strategies.MavisBlockwise,
    "tree_search": strategies.MavisTreeSearch,
}
_FORMAT = 2  # of kept completions: other numbers are of versions that would have written other texts
_RETURNED = "num_return_sequences"
_OWN_FUNCTIONS = "value_functions"
_IN_WORDS = "objectives"
_NO_SETTINGS = {"reward_functions", "reward_weights", "reward_columns"}  # functions, and what goes with them


@dataclass
class Completions:
    """What one setting wrote: S seeds x P prompts x n returned sequences, row by row, seed after seed.

    Attributes:
        prompt_ids: S * P.
        texts: S * P * n; those of one prompt in the setting's own order, best first.
        lengths: tokens of each.
        log_ratios: log pi / pi_ref of each whole completion in nats; None where the policy has none (a search).
        reference: pi_ref, as `Reference.record` says it.
    """

    prompt_ids: list[str]
    texts: list[str]
    lengths: list[int]
    log_ratios: list[float] | None
    reference: dict[str, Any] | None = None

    @property
    def returned(self) -> int:
        """n."""
        return len(self.texts) // len(self.prompt_ids)


def check_setting(setting: Mapping[str, Any]) -> None:
    """Raise `ValueError` if `setting` names an unknown strategy or has an unknown key."""
    kind, config, own, returned = _parts(setting)
    words = setting.get(_IN_WORDS, {})
    if not isinstance(words, Mapping) or not all(isinstance(x, str) and x.strip() for x in words.values()):
        raise ValueError(
            f"{_IN_WORDS} are instructions in words by name, such as {{joke: Answer with a joke.}}, got {words!r}"
        )
    if kind is None:
        MavisConfig.from_dict({**config, **own})  # everything must be a field of it
        if returned != 1:
            raise ValueError(f"{_RETURNED}={returned} needs a strategy that ranks what it writes: add strategy: ...")
        return
    MavisConfig.from_dict(config)
    own_ones = inspect.signature(kind).parameters.keys() - inspect.signature(MavisStrategy).parameters.keys()
    known = own_ones - _NO_SETTINGS
    for key in own:
        if key not in known:
            every = sorted(known | {field.name for field in fields(MavisConfig)} | {_RETURNED, _IN_WORDS})
            near = difflib.get_close_matches(key, every, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(every)}"
            raise ValueError(f"the strategy {setting['strategy']!r} has no setting {key!r}: {hint}")


def _parts(setting: Mapping[str, Any]) -> tuple[type[MavisStrategy] | None, dict[str, Any], dict[str, Any], int]:
    """A setting as strategy (None: the processor), fields of `MavisConfig`, the strategy's own arguments, and n."""
    rest = {key: value for key, value in setting.items() if key not in (_OWN_FUNCTIONS, _IN_WORDS)}
    name = rest.pop("strategy", None)
    if name is not None and name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}: expected one of {', '.join(STRATEGIES)}")
    returned = rest.pop(_RETURNED, 1)
    config = {field.name: rest.pop(field.name) for field in fields(MavisConfig) if field.name in rest}
    return STRATEGIES[name] if name is not None else None, config, rest, returned


def steerings(
    settings: Mapping[str, Mapping[str, Any]],
    value_functions: str | Mapping[str, str] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plain: bool = True,
) -> dict[str, Steering | None]:
    """A processor or strategy for every setting, None for the empty one; value functions are loaded once.

    Args:
        settings: by name.
        value_functions: of those that name none of their own; None where all objectives are in words.
        model, tokenizer: of the base model.
        plain: whether the reference is the model's own distribution; at another temperature or nucleus a strategy
            stands in for the processor, which sees scores before these are applied.

    Raises:
        ValueError: an unknown objective, or settings that the strategy refuses.
    """
    loaded: dict[str, Any] = {}
    made: dict[str, Steering | None] = {}
    for name, setting in settings.items():
        kind, config, own, _ = _parts(setting)
        if kind is None and not plain:
            kind, own = MavisSampling, {}
        common = {"model": model, "tokenizer": tokenizer, "config": MavisConfig.from_dict(config)}
        if _IN_WORDS in setting:
            common["objectives"] = setting[_IN_WORDS]
        if not setting:
            made[name] = None
            continue
        source = setting.get(_OWN_FUNCTIONS, value_functions)
        if str(source) not in loaded:
            loaded[str(source)] = source and load_value_functions(source, model, model.device, {})
        functions = loaded[str(source)]
        if kind is None or kind is MavisSampling:
            made[name] = (kind or MavisLogitsProcessor)(functions, **common, trace=True, **own)
        else:
            made[name] = kind(functions, **common, **own)
    return made


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    steering: Steering | None,
    returned: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Completions:
    """`returned` completions of every prompt (token ids) from the reference, or from what steering makes of it.

    The reference is the base model at `temperature` and `top_p`, and log-ratios are taken against it.
    """
    reference = Reference.of(model, tokenizer, temperature, top_p)
    assert reference.is_plain or not isinstance(steering, MavisLogitsProcessor), "see steerings(plain=False)"
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left").to(model.device)
    how: dict[str, Any] = {"custom_generate": steering} if isinstance(steering, MavisStrategy) else {}
    if isinstance(steering, MavisLogitsProcessor):
        steering.reset()
        how = {"logits_processor": [steering]}
    with reference.applied(model):
        output = model.generate(  # type: ignore[operator]
            **batch, **how, do_sample=True, temperature=temperature, top_k=0, top_p=top_p,
            max_new_tokens=max_new_tokens, num_return_sequences=returned, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    new = output[:, batch["input_ids"].shape[1] :]
    ends = torch.isin(new, torch.tensor(sorted(reference.eos), device=new.device))
    lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, new.shape[1])
    ratios: list[float] | None = None
    if steering is None:
        ratios = [0.0] * len(new)
    elif steering.trace is not None:
        ratios = steering.trace.log_ratios(new).sum(dim=1).tolist()
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return Completions([], texts, lengths.tolist(), ratios, reference.record())


def complete_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[str],
    prompts: list[list[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    steering: Steering | None,
    setting: Mapping[str, Any],
    advance: Callable[[int], object],
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Completions:
    """Complete all `prompts` (token ids) for every seed; `advance` is told how many were completed."""
    parts = []
    for seed in seeds:
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            torch.manual_seed(1_000_003 * seed + start)
            returned = _parts(setting)[3]
            parts.append(complete(model, tokenizer, chunk, max_new_tokens, steering, returned, temperature, top_p))
            advance(len(chunk))
    ratios = [ratio for part in parts for ratio in part.log_ratios or ()]
    return Completions(
        ids * len(seeds),
        [text for part in parts for text in part.texts],
        [length for part in parts for length in part.lengths],
        ratios if parts[0].log_ratios is not None else None,
        parts[0].reference,
    )


def prompts_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of what prompts' rows ask."""
    return digest([[row["id"], row["prompt"], row.get("conversation")] for row in rows])


def completions_origin(
    setting: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    value_functions: str | Mapping[str, str] | None,
    **rest: Any,
) -> dict[str, Any]:
    """Everything that shapes the completions of one setting.

    Args:
        setting: of decoding.
        rows: the prompts' rows.
        value_functions: those of all settings, in use where the setting has none of its own; None for none.
        rest: seeds, length, base model and so on.
    """
    functions = setting.get(_OWN_FUNCTIONS, value_functions) if setting else None
    own = {key: value for key, value in setting.items() if key != _OWN_FUNCTIONS}
    made_by = None if functions is None else function_origin(functions)
    return {"format": _FORMAT, "setting": own, "value_functions": made_by, "prompts": prompts_digest(rows)} | rest


def sampled_at(temperature: float, top_p: float) -> dict[str, float]:
    """Temperature and nucleus as an origin has them: only where they are not 1, as they were before there was a choice,
    so that what was kept then is known again."""
    given = {"temperature": temperature, "top_p": top_p}
    return {name: value for name, value in given.items() if value != 1.0}


def write_completions(path: Path, origin: Mapping[str, Any], done: Completions) -> None:
    """Keep completions, with what shaped them."""
    write_json(path, {"origin": dict(origin)} | asdict(done))


def read_completions(
    path: Path, origin: Mapping[str, Any], place: str = "completions", fresh: bool = True
) -> Completions:
    """Completions kept earlier.

    Args:
        path: JSON file.
        origin: what shapes those that are wanted.
        place: the setting that says where they are kept.
        fresh: whether the command has this setting.

    Raises:
        OSError: the file cannot be read.
        ValueError: they are of another origin; the message says what differs.
    """
    content = read_json(path)
    content.pop("setting", None)  # of older versions
    what = f"{path} holds completions of other settings"
    require_same(what, content.pop("origin", None), as_json(origin), place, fresh)
    return Completions(**content)


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
    shared = set(rows[0]).intersection(*rows) - {"prompt"}
    columns = {name: [row[name] for row in rows] for name in sorted(shared)}
    for name in missing:
        values = compute_rewards(load(rewards[name]), [row["prompt"] for row in rows], done.texts, columns, name)
        kept["rewards"][name] = sources[name] | {"values": values}
    if missing:
        write_json(path, kept)
    return {name: np.array(kept["rewards"][name]["values"]) for name in rewards}


def _is_of(kept: Mapping[str, Any], source: Mapping[str, Any]) -> bool:
    return all(kept.get(key) == as_json(value) for key, value in source.items())
