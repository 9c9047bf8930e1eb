"""Value functions, settings and one step of Algorithm 2: what the logits processor and all strategies share."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from torch import Tensor

from ..backbone import Backbone
from ..core.config import MavisConfig
from ..core.tilting import combine, kl_divergence, normalize, solve_beta, tilt
from ..hub.bundle import load_bundle
from ..hub.files import LOADING_ARGUMENTS
from ..scoring.scorer import WantedReading
from ..values.ensemble import ValueFunctions, load_value_functions, special_tokens
from ..values.value_head import ValueHead
from ..values.value_model import ValueModel
from .copies import Copied
from .step import Choice, Step, check_scores
from .trace import MavisStats, MavisTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    ValueFunction = ValueModel | ValueHead


class Steering(Copied):
    """Value functions and how they tilt a reference. `MavisLogitsProcessor` and the strategies are two uses of it.

    Args:
        value_functions: one `ValueModel` or `ValueHead`, several of them, or a mapping from objective to the one that
            predicts it. Without a mapping the objectives bear the names in the value functions' configs.
        weights: lambda: by objective (absent ones are 0), [M], or [R, M] for weights per sequence; equal by default.
        beta: strength of the tilt, one number or [R].
        model: the base model; needed for value heads, whose hidden states it provides.
        tokenizer: the base model's tokenizer; if given, value functions made for another one are refused. Its special
            tokens count for more than those of configurations, and ids beyond it that a value model does not know
            (base models' tables are padded to round sizes) are forbidden.
        pad_token_id: tells left padding apart, where the base model's attention mask is not known; by default the
            tokenizer's, else the base model's, else the value models'.
        eos_token_id: in the same order; lets finished rows go unscored.
        trace: keep every step in `self.trace`.
        fuse: whether value models that are LoRA adapters on one backbone are run in one forward: None where it is
            possible, True to insist, False for one forward each.
        compile: compile the value models' steps, on a GPU into CUDA graphs (`scoring.scorer.RaggedScorer`).
        reading: how value models (and by a strategy the base model) read candidates: "auto", the fastest way that is
            right; "packed" to insist on one packed forward, and be told why it cannot be; "repeated" to do without.
        config: all other settings; see `MavisConfig`, whose fields may also be given by name.

    Attributes:
        objectives: names of the M objectives, in the order of `weights` as a tensor.
        config: the settings as a `MavisConfig`.
        stats: totals (`MavisStats`).
        trace: steps of the latest `generate` call (`MavisTrace`), or None.

    Raises:
        ValueError: unknown objective, weights or settings out of range, a value function of another vocabulary,
            tokenizer, device or base model, a NaN value. Raised before anything is generated where it can be.
    """

    def __init__(
        self,
        value_functions: ValueFunction | Sequence[ValueFunction] | Mapping[str, ValueFunction],
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        trace: bool = False,
        fuse: bool | None = None,
        compile: bool = False,
        reading: WantedReading = "auto",
        config: MavisConfig | None = None,
        **settings: Any,
    ) -> None:
        self._base: weakref.ref[PreTrainedModel] | None = None
        self._functions = ValueFunctions(value_functions, tokenizer, fuse)
        config = config if config is not None else MavisConfig()
        self.config = MavisConfig.from_dict({**vars(config), **settings})
        self.weights = weights if weights is not None else self.config.weights
        self.beta = beta if beta is not None else self.config.beta
        self.pad_token_id, self._eos, self._borders = special_tokens(
            self._functions.models, model, tokenizer, pad_token_id, eos_token_id
        )
        if reading not in get_args(WantedReading):
            raise ValueError(f"reading must be one of {', '.join(get_args(WantedReading))}, got {reading!r}")
        self.tokenizer, self.compile, self.reading = tokenizer, compile, reading
        self.stats = MavisStats()
        self.trace = MavisTrace(self.objectives, self._eos) if trace else None
        if model is not None:
            self.attach(model)

    @classmethod
    def from_pretrained(
        cls,
        value_functions: str | Path | Sequence[str] | Mapping[str, Any],
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        model: PreTrainedModel | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        load: Mapping[str, Any] | None = None,
        fuse: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load value functions by Hub id or folder (or take them as objects), and steer by them.

        Args:
            value_functions: one id, several, or a mapping from objective to id or object; an id that occurs twice is
                loaded once. One id may be that of a bundle, whose settings then are the defaults.
            weights, beta, fuse, kwargs: as for the class.
            model: the base model; also the backbone of adapter repos that were trained on its first layers.
            device: of the value functions; by default the base model's.
            dtype: of the value models' weights.
            load: further arguments of `from_pretrained`, which may also be given by name: `revision`, `token`,
                `cache_dir`, `local_files_only`, `subfolder`, `force_download`, `device_map`.
        """
        named = {key: kwargs.pop(key) for key in LOADING_ARGUMENTS if key in kwargs}
        loading = {**(load or {}), **named} | ({} if dtype is None else {"dtype": dtype})
        if device is None and model is not None and loading.get("device_map") is None:
            device = model.device
        bundle = load_bundle(value_functions, **loading) if isinstance(value_functions, str | Path) else None
        if bundle is not None:
            value_functions, settings = bundle
            kwargs["config"] = kwargs.get("config") or settings
        functions = load_value_functions(value_functions, model, device, loading, fuse)
        return cls(functions, weights, beta, model=model, fuse=fuse, **kwargs)

    @property
    def objectives(self) -> list[str]:
        """Names of the M objectives."""
        return self._functions.objectives

    @property
    def config(self) -> MavisConfig:
        """The settings. May be set between steps; `weights` and `beta` are not taken from it then."""
        return self._config

    @config.setter
    def config(self, config: MavisConfig) -> None:
        if config.top_k is None and self._functions.models:
            raise ValueError(
                "top_k=None scores the whole vocabulary, which only value heads can: give top_k for value models"
            )
        self._config = config

    @property
    def weights(self) -> Tensor:
        """lambda, float32 [M] or [R, M]. May be set between steps, to anything that the constructor takes."""
        return self._weights

    @weights.setter
    def weights(self, weights: Mapping[str, float] | Sequence[float] | Tensor | None) -> None:
        self._weights = self._functions.weights(weights)
        self._idle = self._functions.idle(self._weights)

    @property
    def beta(self) -> Tensor:
        """Strength of the tilt, float32 [] or [R]. May be set between steps."""
        return self._beta

    @beta.setter
    def beta(self, beta: float | Tensor) -> None:
        given = torch.as_tensor(beta, dtype=torch.float32)
        if given.ndim > 1 or not torch.isfinite(given).all() or (given < 0).any():
            raise ValueError(f"beta must be a finite number of at least 0, or one a row [R], got {beta!r}")
        self._beta = given

    def attach(self, model: PreTrainedModel) -> Self:
        """Make `model` the base model.

        Raises:
            ValueError: a value head was trained on another model, or a value model cannot read what `model` is given.
        """
        if Backbone.of(model).is_encoder_decoder and self._functions.models:
            names = [value_model.config.objectives for value_model in self._functions.models]
            raise ValueError(
                f"{type(model).__name__} reads its prompts with an encoder, which the value models for {names} never "
                "see: use value heads"
            )
        for head in self._functions.heads:
            head.bind(model)
        temperature = getattr(model.generation_config, "temperature", None) or 1.0
        if temperature != 1.0 and self.config.reference_temperature != 1.0:
            warnings.warn(
                f"reference_temperature={self.config.reference_temperature} and the base model's generation config has "
                f"temperature={temperature}: both will be applied. Pass temperature=1.0 to generate, to tilt as the "
                "paper does.",
                stacklevel=3,
            )
        self._base = weakref.ref(model)
        return self

    def _follow_base(self) -> None:
        """Raise `ValueError` if the base model has become one that the value heads are not for."""
        for head in self._functions.heads:
            head.follow()

    def reset(self) -> None:
        """Begin `stats` and `trace` anew."""
        self.stats = MavisStats()
        if self.trace is not None:
            self.trace = MavisTrace(self.objectives, self._eos)

    def choose(self, scores: Tensor) -> Choice:
        """The candidates of a step: the k likeliest tokens, of these only those within `candidate_min_p` of the best.

        Args:
            scores: [R, V] next-token scores, logits or log-probabilities; -inf for banned tokens.
        """
        config = self.config
        scores = self._within(scores.float())
        if config.reference_temperature != 1.0:
            scores = scores / config.reference_temperature
        needs_all = config.top_k is None or config.unscored == "keep"
        everything = torch.log_softmax(scores, dim=-1) if needs_all else None
        if config.top_k is None:
            assert everything is not None
            reference, best = everything, scores.amax(dim=-1, keepdim=True)
            candidates = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        else:
            top = scores.topk(min(config.top_k, scores.shape[1]), dim=-1)
            reference, candidates, best = top.values, top.indices, top.values[:, :1]
            reference = reference - scores.logsumexp(dim=-1, keepdim=True)
        # Where all tokens are forbidden there is no NaN, which would speak of damage.
        reference = reference.masked_fill(torch.isneginf(best), -torch.inf)
        if config.candidate_min_p is not None:
            least = reference.amax(dim=-1, keepdim=True) + math.log(config.candidate_min_p)
            # A NaN stays, so that it is noticed.
            reference = reference.masked_fill(reference < least, -torch.inf)
        return Choice(candidates, reference, everything if config.unscored == "keep" else None)

    def _within(self, scores: Tensor) -> Tensor:
        """`scores` [R, V] without ids that are no tokens, as `ValueFunctions.known` tells them."""
        return self._functions.known(scores, self.tokenizer)

    def worth_scoring(self, choice: Choice) -> Tensor:
        """[R, k] bool, the candidates whose values can matter: those that take part, unless the row has but one.

        Every normalisation takes a lone candidate's value to 0, so that the step needs no value at all; with
        `normalize="none"` it still weighs against tokens that keep their score.
        """
        mask = choice.mask
        if self.config.candidate_min_p is None or (choice.everything is not None and self.config.normalize == "none"):
            return mask
        return mask & (mask.sum(dim=-1, keepdim=True) > 1)

    def tilt(self, choice: Choice, values: Tensor, request: Tensor | None = None, requests: int | None = None) -> Step:
        """Algorithm 2 from the values on: combine, normalise, tilt.

        Args:
            choice: of R rows.
            values: [R, k, M]; those of candidates that take no part mean nothing.
            request: [R] which request each row belongs to, where weights or beta are given per request; None if the
                rows are the requests, each repeated for its beams or samples.
            requests: how many requests `request` counts, if weights or beta may be given for fewer, each of them then
                for as many requests in a row; None if they are given for every one.
        """
        config, mask = self.config, choice.mask
        weights = self._per_row(self._weights, 1, values, request, requests)
        beta = self._per_row(self._beta, 0, values, request, requests)
        combined = combine(values, weights).masked_fill(~mask, 0.0)
        policy = normalize(combined, mask, config.normalize, config.gap_floor)
        reference = choice.reference
        if choice.everything is not None:
            policy = torch.zeros_like(choice.everything).scatter(1, choice.candidates, policy)
            reference = choice.everything
        if config.kl_budget is not None:
            beta = solve_beta(reference, policy, config.kl_budget)
        scores = tilt(reference, policy, beta)
        tilted = torch.log_softmax(scores, dim=-1)
        kl = kl_divergence(tilted, reference, normalized=True)
        everything = tilted if config.top_k is None else None
        others = torch.full_like(kl, -torch.inf)
        if choice.everything is not None:
            everything, tilted = tilted, tilted.gather(1, choice.candidates).masked_fill(~mask, -torch.inf)
            others = -scores.logsumexp(dim=-1)
        return Step(choice.candidates, choice.reference, values, combined, tilted, beta, kl, everything, others)

    def _per_row(
        self,
        setting: Tensor,
        shared_dims: int,
        values: Tensor,
        request: Tensor | None,
        requests: int | None = None,
    ) -> Tensor:
        """Weights or beta on the values' device, row by row; `shared_dims`: dimensions of one that all rows share."""
        setting = setting.to(values.device)
        if setting.ndim == shared_dims:
            return setting
        count = requests or (len(values) if request is None else len(setting))
        if count % len(setting):
            name = "weights" if shared_dims else "beta"
            raise ValueError(f"{name} are given for {len(setting)} requests, but the batch has {count} rows")
        repeats = count // len(setting)
        every = setting if repeats == 1 else setting.repeat_interleave(repeats, dim=0)
        return every if request is None else every[request]

    def _check_devices(self, scores: Tensor) -> None:
        for function in self._functions.all:
            if function.device != scores.device:
                raise ValueError(
                    f"the scores are on {scores.device}, the value function for {function.config.objectives} on "
                    f"{function.device}: pass device={str(scores.device)!r} or move it with .to()"
                )

    def _check_step(self, step: Step) -> None:
        """Raise `ValueError` if the base model or a value function gave a NaN. Waits for the device."""
        if step.broken.any():
            check_scores(step.reference)
            self._check_values(step.values, torch.isfinite(step.reference))

    def _check_values(self, values: Tensor, mask: Tensor) -> None:
        bad = ~torch.isfinite(values) & mask[..., None]
        if bad.any():
            row, candidate, m = torch.nonzero(bad)[0].tolist()
            raise ValueError(
                f"the value function for {self.objectives[m]!r} gave {float(values[row, candidate, m])} (row {row}, "
                f"candidate {candidate}): its weights are damaged or it overflows in its dtype; load it in float32"
            )
