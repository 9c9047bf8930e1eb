"""One strength for all objectives: units of value in which the same beta tilts equally far towards each.

To first order a tilt by beta Q spends beta^2 / 2 times the variance of Q within the steps (`fitting.efficiency`). How
much that is in standard deviations of the reward differs by objective: a reward that one word decides has values that
hardly differ at most steps and differ much at a few. So it is measured: completions are sampled at several strengths.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.core.chat import ChatTemplate
from mavis_logits.models import DEFAULT_MODEL, load_chat_model
from mavis_logits.values.value_head import ValueHead, ValueHeadConfig

from .base.prompts import encode_prompts, read_prompts
from .base.ranks import join
from .base.settings import check_sampling, torch_dtype
from .fitting.foreseen import log_prob_weight_of, reference_of, steering_by_reference
from .fitting.states import tree_states
from .measure.completions import Protocol, complete_all
from .measure.settings import steerings
from .sampling.reference import Reference, contexts, require_room
from .trees.data import LabelledTree, load_trees
from .trees.packing import pack

_NEAR = 0.1  # of the wanted divergence
_TRIES = 5


@dataclass(frozen=True)
class CalibrateConfig:
    """Which value function to calibrate, for what divergence and on which prompts.

    Attributes:
        value_function: folder of a value head or value model; its config is written anew: `tilt_scale`, and in its
            `settings` beta and temperature.
        prompts: JSON-lines file with the fields `id` and `prompt`, or a .txt file; nothing that it was trained on.
        kl: nats an answer that steering towards one objective alone is to spend.
        beta: that is to spend it, for value functions that are to stand beside others in a bundle; None for the mean of
            what was found in standard deviations.
        model: base model, by Hub id or folder.
        limit: at most this many prompts, from the top of the file.
        seeds: each prompt is answered once per seed and strength.
        max_new_tokens: T, length of an answer.
        temperature, top_p: at which the model is decoded.
        batch_size: prompts side by side.
        chat_template: how prompts are put, as for `mavis collect`.
        dtype: of the base model's weights.
        device: where to sample; None for a GPU if there is one.
        store: labelled trees of the reference that a value head has not learnt from: how much the reference's own
            log pi_ref counts beside its values (`log_prob_weight`) is found by up to `trees` of them first. Several
            stores say it for several temperatures. None leaves it as it is.
        trees: of each store.
    """

    value_function: str
    prompts: str
    kl: float = 5.0
    beta: float | None = None
    model: str = DEFAULT_MODEL
    limit: int | None = 50
    seeds: list[int] = field(default_factory=lambda: [0])
    max_new_tokens: int = 48
    temperature: float = 0.7
    top_p: float = 1.0
    batch_size: int = 50
    chat_template: ChatTemplate = "auto"
    dtype: str = "float32"
    device: str | None = None
    store: str | list[str] | None = None
    trees: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.kl < float("inf"):
            raise ValueError(f"kl must be a positive number of nats an answer, got {self.kl}")
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be a positive number, or null for one that is found, got {self.beta}")
        if not self.seeds or self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"seeds must not be empty, batch_size and max_new_tokens at least 1, got {self.seeds}, "
                f"{self.batch_size}, {self.max_new_tokens}"
            )
        if self.trees < 1:
            raise ValueError(f"trees must be at least 1, got {self.trees}")
        if self.store is not None and not self.store:
            raise ValueError("store is empty: name at least one folder of trees, or null")
        check_sampling(self.temperature, self.top_p)
        torch_dtype(self.dtype)


@dataclass(frozen=True)
class Calibrated:
    """What was found for one objective.

    Attributes:
        beta: the strength of a tilt by values in standard deviations of the reward.
        kl: nats an answer that it spends.
    """

    beta: float
    kl: float


def calibrate(
    config: CalibrateConfig, loaded_base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
) -> dict[str, Calibrated]:
    """Find the strength that spends `kl` nats for every objective, and write the units that follow into the config.

    Args:
        config: what to calibrate.
        loaded_base: the base model and its tokenizer, if they are loaded already.

    Raises:
        ValueError: the value function's settings normalise its values by step, so that units cancel; prompts or trees
            that cannot be used; an objective whose values tilt nothing. The config is as it was then.
        OSError: a file that cannot be read or written.
    """
    rows = read_prompts(config.prompts, config.limit)
    own = AutoConfig.from_pretrained(config.value_function)
    settings = {key: value for key, value in own.settings.items() if key not in ("beta", "temperature", "weights")}
    settings.setdefault("normalize", "standard")
    if settings["normalize"] != "standard":
        raise ValueError(
            f"{config.value_function} recommends normalize={settings['normalize']!r}, under which the unit of a value "
            "does not matter: set normalize to 'standard' in the settings of its config.json, or calibrate nothing"
        )
    if config.store is not None and own.model_type != ValueHeadConfig.model_type:
        raise ValueError(
            f"{config.value_function} is no value head ({own.model_type}), which alone a store is for: leave store out"
        )
    if loaded_base is None:
        loaded_base = load_chat_model(config.model, torch_dtype(config.dtype))
        loaded_base[0].to(join(config.device).device).eval()  # type: ignore[arg-type]
    model, tokenizer = loaded_base
    prompts = encode_prompts(rows, tokenizer, 10**6, config.chat_template)
    require_room(rows, prompts, config.max_new_tokens, contexts(model))
    before = copy.deepcopy(own)
    if config.store is not None:  # what is measured then steers by it
        own.log_prob_weight = _log_prob_weight(config, model)
        own.save_pretrained(config.value_function)
    try:
        strengths = _strengths(config, own, settings, rows, loaded_base)
    except BaseException:
        before.save_pretrained(config.value_function)
        raise
    set_tilt_scale([own], [one.beta for one in strengths.values()], config.beta)
    own.settings |= {"normalize": "standard", "temperature": config.temperature}
    own.save_pretrained(config.value_function)
    return strengths


def _log_prob_weight(config: CalibrateConfig, model: PreTrainedModel) -> list[float] | dict[str, list[float]]:
    """`log_prob_weight` of the value head, by trees that it has not learnt from."""
    head = ValueHead.from_pretrained(config.value_function).to(model.device).bind(model).float().eval()  # type: ignore[arg-type]
    every: list[LabelledTree] = []
    of_tree: dict[int, Tensor] = {}
    of_reference: dict[int, tuple[float, float] | None] = {}
    for folder in [config.store] if isinstance(config.store, str) else config.store or []:
        (store,), trees = load_trees(folder, head.config.objectives, 0.0, most=config.trees)
        store.require_base(model)
        how = reference_of(store)
        if how is None:
            raise ValueError(f"{folder} was not sampled from the base model alone: name a store that no policy sampled")
        every += trees
        for item in tqdm(trees, desc="hidden states", unit="tree"):
            of_tree[id(item)], of_reference[id(item)] = tree_states(model, pack(item.tree), head.config.layer), how
    foreseen = steering_by_reference(head, model, every, of_tree, of_reference, config.seeds[0], most=len(every))
    found = log_prob_weight_of(foreseen, head.config.objectives)
    if found is None:
        raise ValueError(
            f"no tree of {config.store} has two branches at its prompt: collect with root_children of at least 2"
        )
    return found


def _strengths(
    config: CalibrateConfig,
    own: Any,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    loaded_base: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> dict[str, Calibrated]:
    """What `calibrate` finds for every objective.

    Args:
        config: what to calibrate.
        own: the value function's config.
        settings: that it steers by.
        rows: the prompts.
        loaded_base: the base model and its tokenizer.
    """
    model, tokenizer = loaded_base
    reference = Reference.of(model, tokenizer, config.temperature, config.top_p)
    protocol = Protocol(
        config.seeds, config.max_new_tokens, config.batch_size, config.temperature, config.top_p, config.chat_template
    )
    scale, deviations = own.units()[2], own.units()[1]

    def spent(beta: float, objective: str) -> float:
        unit = (scale / deviations)[own.objectives.index(objective)]  # what is there already is undone
        setting = settings | {"beta": float(beta * unit), "weights": {objective: 1.0}}
        steering = steerings({"": setting}, config.value_function, model, tokenizer, reference.is_plain)[""]
        done = complete_all(model, tokenizer, rows, protocol, steering, setting, progress.update)
        return float(np.mean(done.log_ratios or [0.0]))

    with tqdm(desc="calibrate", unit="prompt") as progress:
        found = {name: strength(partial(spent, objective=name), config.kl) for name in own.objectives}
    strengths: dict[str, Calibrated] = {}
    for name, one in found.items():
        if one is None:
            raise ValueError(
                f"steering towards {name!r} changes nothing: its values do not differ between tokens. Train it on more "
                "trees, or leave the objective out"
            )
        if abs(one.kl - config.kl) > 0.3 * config.kl:
            warnings.warn(
                f"the nearest to {config.kl:g} nats that was found for {name!r} is {one.kl:.1f}, at beta {one.beta:g}",
                stacklevel=2,
            )
        strengths[name] = one
    return strengths


def set_tilt_scale(configs: Sequence[Any], betas: Sequence[float], beta: float | None = None) -> None:
    """Units under which one beta does for every objective what its own does in standard deviations of the reward; it is
    put into the configs' settings.

    Args:
        configs: of value functions of M objectives in all.
        betas: M strengths, in their order.
        beta: the one; None for their geometric mean.
    """
    beta, left = beta or float(f"{np.exp(np.mean(np.log(betas))):.2g}"), list(betas)
    for config in configs:
        own, left = left[: len(config.reward_scale)], left[len(config.reward_scale) :]
        config.tilt_scale = [float(f"{s * beta / b:.4g}") for s, b in zip(config.reward_scale, own, strict=True)]
        config.settings = {**config.settings, "beta": beta}


def strength(spent: Callable[[float], float], kl: float, first: float = 4.0) -> Calibrated | None:
    """The strength nearest to the divergence `kl` of a few that are tried; None if none makes a difference.

    Args:
        spent: nats at a strength; they grow with it.
        kl: wanted.
        first: strength to begin with.
    """
    found: list[Calibrated] = []
    beta = first
    for _ in range(_TRIES):
        found.append(Calibrated(float(f"{beta:.3g}"), spent(float(f"{beta:.3g}"))))
        if abs(found[-1].kl - kl) <= _NEAR * kl:
            break
        beta = next_strength([(one.beta, one.kl) for one in found], kl)
    if len(found) > 1 and len({one.kl for one in found}) == 1:  # what it spends, if anything, is the cut's
        return None
    return min(found, key=lambda one: abs(np.log(max(one.kl, 1e-9) / kl)))


def next_strength(tried: Sequence[tuple[float, float]], kl: float) -> float:
    """The next strength to try, of (strength, nats) before: between the nearest on both sides, or by a power law.

    It is that of the last two, or the square law, which holds where little is spent; what is far from the reference
    grows more slowly.
    """
    below = max((t for t in tried if t[1] < kl), key=lambda t: t[1], default=None)
    above = min((t for t in tried if t[1] >= kl), key=lambda t: t[1], default=None)
    if below is not None and above is not None:
        low, high = (float(np.sqrt(max(0.0, t[1]))) for t in (below, above))
        share = (np.sqrt(kl) - low) / max(1e-9, high - low)
        return float(below[0] + (above[0] - below[0]) * min(0.9, max(0.1, share)))
    beta, spent = tried[-1][0], max(tried[-1][1], 1e-3)
    power = 2.0
    if len(tried) > 1 and tried[-2][0] != beta:
        other, before = tried[-2][0], max(tried[-2][1], 1e-3)
        power = float(np.clip(np.log(spent / before) / np.log(beta / other), 0.5, 3.0))
    return float(beta * np.clip((kl / spent) ** (1 / power), 0.25, 4.0))


def told(config: CalibrateConfig, found: dict[str, Calibrated]) -> str:
    """What was done, for people."""
    own = AutoConfig.from_pretrained(config.value_function)
    lines = [
        f"{name}: {one.kl:.1f} nats at beta {one.beta:.3g} in standard deviations; unit now {unit:.3g}"
        for (name, one), unit in zip(found.items(), own.tilt_scale, strict=True)
    ]
    return "\n".join([*lines, f"{config.value_function}: beta {own.settings['beta']:g} for all of them"])
