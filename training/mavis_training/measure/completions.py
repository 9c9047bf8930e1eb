"""What settings of decoding write to prompts, kept in files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits import MavisLogitsProcessor
from mavis_logits.core.chat import ChatTemplate
from mavis_logits.decoding.strategies import MavisStrategy
from mavis_logits.steering.steering import Steering

from ..base.files import read_json, write_json
from ..base.kept import as_json, digest, files_digest, function_origin, require_same
from ..base.likelihoods import log_likelihoods
from ..base.prompts import encode_prompts
from ..rewards.load import Reward, load_reward, reward_digest
from ..rivals.decoding import KEYS, Decoding, Recorder
from ..sampling.reference import Reference
from .settings import OWN_FUNCTIONS, parts

_FORMAT = 2  # of kept completions: other numbers are of versions that would have written other texts
_FOLDERS = ("adapters", "mixture", "token_rewards", "directions")


@dataclass
class Completions:
    """What one setting wrote: S seeds x P prompts x n returned sequences, row by row, seed after seed.

    Attributes:
        prompt_ids: S * P.
        texts: S * P * n; those of one prompt in the setting's own order, best first.
        lengths: tokens of each.
        log_ratios: log pi / pi_ref of each whole completion in nats; None where the policy has none (a search).
        reference: pi_ref, as `Reference.record` says it.
        seconds: that the sampling took, on whatever else the machine did; None where that was not noted.
    """

    prompt_ids: list[str]
    texts: list[str]
    lengths: list[int]
    log_ratios: list[float] | None
    reference: dict[str, Any] | None = None
    seconds: float | None = None

    @property
    def returned(self) -> int:
        """n."""
        return len(self.texts) // len(self.prompt_ids)


@dataclass(frozen=True)
class Protocol:
    """How every setting is sampled.

    Attributes:
        seeds: each prompt is answered once per seed.
        max_new_tokens: T.
        batch_size: prompts side by side.
        temperature, top_p: of the reference.
        chat_template: how prompts are put.
    """

    seeds: Sequence[int]
    max_new_tokens: int
    batch_size: int
    temperature: float = 1.0
    top_p: float = 1.0
    chat_template: ChatTemplate = "auto"


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
    lengths = _lengths(new, reference)
    ratios: list[float] | None = None
    if steering is None:
        ratios = [0.0] * len(new)
    elif steering.trace is not None:
        ratios = steering.trace.log_ratios(new).sum(dim=1).tolist()
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return Completions([], texts, lengths.tolist(), ratios, reference.record())


def complete_by(
    decoding: Decoding,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[list[int]],
    protocol: Protocol,
    steering: Steering | None,
    load: Callable[[str], Reward],
) -> Completions:
    """Completions of every prompt, `decoding.samples` each, by a rival of value functions, or by both.

    log pi is that of what was sampled from, log pi_ref that of the same tokens after the reference's prompt.

    Args:
        decoding: the rival.
        model, tokenizer: of the base model.
        rows: of R prompts.
        prompts: their token ids as the reference has them.
        protocol: whose temperature holds where the rival has none of its own. Under a nucleus log-ratios are None:
            what lies outside of it, where the rival may go, would be infinitely far from the reference.
        steering: a processor, which tilts what the rival makes of the scores; None for the rival alone.
        load: gives the reward of a spec.
    """
    assert steering is None or isinstance(steering, MavisLogitsProcessor), "see check_setting"
    reference = Reference.of(model, tokenizer, protocol.temperature, protocol.top_p)
    rows = [row for row in rows for _ in range(decoding.samples)]
    prompts = [prompt for prompt in prompts for _ in range(decoding.samples)]
    own = [decoding.encode(row, tokenizer, protocol.chat_template) for row in rows]
    batch = tokenizer.pad({"input_ids": own}, return_tensors="pt", padding_side="left").to(model.device)
    start = batch["input_ids"].shape[1]
    recorder = Recorder(start)
    at = protocol.temperature, protocol.top_p
    with reference.applied(model), decoding.applied(model, tokenizer, batch, rows, load, at) as processors:
        if steering is not None:
            steering.reset()
            processors.append(steering)
        output = model.generate(  # type: ignore[operator]
            **batch, logits_processor=[*processors, recorder], do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=protocol.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    new = output[:, start:]
    lengths = _lengths(new, reference)
    ratios: list[float] | None = None
    if protocol.top_p == 1.0:
        there = torch.arange(new.shape[1], device=new.device) < lengths[:, None]
        said = recorder.finish(output).masked_fill(~there, 0.0).sum(dim=1).tolist()
        tokens = [row[:length].tolist() for row, length in zip(new, lengths.tolist(), strict=True)]
        known = log_likelihoods(model, prompts, tokens, protocol.temperature)
        ratios = [a - b for a, b in zip(said, known, strict=True)]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return Completions([], texts, lengths.tolist(), ratios, reference.record())


def _lengths(new: Tensor, reference: Reference) -> Tensor:
    """Of rows of new tokens [R, N], the end of text included."""
    ends = torch.isin(new, torch.tensor(sorted(reference.eos), device=new.device))
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, new.shape[1])


def complete_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    protocol: Protocol,
    steering: Steering | None,
    setting: Mapping[str, Any],
    advance: Callable[[int], object],
    load: Callable[[str], Reward] = load_reward,
) -> Completions:
    """Complete the prompts of all `rows` for every seed.

    Args:
        model, tokenizer: of the base model.
        rows: of P prompts.
        protocol: how to sample.
        steering: what steers, of `steerings`.
        setting: that it is of.
        advance: is told how many prompts were completed.
        load: gives the reward of a spec, where a setting asks one while decoding.
    """
    every, decoding = list(rows), Decoding.of(setting)
    prompts = encode_prompts(every, tokenizer, 10**6, protocol.chat_template)  # type: ignore[arg-type]
    load = cache(load)  # a reward that a rival asks is loaded once
    at, found, started = (protocol.temperature, protocol.top_p), [], time.monotonic()
    for seed in protocol.seeds:
        for start in range(0, len(every), protocol.batch_size):
            which = slice(start, start + protocol.batch_size)
            torch.manual_seed(1_000_003 * seed + start)
            if decoding is None:
                returned = parts(setting)[3]
                done = complete(model, tokenizer, prompts[which], protocol.max_new_tokens, steering, returned, *at)
            else:
                done = complete_by(decoding, model, tokenizer, every[which], prompts[which], protocol, steering, load)
            found.append(done)
            advance(len(every[which]))
    ratios = [ratio for part in found for ratio in part.log_ratios or ()]
    return Completions(
        [row["id"] for row in every] * len(protocol.seeds),
        [text for part in found for text in part.texts],
        [length for part in found for length in part.lengths],
        ratios if found[0].log_ratios is not None else None,
        found[0].reference,
        round(time.monotonic() - started, 2),
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
    steers = bool(setting.keys() - set(KEYS))
    functions = setting.get(OWN_FUNCTIONS, value_functions) if steers else None
    own = {key: value for key, value in setting.items() if key != OWN_FUNCTIONS}
    made_by = None if functions is None else function_origin(functions)
    found = {"format": _FORMAT, "setting": own, "value_functions": made_by, "prompts": prompts_digest(rows)} | rest
    files = {name: files_digest(sorted(Path(name).iterdir())) for key in _FOLDERS for name in setting.get(key, {})}
    files |= {spec: reward_digest(spec) or "" for spec in setting.get("partial_rewards", {})}
    return found | ({"files": files} if files else {})


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
