"""Value functions and the policy that they steer by: what the logits processor and all strategies share."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack, get_args

import torch
from torch import Tensor

from ..backbone import Backbone
from ..core.config import MavisConfig, settled
from ..hub.files import LOADING_ARGUMENTS
from ..scoring.scorer import WantedReading
from ..values.ensemble import ValueFunctions, with_words
from ..values.function import ValueFunction
from ..values.loading import bundled, load_value_functions
from ..values.special_tokens import special_tokens
from .copies import Copied
from .policy import Policy
from .regions import Regions
from .signatures import OfClass, Settings, require_known, shown, signature
from .step import Step, check_scores
from .trace import MavisStats, MavisTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Steering(Copied):
    """Value functions and how they tilt a reference. `MavisLogitsProcessor` and the strategies are two uses of it.

    Args:
        value_functions: one `ValueModel` or `ValueHead`, several of them, or a mapping from objective to the one that
            predicts it. Without a mapping the objectives bear the names in the value functions' configs. None where all
            objectives are in words.
        weights: lambda: by objective (absent ones are 0), [M], or [R, M] for weights per sequence; equal by default.
        beta: strength of the tilt, one number or [R]; by default that of `config`.
        objectives: further ones, in words: an instruction by name (`values.words`), such as
            `{"joke": "Answer with a joke."}`. A name in `weights` that is a sentence is one of itself. They need
            `model` and `tokenizer`, and no training.
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
        regions: which tokens of an answer are steered (`steering.regions`), by a processor: not the thinking, the code,
            the tool calls; for all requests alike, or one for each. They need `tokenizer`.
        config: all other settings; see `MavisConfig`, whose fields may also be given by name. By default what the value
            functions themselves recommend (`ObjectivesMixin.settings`), else the paper's.

    Attributes:
        objectives: names of the M objectives, in the order of `weights` as a tensor.
        functions: the value functions (`values.ensemble.ValueFunctions`).
        policy: settings and weights, and the arithmetic of a step (`Policy`).
        config: the settings as a `MavisConfig`.
        idle: [M] whether no value of the objective is asked for: it is a value function's, all whose weights are 0.
        special: what pads, begins and ends texts (`values.ensemble.SpecialTokens`).
        stats: totals (`MavisStats`).
        trace: steps of the latest `generate` call (`MavisTrace`), or None.

    Raises:
        ValueError: unknown objective, weights or settings out of range, a value function of another vocabulary,
            tokenizer, device or base model, a NaN value. Raised before anything is generated where it can be.
    """

    _whatever_is_recommended: ClassVar[dict[str, Any]] = {}  # settings of a class that can do with no others

    def __init__(
        self,
        value_functions: ValueFunction | Sequence[ValueFunction] | Mapping[str, ValueFunction] | None = None,
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        objectives: Mapping[str, str] | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        trace: bool = False,
        fuse: bool | None = None,
        compile: bool = False,
        reading: WantedReading = "auto",
        regions: Regions | Sequence[Regions | None] | None = None,
        config: MavisConfig | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        require_known(type(self), settings, Settings.__annotations__)
        if reading not in get_args(WantedReading):
            raise ValueError(f"reading must be one of {', '.join(get_args(WantedReading))}, got {reading!r}")
        self._policy: Policy
        self._policy_kept: tuple[Policy, float, Policy] | None = None  # the last of `policy_at`
        self._base: weakref.ref[PreTrainedModel] | None = None
        weights = weights if weights is not None or config is None else config.weights
        self.functions = ValueFunctions(with_words(value_functions, objectives, weights, tokenizer), tokenizer, fuse)
        base = self.functions.recommended | self._whatever_is_recommended if config is None else vars(config)
        config = settled(base, settings, beta)
        self._check_config(config)
        self._steer_by(config, weights, beta if beta is not None else config.beta)
        self.special = special_tokens(self.functions.of_ids, model, tokenizer, pad_token_id, eos_token_id)
        self.tokenizer, self.compile, self.reading = tokenizer, compile, reading
        self.regions = regions
        self.stats = MavisStats()
        self.trace = MavisTrace(self.objectives, self.special.eos) if trace else None
        if model is not None:
            self.attach(model)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._show_signatures()

    @classmethod
    def _show_signatures(cls) -> None:
        """Let `help`, and editors that ask a running Python, name every keyword argument of this class."""
        own = signature(cls.__init__)
        _, *parameters = own.parameters.values()
        cls.__signature__ = OfClass(own.replace(parameters=parameters))  # type: ignore[attr-defined]
        if "from_pretrained" not in vars(cls):
            loader = Steering.from_pretrained.__func__  # type: ignore[attr-defined]
            shown_here = signature(loader, {parameter.name: parameter for parameter in parameters})
            cls.from_pretrained = classmethod(shown(loader, shown_here))  # type: ignore[assignment, method-assign]

    @classmethod
    def from_pretrained(
        cls,
        value_functions: str | Path | Sequence[str] | Mapping[str, Any] | None = None,
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
                loaded once. One id may be that of a bundle, whose settings then are the defaults. None where all
                objectives are in words.
            weights, beta, fuse, kwargs: as for the class.
            model: the base model; also the backbone of adapter repos that were trained on its first layers.
            device: of the value functions; by default the base model's.
            dtype: of the value models' weights.
            load: further arguments of `from_pretrained`, which may also be given by name: `revision`, `token`,
                `cache_dir`, `local_files_only`, `subfolder`, `force_download`, `device_map`.
        """
        named = {key: kwargs.pop(key) for key in LOADING_ARGUMENTS if key in kwargs}
        taken = inspect.signature(cls).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            require_known(cls, kwargs, taken)  # before anything is loaded
        loading = {**(load or {}), **named} | ({} if dtype is None else {"dtype": dtype})
        if device is None and model is not None and loading.get("device_map") is None:
            device = model.device
        sources, settings = bundled(value_functions, loading)
        if settings is not None:
            kwargs["config"] = kwargs.get("config") or settings
        functions = load_value_functions(sources, model, device, loading, fuse)
        return cls(functions, weights, beta, model=model, fuse=fuse, **kwargs)

    @property
    def objectives(self) -> list[str]:
        """Names of the M objectives."""
        return self.functions.objectives

    @property
    def pad_token_id(self) -> int | None:
        """What fills up rows; None if it is not known."""
        return self.special.pad

    @property
    def policy(self) -> Policy:
        """Settings and weights as they are now. Each of them may be set between steps, by its own name."""
        return self._policy

    def policy_at(self, temperature: float) -> Policy:
        """`policy` where `generate` samples at a temperature, beside `reference_temperature`."""
        own, kept = self._policy, self._policy_kept
        if temperature == 1.0:
            return own
        if kept is None or kept[0] is not own or kept[1] != temperature:
            weight = self.functions.log_prob_weights(own.config.reference_temperature * temperature)
            kept = self._policy_kept = own, temperature, replace(own, log_prob_weight=weight)
        return kept[2]

    @property
    def regions(self) -> Regions | Sequence[Regions | None] | None:
        """Where answers are steered: in all requests alike, or one for each; None for everywhere. May be set between
        calls."""
        return self._regions

    @regions.setter
    def regions(self, regions: Regions | Sequence[Regions | None] | None) -> None:
        every = list(regions) if isinstance(regions, Sequence) else [regions]
        if not every or not all(one is None or isinstance(one, Regions) for one in every):
            raise ValueError(f"regions must be Regions, or a list of one (or None) for each request, got {regions!r}")
        if self.tokenizer is None and any(one is not None and (one.skip or one.only) for one in every):
            raise ValueError("regions look for marks in the text: pass tokenizer= as well")
        self._regions = regions

    @property
    def config(self) -> MavisConfig:
        """The settings. May be set between steps; `weights` and `beta` are not taken from it then."""
        return self._policy.config

    @config.setter
    def config(self, config: MavisConfig) -> None:
        self._check_config(config)
        weight = self.functions.log_prob_weights(config.reference_temperature)
        self._policy = replace(self._policy, config=config, log_prob_weight=weight)

    @property
    def weights(self) -> Tensor:
        """lambda, float32 [M] or [R, M]. May be set between steps, to anything that the constructor takes."""
        return self._policy.weights

    @weights.setter
    def weights(self, weights: Mapping[str, float] | Sequence[float] | Tensor | None) -> None:
        self._steer_by(self.config, weights, self.beta)

    @property
    def beta(self) -> Tensor:
        """Strength of the tilt, float32 [] or [R]. May be set between steps."""
        return self._policy.beta

    @beta.setter
    def beta(self, beta: float | Tensor) -> None:
        self._policy = replace(self._policy, beta=torch.as_tensor(beta, dtype=torch.float32))

    def _steer_by(self, config: MavisConfig, weights: Any, beta: Any) -> None:
        own = self.functions.weights(weights)
        scale, weight = self.functions.units()[2], self.functions.log_prob_weights(config.reference_temperature)
        self._policy = Policy(config, own, torch.as_tensor(beta, dtype=torch.float32), scale, weight)
        self.idle = self.functions.idle(own)

    def _check_config(self, config: MavisConfig) -> None:
        if config.top_k is None and self.functions.value_models:
            raise ValueError(
                "top_k=None scores the whole vocabulary, which only value heads can: give top_k for value models"
            )

    def attach(self, model: PreTrainedModel) -> Self:
        """Make `model` the base model.

        Raises:
            ValueError: a value head was trained on another model, or a value model cannot read what `model` is given.
        """
        for words in self.functions.words:
            words.bind(model)
        if Backbone.of(model).is_encoder_decoder and self.functions.value_models:
            names = [value_model.config.objectives for value_model in self.functions.value_models]
            raise ValueError(
                f"{type(model).__name__} reads its prompts with an encoder, which the value models for {names} never "
                "see: use value heads"
            )
        for head in self.functions.heads:
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

    def follow_base(self) -> None:
        """Raise `ValueError` if the base model has become one that the value heads are not for."""
        for head in self.functions.heads:
            head.follow()

    def reset(self) -> None:
        """Begin `stats` and `trace` anew."""
        self.stats = MavisStats()
        if self.trace is not None:
            self.trace = MavisTrace(self.objectives, self.special.eos)

    def known(self, scores: Tensor) -> Tensor:
        """`scores` [R, V] without ids that are no tokens (`ValueFunctions.known`)."""
        return self.functions.known(scores, self.tokenizer)

    def check_devices(self, scores: Tensor) -> None:
        """Raise `ValueError` if a value function is on another device than `scores`."""
        for function in self.functions.all:
            if function.device != scores.device:
                raise ValueError(
                    f"the scores are on {scores.device}, the value function for {function.config.objectives} on "
                    f"{function.device}: pass device={str(scores.device)!r} or move it with .to()"
                )

    def check_step(self, step: Step) -> None:
        """Raise `ValueError` if the base model or a value function gave a NaN. Waits for the device."""
        if step.broken.any():
            check_scores(step.reference)
            self.check_values(step.values, torch.isfinite(step.reference))

    def check_values(self, values: Tensor, mask: Tensor) -> None:
        """Raise `ValueError` if one of `values` [R, k, M] is not finite where `mask` [R, k]. Waits for the device."""
        bad = ~torch.isfinite(values) & mask[..., None]
        if bad.any():
            row, candidate, m = torch.nonzero(bad)[0].tolist()
            raise ValueError(
                f"the value function for {self.objectives[m]!r} gave {float(values[row, candidate, m])} (row {row}, "
                f"candidate {candidate}): its weights are damaged or it overflows in its dtype; load it in float32"
            )


Steering._show_signatures()
