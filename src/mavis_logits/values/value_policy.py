"""Values in the form of a policy: what a tuned copy of the base model makes likelier.

The optimum of equation 1 is pi*(a | s) proportional to pi_ref(a | s) exp(Q(s, a) / eta), Q being its soft values. So a
policy that was tuned for an objective holds them, up to what all tokens of a step share:

    V(s + a) = log pi_tuned(a | s) - log pi_ref(a | s) = Q(s, a) / eta + c(s)

Any adapter will do that was tuned with a KL penalty against this base model: by path consistency on trees or DPO
(`mavis tune`), by TRL. It reads every text beside the base model, in a cache of its own: one forward more a step for
all candidates at once, and its layers are the base model's own, so that only the adapter takes memory. With
`normalize="none"` beta = 1 is the tuned model itself; strengths between and beyond, and mixtures with other value
functions, are what tuning alone cannot give.

What a cautiously tuned policy says is small: in bfloat16 a tenth of its variance is rounding of the logits, which a
large beta multiplies, and a tilt that goes far is not linear in the adapter's weights. So its adapter can be read at a
`strength` of its own, about that at which it steers, to which beta then adds little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..backbone import Backbone
from ..backbone.fingerprint import Identity, parameters_fingerprint
from ..backbone.weights import WeakModel, twin
from ..core.objectives import ObjectivesMixin
from ..hub.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_file, hub_arguments
from .words import Place, Words

SETTINGS = {"beta": 3.0, "top_k": 200, "unscored": "expected", "normalize": "standard"}


class ValuePolicyConfig(ObjectivesMixin, PreTrainedConfig):
    """Configuration of a `ValuePolicy`, beside the adapter in its folder.

    Args:
        vocab_size: token ids that it knows.
        backbone_fingerprint, backbone_sketch: of the base model's weights (`backbone.fingerprint.Identity`).
        eta: of equation 1, that it was tuned with; None if unknown.
        strength: what the adapter's weights are multiplied by (LoRA only). It is also what `normalize="standard"`
            divides by, if `tilt_scale` is None: one beta tilts about as far at every strength.
        objectives, reward_mean, reward_scale, tilt_scale, tokenizer_fingerprint, base_model, base_revision, recipe,
            iteration, settings: see `ObjectivesMixin`; one objective.
    """

    model_type = "mavis_value_policy"

    def __init__(
        self,
        vocab_size: int | None = None,
        backbone_fingerprint: str | None = None,
        backbone_sketch: str | None = None,
        eta: float | None = None,
        strength: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength < float("inf"):
            raise ValueError(f"strength must be a positive number, got {strength!r}")
        self.vocab_size, self.eta, self.strength = vocab_size, eta, strength
        self.backbone_fingerprint, self.backbone_sketch = backbone_fingerprint, backbone_sketch
        kwargs = self._take_objectives(kwargs)
        if len(self.objectives) != 1:
            raise ValueError(f"a tuned policy is for one objective, got {self.objectives}")
        super().__init__(**kwargs)

    @classmethod
    def of(cls, model: PreTrainedModel, objective: str, **fields: Any) -> ValuePolicyConfig:
        """That of an adapter tuned on `model` for `objective`."""
        identity = Identity(model)
        return cls(
            vocab_size=Backbone.of(model).vocabulary,
            backbone_fingerprint=identity.fingerprint,
            backbone_sketch=identity.sketch,
            objectives=[objective],
            base_model=model.config.name_or_path or None,
            **({"settings": dict(SETTINGS)} | fields),
        )

    def units(self) -> Tensor:
        """As for every value function, but for what a tilt counts as one: the `strength`, if nothing else is said."""
        mean, scale, tilt = super().units()
        return torch.stack([mean, scale, torch.full_like(tilt, self.strength) if self.tilt_scale is None else tilt])

    def require_base(self, model: PreTrainedModel) -> None:
        """Raise `ValueError` if it was tuned on another model, as far as that is known."""
        difference = Identity(model).difference(self.backbone_fingerprint, self.backbone_sketch)
        if self.backbone_fingerprint is not None and difference is not None:
            raise ValueError(
                f"the policy for {self.objectives} was tuned on {self.base_model or 'another model'}, not on this "
                f"{type(model).__name__} ({difference}): tune one on it, or load the model that it belongs to"
            )


class ValuePolicy(Words):
    """A value function of one objective, in nats, from a tuned policy.

    Args:
        config: what it is for.
        policy: the tuned model, of the base model's tokenizer; a causal language model of any size.
    """

    config: ValuePolicyConfig  # type: ignore[assignment]

    def __init__(self, config: ValuePolicyConfig, policy: PreTrainedModel) -> None:
        Backbone.of(policy).require_causal()
        self.config, self._policy = config, policy.eval()
        self._base = WeakModel()

    @classmethod
    def from_pretrained(cls, name: str | Path, model: PreTrainedModel, **kwargs: Any) -> ValuePolicy:
        """The policy in a folder or Hub repository of an adapter, on `model`, which stays as it is.

        Args:
            name: as `mavis tune` writes it: a PEFT adapter with a `ValuePolicyConfig`.
            model: the base model.
            kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained` everywhere.

        Raises:
            ValueError: an adapter for another model, or one with a strength that is no LoRA.
            OSError: nothing there, or an adapter without config.
        """
        hub = hub_arguments(kwargs)
        bare = "ValuePolicy.from_adapter takes a bare adapter, with the name of its objective"
        if find_file(str(name), "config.json", hub) is None:
            raise OSError(f"{name} has no config.json, which says what a tuned policy is for: {bare}")
        config = AutoConfig.from_pretrained(name, **hub)
        if not isinstance(config, ValuePolicyConfig):
            raise ValueError(f"{name} has a config of type {config.model_type!r}, not of a tuned policy: {bare}")
        config.require_base(model)
        return cls(config, _tuned(str(name), model, hub, config.strength))

    @classmethod
    def from_adapter(
        cls, name: str | Path, objective: str, model: PreTrainedModel, strength: float = 1.0, **kwargs: Any
    ) -> ValuePolicy:
        """The same from a bare PEFT adapter: of TRL, of anybody.

        Args:
            name: of the adapter.
            objective: that it was tuned for.
            model: the base model.
            strength: what its weights are multiplied by.
            kwargs: as for `from_pretrained`.

        Raises:
            ValueError: another strength than 1 for what is no LoRA.
            OSError: nothing there.
        """
        config = ValuePolicyConfig.of(model, objective, strength=strength)
        return cls(config, _tuned(str(name), model, hub_arguments(kwargs), strength))

    def bind(self, model: PreTrainedModel) -> ValuePolicy:
        """Look whether it can steer `model`; returns self.

        Raises:
            ValueError: it knows fewer tokens, or one of both reads prompts with an encoder and the other does not.
        """
        if Backbone.of(model).is_encoder_decoder != Backbone.of(self._policy).is_encoder_decoder:
            raise ValueError(
                f"of {type(model).__name__} and the policy for {self.config.objectives}, a "
                f"{type(self._policy).__name__}, one reads prompts with an encoder and the other not: use a policy "
                "tuned from the base model"
            )
        own, wanted = Backbone.of(self._policy).scores, Backbone.of(model).scores
        if own < wanted:
            raise ValueError(
                f"the policy for {self.config.objectives} has scores for {own} tokens, the base model for {wanted}: "
                "use one of the base model's own tokenizer"
            )
        return self

    @property
    def backbone(self) -> PreTrainedModel:
        """The tuned model."""
        return self._policy

    @property
    def fingerprint(self) -> str:
        """Of all that it says: of the tuned model's weights, and of the strength if that is not 1."""
        own, strength = parameters_fingerprint(self._policy), self.config.strength
        return own if strength == 1 else f"{own} x {strength:g}"

    @property
    def told(self) -> str:
        return f"the tuned policy for {self.config.objectives}"

    @property
    def units(self) -> Tensor:
        """Mean 0 and scale 1, values being in nats, and what counts as one in a tilt: [3, 1]."""
        return self.config.units()

    def to(self, device: torch.device | str) -> ValuePolicy:
        """Move it; what it shares with the base model has moved already."""
        self._policy.to(device)  # type: ignore[arg-type]
        return self

    def places(self, text: Any) -> list[Place]:
        """Nothing is put into its texts."""
        return [Place(0, 0, [])]


def _tuned(name: str, model: PreTrainedModel, hub: dict[str, Any], strength: float) -> PreTrainedModel:
    """`model` with an adapter on it, `strength` times, as a second model that shares all weights with the first."""
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if find_file(name, file, hub) is None:
            raise OSError(f"{name} has no {file}: expected an adapter, as mavis tune, TRL or PEFT writes it")
    with twin(model) as own:
        tuned = PeftModel.from_pretrained(own, name, **{k: v for k, v in hub.items() if k != "force_download"})
    if strength != 1.0:
        adapted = [layer for layer in tuned.modules() if isinstance(layer, LoraLayer)]
        if not adapted:
            kind = tuned.active_peft_config.peft_type
            raise ValueError(f"{name} is an adapter of the kind {kind}, which has no strength: leave it at 1")
        for layer in adapted:
            layer.set_scale(tuned.active_adapter, strength)
    policy: PreTrainedModel = tuned.get_base_model()  # type: ignore[assignment]
    return policy.eval()


AutoConfig.register(ValuePolicyConfig.model_type, ValuePolicyConfig, exist_ok=True)
