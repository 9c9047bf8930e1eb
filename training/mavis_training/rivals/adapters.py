"""Policies tuned by adapters: their weights between each other, and their log-probabilities mixed or added.

- Rewarded Soups (Rame et al., 2023): one model of the summed adapters, merged into it: at the base model's speed.
- MOD (Shi et al., 2024): log pi = sum of w_i log pi_i, for policies that were tuned against the same reference with
  reverse KL; a forward for each of them.
- GenARM (Xu et al., 2024): log pi_ref + sum of w_i (log pi_i - log pi_ref), pi_i an autoregressive reward model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

_SUM = "summed"
Switch = Callable[[str | None], Any]


@contextmanager
def adapted(model: PreTrainedModel, folders: Mapping[str, float], summed: bool) -> Iterator[Switch]:
    """Within, `model` has the adapters of some folders; yields what makes one of them, or none, the one in force.

    Args:
        model: the base model, changed in place and restored.
        folders: share by folder.
        summed: their sum, by these shares, is in force, and nothing else can be; else the first.

    Raises:
        ValueError: an adapter for another model, or one of another kind than LoRA among several.
        OSError: one that cannot be read.
    """
    for folder in folders:
        require_fits(model, folder)
    names = {folder: f"a{i}" for i, folder in enumerate(folders)}
    first, *others = folders
    was_training = model.training
    wrapped = PeftModel.from_pretrained(model, first, adapter_name=names[first])
    try:
        for folder in others:
            wrapped.load_adapter(folder, names[folder])
        if summed:
            shares = [float(folders[folder]) for folder in folders]
            # "cat" is the sum of the products B A; "linear" would sum factors, and mix adapters with each other.
            wrapped.add_weighted_adapter(list(names.values()), shares, _SUM, combination_type="cat")
            wrapped.set_adapter(_SUM)
        wrapped.eval()

        def switch(folder: str | None) -> None:
            if folder is None:
                wrapped.base_model.disable_adapter_layers()
            else:
                wrapped.base_model.enable_adapter_layers()
                wrapped.set_adapter(names[folder])

        with merged(wrapped) if summed else nullcontext():
            yield switch
    finally:
        wrapped.base_model.enable_adapter_layers()
        wrapped.unload()
        model.train(was_training)


@contextmanager
def merged(model: PeftModel) -> Iterator[PreTrainedModel]:
    """Within, LoRA adapters in force are part of the weights and take no time; afterwards these are as before.

    What is quantised, or has other layers than LoRA's, stays as it is.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if not all(isinstance(layer, LoraLayer) and _is_plain(layer.get_base_layer()) for layer in layers):
        yield model.get_base_model()  # type: ignore[misc]
        return
    kept = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    model.merge_adapter()
    try:
        yield model.get_base_model()  # type: ignore[misc]
    finally:
        model.unmerge_adapter()
        for layer, weight in zip(layers, kept, strict=True):
            layer.get_base_layer().weight.data.copy_(weight)  # what was added is not quite what was taken away


def _is_plain(layer: nn.Module) -> bool:
    return type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()


def require_fits(model: PreTrainedModel, folder: str) -> None:
    """Raise `ValueError` if an adapter was not made for a model of this kind."""
    if Path(folder).is_dir() and not Path(folder, "adapter_config.json").exists():
        raise ValueError(
            f"{folder} has no adapter_config.json: give the folder of a LoRA adapter, as mavis tune or PEFT writes it"
        )
    made_for = PeftConfig.from_pretrained(folder).base_model_name_or_path or ""
    own = model.config.name_or_path or ""
    if made_for and own and Path(made_for).name != Path(own).name:
        raise ValueError(
            f"the adapter {folder} was tuned on {made_for}, the base model is {own}: tune one on this model, or name "
            "the other as the base model"
        )


class _Policies(LogitsProcessor):
    """Reads what the base model reads under several adapters, each with a cache of its own.

    Args:
        model: with the adapters.
        switch: puts one in force.
        names: of those that are read here; None is the model without any.
        mask: [R, T] of the prompts.
    """

    def __init__(self, model: PreTrainedModel, switch: Switch, names: list[str | None], mask: Tensor) -> None:
        self.model, self.switch, self.mask = model, switch, mask
        self._caches: dict[str | None, DynamicCache] = {name: DynamicCache(config=model.config) for name in names}

    @torch.no_grad()
    def log_probs(self, input_ids: Tensor) -> dict[str | None, Tensor]:
        """log pi(. | s) [R, V] of each."""
        rest = input_ids.shape[1] - self.mask.shape[1]
        mask = torch.nn.functional.pad(self.mask, (0, rest), value=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        found = {}
        for name, cache in self._caches.items():
            seen = cache.get_seq_length()
            self.switch(name)
            output = self.model(
                input_ids=input_ids[:, seen:], attention_mask=mask, position_ids=positions[:, seen:],
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            found[name] = torch.log_softmax(output.logits[:, -1].float(), dim=-1)
        return found


class Mixture(_Policies):
    """MOD: sum of w_i log pi_i. The first policy is the one that `generate` itself runs."""

    def __init__(self, model: PreTrainedModel, switch: Switch, shares: Mapping[str, float], mask: Tensor) -> None:
        self.first, *others = shares
        self.shares = dict(shares)
        super().__init__(model, switch, list(others), mask)
        switch(self.first)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mixed = self.shares[self.first] * torch.log_softmax(scores.float(), dim=-1)
        for name, log_probs in self.log_probs(input_ids).items():
            assert name is not None
            mixed = mixed + self.shares[name] * log_probs
        self.switch(self.first)
        return mixed


class TokenRewards(_Policies):
    """log pi_ref + sum of w_i (log pi_i - log pi_ref); `generate` itself runs the reference."""

    def __init__(self, model: PreTrainedModel, switch: Switch, strengths: Mapping[str, float], mask: Tensor) -> None:
        self.strengths = dict(strengths)
        super().__init__(model, switch, list(strengths), mask)
        switch(None)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        reference = torch.log_softmax(scores.float(), dim=-1)
        tilted = reference
        for name, log_probs in self.log_probs(input_ids).items():
            assert name is not None
            tilted = tilted + self.strengths[name] * (log_probs - reference)
        self.switch(None)
        return tilted
