"""MAVIS decoding as a logits processor: `model.generate(logits_processor=[mavis])`."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .config import MavisConfig
from .functions import ValueFunctions, check_context, load_value_functions, special_tokens
from .hidden import HiddenStates
from .rows import RowTracker, ended_rows, strip_padding
from .scorer import ValueScorer, make_scorer
from .tilting import combine, kl_divergence, normalize, solve_beta, tilt
from .trace import MavisStats, MavisTrace
from .value_head import ValueHead
from .value_model import ValueModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    ValueFunction = ValueModel | ValueHead


_SUSPICIOUS = 64  # calls in a row without a state: more than an assistant drafts


class MavisLogitsProcessor(LogitsProcessor):
    """Tilts next-token scores by the values of the top candidates (Algorithm 2).

    Args:
        value_functions: one `ValueModel` or `ValueHead`, several of them, or a mapping from objective to the one that
            predicts it. Without a mapping the objectives bear the names in the value functions' configs.
        weights: lambda: by objective (absent ones are 0), [M], or [R, M] for weights per sequence; equal by default.
        beta: strength of the tilt, one number or [R].
        model: the base model; needed for value heads, whose hidden states it provides.
        tokenizer: the base model's tokenizer; if given, value functions made for another one are refused.
        pad_token_id: tells left padding apart; by default the base model's, else the value models'.
        eos_token_id: by default the base model's; lets finished rows go unscored.
        trace: keep every step in `self.trace`.
        config: all other settings; see `MavisConfig`, whose fields may also be given by name.

    Attributes:
        objectives: names of the M objectives, in the order of `weights` as a tensor.
        config: the settings as a `MavisConfig`.
        stats: totals (`MavisStats`).
        trace: steps of the latest `generate` call (`MavisTrace`), or None.

    `generate` runs processors before temperature, top-k and top-p; with temperature T it samples from
    softmax((log pi_ref + beta v) / T). To tilt a reference of temperature T instead, as the paper does, pass
    `reference_temperature=T` here and leave generate's at 1. The processor returns log-probabilities, so that beams may
    be compared by their sums. One object serves any number of `generate` calls, and threads.

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
        config: MavisConfig | None = None,
        **settings: Any,
    ) -> None:
        self._functions = ValueFunctions(value_functions, tokenizer)
        config = config if config is not None else MavisConfig()
        self.config = MavisConfig.from_dict({**vars(config), **settings})
        self.weights = weights if weights is not None else self.config.weights
        self.beta = beta if beta is not None else self.config.beta
        self.pad_token_id, self._eos = special_tokens(self._functions.models, model, pad_token_id, eos_token_id)
        self.stats = MavisStats()
        self.trace = MavisTrace(self.objectives, self._eos) if trace else None
        self._local = threading.local()
        self._lock = threading.Lock()
        self._hidden: HiddenStates | None = None
        if model is not None:
            self.attach(model)

    @classmethod
    def from_pretrained(
        cls,
        value_functions: str | Sequence[str] | Mapping[str, Any],
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        model: PreTrainedModel | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        load: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> MavisLogitsProcessor:
        """Load value functions by Hub id or folder (or take them as objects) and make a processor of them.

        Args:
            value_functions: one id, several, or a mapping from objective to id or object; an id that occurs twice is
                loaded once.
            weights, beta, kwargs: as for the class.
            model: the base model; also the backbone of adapter repos that were trained on its first layers.
            device: of the value functions; by default the base model's.
            dtype: of the value models' weights.
            load: further arguments of `from_pretrained` (`revision`, `token`, `cache_dir`, ...).
        """
        loading = dict(load or {}) | ({} if dtype is None else {"dtype": dtype})
        if device is None and model is not None:
            device = model.device
        functions = load_value_functions(value_functions, model, device, loading)
        return cls(functions, weights, beta, model=model, **kwargs)

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

    def attach(self, model: PreTrainedModel) -> MavisLogitsProcessor:
        """Take hidden states from `model` until `detach`; usable as `with mavis.attach(model): ...`.

        Raises:
            ValueError: a value head was trained on another model.
        """
        self.detach()
        for head in self._functions.heads:
            head.bind(model)
        if self._functions.heads:
            self._hidden = HiddenStates(model)
        temperature = getattr(model.generation_config, "temperature", None) or 1.0
        if temperature != 1.0 and self.config.reference_temperature != 1.0:
            warnings.warn(
                f"reference_temperature={self.config.reference_temperature} and the base model's generation config has "
                f"temperature={temperature}: both will be applied. Pass temperature=1.0 to generate, to tilt as the "
                "paper does.",
                stacklevel=3,
            )
        return self

    def detach(self) -> None:
        """Remove the hooks that `attach` put on the base model."""
        if self._hidden is not None:
            self._hidden.remove()
            self._hidden = None

    def __enter__(self) -> MavisLogitsProcessor:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Free the value models' caches, and begin `stats` and `trace` anew."""
        self._local = threading.local()
        self.stats = MavisStats()
        if self.trace is not None:
            self.trace = MavisTrace(self.objectives, self._eos)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tilted log-probabilities.

        Args:
            input_ids: [R, T] tokens so far, padded on the left.
            scores: [R, V] the base model's next-token scores.

        Returns:
            [R, V] in the dtype of `scores`.
        """
        self._check(input_ids, scores)
        if _is_probe(scores):
            self.stats.passed_through += 1
            return scores
        hidden = None
        if self._functions.heads:
            if self._hidden is None:
                raise ValueError(
                    "a value head needs the base model's hidden states: pass model=model, or use mavis.attach(model)"
                )
            hidden = self._hidden.take(input_ids.shape[1])
            if hidden is None or len(hidden) != len(scores):
                self._pass_through()
                return scores
            self._local.passed = 0
        reference = torch.log_softmax(scores.float() / self.config.reference_temperature, dim=-1)
        log_ref, candidates = self._candidates(reference)
        if torch.isnan(log_ref[:, 0]).any():
            raise ValueError("the base model's scores hold NaN: it overflows in its dtype, or its weights are damaged")
        started = time.perf_counter()
        live = ~ended_rows(input_ids, self._eos, self.pad_token_id)
        values = self._values(input_ids, hidden, candidates, live)
        seconds = time.perf_counter() - started
        mask = torch.isfinite(log_ref)
        self._check_values(values, mask & live[:, None])

        weights, beta = self._per_row(self._weights, 1, scores), self._per_row(self._beta, 0, scores)
        combined = combine(values, weights)
        normalised = normalize(combined, mask, self.config.normalize, self.config.gap_floor)
        keep = self.config.unscored == "keep"
        policy, base = normalised, log_ref  # of all tokens that keep a probability
        if keep:
            policy, base = torch.zeros_like(reference).scatter(1, candidates, normalised), reference
        if self.config.kl_budget is not None:
            beta = solve_beta(base, policy, self.config.kl_budget)
        tilted = torch.log_softmax(tilt(base, policy, beta), dim=-1)
        counted = live & ~torch.isin(input_ids[:, -1], torch.tensor(sorted(self._eos), device=scores.device))
        kl = torch.where(counted, kl_divergence(tilted, base), 0.0)
        with self._lock:
            self.stats.add(len(scores), kl, seconds)
        if self.trace is not None:
            step = {"live": live, "candidates": candidates, "reference": log_ref, "kl": kl}
            step |= {"tilted": tilted.gather(1, candidates) if keep else tilted, "beta": beta.expand(len(scores))}
            step["values"] = values.masked_fill(torch.tensor(self._idle, device=values.device), torch.nan)
            self._record(input_ids, step)
        if self._leaves_scores_alone(log_ref.shape[1], scores.shape[1]):
            return scores
        if not keep:
            tilted = torch.full_like(reference, -torch.inf).scatter(1, candidates, tilted)
        return torch.where(live[:, None], tilted.to(scores.dtype), scores)

    def _pass_through(self) -> None:
        """Count a call without a state of the base model behind it; so many in a row are no assistant's drafts."""
        self.stats.passed_through += 1
        self._local.passed = getattr(self._local, "passed", 0) + 1
        if self._local.passed == _SUSPICIOUS:
            warnings.warn(
                f"{_SUSPICIOUS} calls in a row came without a hidden state of the model that this processor is "
                "attached to, and were left unsteered: is another model generating? Call mavis.attach(model) with it.",
                stacklevel=3,
            )

    def _candidates(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        """log pi_ref [R, k] of the k likeliest tokens, and their ids [R, k] (Algorithm 2, line 2)."""
        if self.config.top_k is None:
            return reference, torch.arange(reference.shape[1], device=reference.device).expand_as(reference)
        top = reference.topk(min(self.config.top_k, reference.shape[1]), dim=-1)
        return top.values, top.indices

    def _values(self, input_ids: Tensor, hidden: Tensor | None, candidates: Tensor, live: Tensor) -> Tensor:
        """Values [R, k, M] of the candidates; those of rows that are not `live` mean nothing."""
        parts: dict[int, Tensor] = {}
        for head in self._functions.heads:
            assert hidden is not None
            parts[id(head)] = head(hidden, None if self.config.top_k is None else candidates)
        if self._functions.models:
            sequences = strip_padding(input_ids.cpu().numpy(), self.pad_token_id)
            going = [sequence for sequence, goes_on in zip(sequences, live.tolist(), strict=True) if goes_on]
            everything = len(going) == len(sequences)
            for model, values in self._score(going, candidates if everything else candidates[live]).items():
                every = (
                    values if everything else values.new_zeros(len(live), *values.shape[1:]).index_put((live,), values)
                )
                parts[model] = every
        return self._functions.gather(parts)

    def _score(self, sequences: list[Any], candidates: Tensor) -> dict[int, Tensor]:
        """Values [R, k, M] of every value model that has weight, by its id."""
        models = self._functions.busy_models(self._idle)
        for model in models:
            check_context(model, max(map(len, sequences)) + 1)
        fed = candidates.cpu().numpy()
        values = {}
        for model in models:
            tracker, scorer = self._session(model)
            try:
                values[id(model)] = scorer.score(tracker.plan(sequences), candidates)
            except BaseException:  # the cache may be half updated
                del self._local.sessions[id(model)]
                raise
            tracker.update(sequences, fed)
        return values

    def _session(self, model: ValueModel) -> tuple[RowTracker, ValueScorer]:
        """This thread's cache for `model`. It outlives a `generate` call: a next chat turn goes on from it."""
        sessions = self._local.__dict__.setdefault("sessions", {})
        if id(model) not in sessions:
            sessions[id(model)] = (RowTracker(), make_scorer(model))
        return sessions[id(model)]

    def _per_row(self, setting: Tensor, shared_dims: int, scores: Tensor) -> Tensor:
        """Weights or beta on the scores' device; those given per request are repeated for its beams or samples.

        `shared_dims` is the number of dimensions of a setting that all rows share.
        """
        setting = setting.to(scores.device)
        if setting.ndim == shared_dims or len(setting) == len(scores):
            return setting
        if len(scores) % len(setting):
            name = "weights" if shared_dims else "beta"
            raise ValueError(f"{name} are given for {len(setting)} requests, but the batch has {len(scores)} rows")
        return setting.repeat_interleave(len(scores) // len(setting), dim=0)

    def _leaves_scores_alone(self, k: int, vocabulary: int) -> bool:
        """With beta 0 and nothing cut, generate's own scores are handed back: not a bit changes."""
        config = self.config
        plain = config.kl_budget is None and config.reference_temperature == 1.0 and not self._beta.any()
        return plain and (k == vocabulary or config.unscored == "keep")

    def _record(self, input_ids: Tensor, step: dict[str, Tensor]) -> None:
        """Add a step to the trace, which begins anew with every `generate` call."""
        assert self.trace is not None
        before: Tensor | None = getattr(self._local, "traced", None)
        if before is not None and _begins(before, input_ids):
            self.trace.took(input_ids[:, before.shape[1]])
        elif not _begins(getattr(self._local, "prompt", None), input_ids):  # nor beams reordered, or drafts rejected
            self.trace = MavisTrace(self.objectives, self._eos)
            self._local.prompt = input_ids.clone()
        self._local.traced = input_ids.clone()
        self.trace.add(length=input_ids.shape[1], taken=torch.full_like(input_ids[:, 0], -1), **step)

    def _check(self, input_ids: Tensor, scores: Tensor) -> None:
        if (
            not isinstance(input_ids, Tensor)
            or input_ids.ndim != 2
            or scores.ndim != 2
            or len(input_ids) != len(scores)
        ):
            raise ValueError(
                "MavisLogitsProcessor needs the tokens so far, [rows, length], beside scores [rows, vocabulary]; got "
                f"{getattr(input_ids, 'shape', None)} and {tuple(scores.shape)}. Continuous batching gives processors "
                "no history: use generate, or generate_batch without this processor."
            )
        if input_ids.is_floating_point() or not scores.is_floating_point():
            raise ValueError(
                f"expected whole-number token ids and floating-point scores, got {input_ids.dtype} and {scores.dtype}"
            )
        if input_ids.shape[1] == 0:
            raise ValueError("the prompt is empty: give generate at least one token to go on from")
        for function in self._functions.all:
            if function.device != scores.device:
                raise ValueError(
                    f"the scores are on {scores.device}, the value function for {function.config.objectives} on "
                    f"{function.device}: pass device={str(scores.device)!r} or move it with .to()"
                )
        self._functions.check_vocabulary(scores.shape[1])

    def _check_values(self, values: Tensor, mask: Tensor) -> None:
        bad = ~torch.isfinite(values) & mask[..., None]
        if bad.any():
            row, candidate, m = torch.nonzero(bad)[0].tolist()
            raise ValueError(
                f"the value function for {self.objectives[m]!r} gave {float(values[row, candidate, m])} (row {row}, "
                f"candidate {candidate}): its weights are damaged or it overflows in its dtype; load it in float32"
            )


def _begins(prefix: Tensor | None, input_ids: Tensor) -> bool:
    """Whether every row of `input_ids` [R, T] goes on from the same row of `prefix` [R, T'], T' < T."""
    if prefix is None or len(prefix) != len(input_ids) or prefix.shape[1] >= input_ids.shape[1]:
        return False
    return torch.equal(prefix, input_ids[:, : prefix.shape[1]])


def _is_probe(scores: Tensor) -> bool:
    """Whether the scores are all the same: prompt lookup asks in this way which tokens are forbidden. None is."""
    first = scores[0, 0]
    return bool((scores[0, :8] == first).all()) and bool((scores == first).all())
