"""Value models that share a backbone, run as one: a leading dimension for the adapters, one forward for all objectives.

LoRA adapters on the same weights are scored together: every linear layer multiplies the tokens of all C adapters by
the shared weight at once and adds C low-rank updates as one batched product. The backbone is in memory once. Models
without an adapter that share a backbone are the case C = 1 with several heads.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..backbone import Backbone
from ..backbone.watch import Watch
from ..core.config import recommended
from ..core.objectives import log_prob_weight_of
from .value_model import ValueModel, ValueModelOutput
from .value_model_config import ValueModelConfig


class StackedLoRALinear(nn.Module):
    """y_c = W x_c + B_c A_c x_c for adapters c = 1 .. C, the first dimension of x being C times the rows.

    Args:
        base: the frozen layer with weight W.
        updates: (A [r_c, in], B [out, r_c]) of each adapter, scaled; None for one that leaves this layer alone. Ranks
            may differ: the smaller ones are filled up with zeros.
    """

    down: Tensor  # [C, in, r]
    up: Tensor  # [C, r, out]

    def __init__(self, base: nn.Module, updates: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        super().__init__()
        self.base = base
        down, up = next(update for update in updates if update is not None)
        rank = max(len(update[0]) for update in updates if update is not None)
        self.register_buffer("down", down.new_zeros(len(updates), down.shape[1], rank), persistent=False)
        self.register_buffer("up", up.new_zeros(len(updates), rank, up.shape[0]), persistent=False)
        for c, update in enumerate(updates):
            if update is not None:
                own = len(update[0])
                self.down[c, :, :own], self.up[c, :own] = update[0].T, update[1].T

    def forward(self, x: Tensor) -> Tensor:
        """[C * n, ..., in] -> [C * n, ..., out]."""
        y = self.base(x)
        copies = len(self.down)
        low = torch.bmm(x.reshape(copies, -1, x.shape[-1]), self.down)
        if torch.is_autocast_enabled(x.device.type):  # which casts no operation that is in place
            return y + torch.bmm(low, self.up).view_as(y)
        y.view(copies, -1, y.shape[-1]).baddbmm_(low, self.up)  # in place: y is nobody else's
        return y


class FusedValueModel(nn.Module):
    """Several value models on one backbone, whose values come out of one forward.

    Args:
        models: value models with the same backbone weights, each with a LoRA adapter of its own or none.

    Attributes:
        copies: C, how many versions of every row the backbone runs.
        objectives of `config`: all the models', in their order.

    Raises:
        ValueError: the models cannot be fused (`why_not_fused` says why).
    """

    reads: Literal["tokens"] = "tokens"
    weight: Tensor  # [C, m, d]
    bias: Tensor  # [C, m]
    version: Tensor  # [M] which version every objective is an output of
    output: Tensor  # [M] and which of its outputs

    def __init__(self, models: Sequence[ValueModel]) -> None:
        super().__init__()
        reason = next((r for m in models[1:] if (r := why_not_fused(models[0], m)) is not None), None)
        if reason is not None:
            raise ValueError(f"these value models cannot be scored in one forward: {reason}")
        # Not kept: their backbones may be further copies of the one that is kept. What is gone does not change.
        self._sources = [(weakref.ref(model), Watch(model, autocast=False)) for model in models]
        bare = [model for model in models if model.lora is None]
        adapted = [model for model in models if model.lora is not None]
        versions = [*adapted, *bare[:1]]  # models without an adapter share one
        first = models[0].config
        self.config = ValueModelConfig(
            backbone_config=first.backbone_config,
            objectives=[name for model in models for name in model.config.objectives],
            reward_mean=[x for model in models for x in model.config.reward_mean],
            reward_scale=[x for model in models for x in model.config.reward_scale],
            tilt_scale=[x for model in models for x in model.units[2].tolist()],
            log_prob_weight=log_prob_weight_of((m.config, i) for m in models for i in range(len(m.config.objectives))),
            settings=recommended(model.config.settings for model in models),
            base_model=first.base_model,
            tokenizer_fingerprint=first.tokenizer_fingerprint,
            pad_token_id=first.pad_token_id,
            eos_token_id=getattr(first, "eos_token_id", None),
        )
        self.copies = len(versions)
        self.backbone = _stacked_backbone(versions)
        self.backbone.copies = self.copies
        self.dtype = models[0].dtype

        # Heads of one version are stacked, and filled up to as many outputs as the widest version has.
        heads = [[m for m in models if m is v or (m.lora is None and v.lora is None)] for v in versions]
        weights = [torch.cat([m.head.weight.detach().float() for m in own]) for own in heads]
        biases = [torch.cat([m.head.bias.detach().float() for m in own]) for own in heads]
        self.register_buffer("weight", nn.utils.rnn.pad_sequence(weights, batch_first=True), persistent=False)
        self.register_buffer("bias", nn.utils.rnn.pad_sequence(biases, batch_first=True), persistent=False)
        place = {}
        for c, own in enumerate(heads):
            start = 0
            for model in own:
                place[id(model)] = (c, start)
                start += len(model.config.objectives)
        columns = [(place[id(m)][0], place[id(m)][1] + i) for m in models for i in range(len(m.config.objectives))]
        self.register_buffer("version", torch.tensor([c for c, _ in columns]), persistent=False)
        self.register_buffer("output", torch.tensor([i for _, i in columns]), persistent=False)
        self.to(models[0].device)
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.backbone.device

    @property
    def units(self) -> Tensor:
        """Of all objectives: mean and scale of the rewards, and what counts as one in a tilt, [3, M] on the CPU."""
        return self.config.units()

    def refresh(self, thorough: bool = True) -> None:
        """Raise `ValueError` if one of the models fused here is another by now, whose values this one would not give.

        Args:
            thorough: look closely (`Watch`).
        """
        for source, watch in self._sources:
            if (model := source()) is not None and watch.changed(thorough):
                raise ValueError(
                    f"the value model for {model.config.objectives} was trained, loaded, cast or moved after it had "
                    "been fused with others: make a new processor or strategy of them, or use fuse=False, which "
                    "follows such changes"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sources": []}  # in another process they are not

    @torch.no_grad()
    def forward(self, past_key_values: object = None, **inputs: object) -> ValueModelOutput:
        """Standardised values [C * R, T, m] of every prefix under every version; `join` makes values of them.

        Args:
            past_key_values, inputs: as for `ValueModel.forward`, every row C times, version after version.
        """
        hidden, cache = Backbone.of(self.backbone).states(cache=past_key_values, **inputs)  # type: ignore[arg-type]
        rows = hidden.reshape(self.copies, -1, hidden.shape[-1]).float()
        values = torch.baddbmm(self.bias[:, None], rows, self.weight.transpose(1, 2))
        return ValueModelOutput(values.view(*hidden.shape[:-1], -1), cache)  # type: ignore[arg-type]

    def join(self, values: Tensor) -> Tensor:
        """[C, R, k, m] standardised -> [R, k, M] in reward units."""
        mean, scale = self.config.reward_units(values.device)
        return mean + scale * values[self.version, :, :, self.output].permute(1, 2, 0)


def why_not_fused(first: ValueModel, other: ValueModel) -> str | None:
    """Why two value models cannot be scored in one forward; None if they can."""
    reading = Backbone.of(first.backbone).reading
    if not reading.ragged:
        return f"their backbone keeps no token-addressed cache ({reading.reason})"
    names = f"{first.config.objectives} and {other.config.objectives}"
    for model in (first, other):
        for name, layer in _adapted_layers(model).items():
            if any(layer.use_dora.values()) or any(getattr(layer, "lora_bias", {}).values()) or layer.lora_embedding_A:
                return f"the adapter for {model.config.objectives} is no plain LoRA on linear layers (at {name})"
    if (first.device, first.dtype) != (other.device, other.dtype):
        return f"{names} are on {first.device} in {first.dtype} and on {other.device} in {other.dtype}"
    one, two = _shared_weights(first), _shared_weights(other)
    if one.keys() != two.keys():
        return f"the backbones for {names} have different layers"
    for key, weight in one.items():
        if weight.shape != two[key].shape or not (weight.data_ptr() == two[key].data_ptr() or weight.equal(two[key])):
            return f"the backbones for {names} differ (at {key})"
    return None


def fusable_groups(models: Sequence[ValueModel]) -> list[list[ValueModel]]:
    """The groups of at least two among `models` that can be scored in one forward."""
    groups: list[list[ValueModel]] = []
    for model in models:
        for group in groups:
            if why_not_fused(group[0], model) is None:
                group.append(model)
                break
        else:
            groups.append([model])
    return [group for group in groups if len(group) > 1]


def _adapted_layers(model: ValueModel) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in model.backbone.named_modules() if isinstance(layer, LoraLayer)}


def _shared_weights(model: ValueModel) -> dict[str, Tensor]:
    """The backbone's own weights by their names without an adapter."""
    return {
        name.replace(".base_layer", ""): weight
        for name, weight in model.backbone.state_dict().items()
        if ".lora_" not in name
    }


def _stacked_backbone(versions: Sequence[ValueModel]) -> PreTrainedModel:
    """A backbone that shares its weights with the first model's, all adapters stacked on it."""
    source = versions[0].backbone
    tensors = [*source.parameters(), *source.buffers()]
    backbone: PreTrainedModel = copy.deepcopy(source, {id(tensor): tensor for tensor in tensors})
    adapted = [_adapted_layers(model) for model in versions]
    for name in sorted(set().union(*adapted)):
        updates = [_update(layers[name]) if name in layers else None for layers in adapted]
        layer = backbone.get_submodule(name)
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        parent, _, attribute = name.rpartition(".")
        setattr(backbone.get_submodule(parent), attribute, StackedLoRALinear(base, updates))
    return backbone


def _update(layer: LoraLayer) -> tuple[Tensor, Tensor] | None:
    """(A, B) of the layer's active adapter, B scaled."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"a value model has the adapters {active} active at once: merge them first (merge=True)")
    down, up = layer.lora_A[active[0]].weight.detach(), layer.lora_B[active[0]].weight.detach()
    dtype = layer.get_base_layer().weight.dtype  # PEFT keeps its own weights in float32
    return down.to(dtype), (layer.scaling[active[0]] * up).to(dtype)
