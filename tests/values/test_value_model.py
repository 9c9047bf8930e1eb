"""Value models: reward units, truncation, and round trips that change no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel

from mavis_logits import ValueModel, ValueModelConfig
from mavis_logits.backbone.fingerprint import weights_fingerprint
from mavis_logits.hub.files import ADAPTER_WEIGHTS, HEAD_WEIGHTS
from tiny import ARCHITECTURES, PAD, make_base, make_value_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@torch.no_grad()
def values(model: ValueModel, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).values


def assert_same(again: ValueModel, model: ValueModel) -> None:
    """The same weights to the bit; the same values, up to what the weights' place in memory changes in a sum."""
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(values(again), values(model), atol=1e-5, rtol=1e-5)


def lora_model(base: Any, *objectives: str) -> ValueModel:
    """A value model whose LoRA adapter and head have been "trained"."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = ValueModel.from_backbone(base, objectives or ("a", "b"), num_layers=1, lora=lora, reward_mean=[1.0, 2.0])
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


# ---- what comes out ----


def test_values_are_float32_in_reward_units() -> None:
    model = make_value_model("a", "b")
    out = values(model)
    assert out.shape == (1, 6, 2)
    hidden = model.backbone(IDS).last_hidden_state
    torch.testing.assert_close(out, 0.5 + 2.0 * model.head(hidden))
    assert values(model.to(torch.bfloat16)).dtype == torch.float32


def test_a_new_value_model_predicts_the_mean_reward() -> None:
    model = ValueModel.from_backbone(make_base(), ["a", "b"], reward_mean=[1.5, -2.0], reward_scale=[3.0, 4.0])
    assert torch.equal(values(model), torch.tensor([1.5, -2.0]).expand(1, 6, 2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefix_has_the_value_it_has_alone(architecture: str) -> None:
    model = make_value_model("a", architecture=architecture)
    whole = values(model)
    for length in (1, 3, 5):
        torch.testing.assert_close(whole[:, :length], values(model, IDS[:, :length]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"mamba"}))
def test_left_padding_changes_nothing(architecture: str) -> None:
    model = make_value_model("a", architecture=architecture)
    padded = torch.cat([torch.full((1, 4), PAD), IDS], dim=1)
    out = values(model, padded, attention_mask=(padded != PAD).long())
    torch.testing.assert_close(out[:, 4:], values(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_returned_and_goes_on(architecture: str, name: str) -> None:
    model = make_value_model("a", architecture=architecture)
    with torch.no_grad():
        first = model(IDS[:, :5], use_cache=True)
        second = model(IDS[:, 5:], **{name: first.past_key_values}, use_cache=True)
    torch.testing.assert_close(second.values[:, 0], values(model)[:, 5], atol=1e-4, rtol=0)


# ---- backbones ----


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"bloom", "gpt2", "mamba"}))
def test_a_truncated_backbone_is_the_first_layers_and_the_final_norm(architecture: str) -> None:
    base = make_base(architecture)
    model = ValueModel.from_backbone(base, ["a"], num_layers=1)
    with torch.no_grad():
        inner = base.model(IDS, output_hidden_states=True).hidden_states[1]  # behind layer 1, before the norm
        torch.testing.assert_close(model.backbone(IDS).last_hidden_state, base.model.norm(inner))
    assert model.config.backbone_config.num_hidden_layers == 1
    assert sum(p.numel() for p in model.backbone.parameters()) < sum(p.numel() for p in base.model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_cut_saved_and_read(architecture: str, tmp_path: Path) -> None:
    model = make_value_model("a", architecture=architecture, layers=1)
    model.save_pretrained(tmp_path)
    assert_same(ValueModel.from_pretrained(tmp_path), model)


def test_the_backbone_is_a_copy_of_the_base() -> None:
    base = make_base()
    before = weights_fingerprint(base)
    model = ValueModel.from_backbone(base, ["a"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert weights_fingerprint(base) == before


def test_a_backbone_can_be_a_folder(tmp_path: Path) -> None:
    base = make_base()
    base.save_pretrained(tmp_path)
    model = ValueModel.from_backbone(str(tmp_path), ["a"], num_layers=1)
    assert model.config.backbone == str(tmp_path)
    expected = ValueModel.from_backbone(base, ["a"], num_layers=1)
    assert torch.equal(model.backbone(IDS).last_hidden_state, expected.backbone(IDS).last_hidden_state)


@pytest.mark.parametrize("num_layers", [0, -1, 3])
def test_layers_that_the_backbone_has_not_are_refused(num_layers: int) -> None:
    with pytest.raises(
        ValueError, match=rf"num_layers must be 1 to 2 \(the layers that LlamaModel has\), got {num_layers}"
    ):
        ValueModel.from_backbone(make_base(), ["a"], num_layers=num_layers)


@pytest.mark.parametrize("objectives", [[], ["a", "a"], "helpful", [""], [3]])
def test_objectives_that_are_no_distinct_names_are_refused(objectives: Any) -> None:
    with pytest.raises(ValueError, match=r"objectives must be a list of distinct names such as .*, got"):
        ValueModel.from_backbone(make_base(), objectives)


def test_reward_units_of_another_number_of_objectives_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reward_mean has 1 numbers for 2 objectives \['a', 'b'\]"):
        ValueModelConfig(objectives=["a", "b"], reward_mean=[1.0])


# ---- round trips ----


def test_a_full_repo_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = make_value_model("a", "b")
    model.config.recipe = {"epochs": 2}
    model.config.tokenizer_fingerprint, model.config.base_model, model.config.iteration = "0123", "org/base", 1
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = ValueModel.from_pretrained(tmp_path)
    assert_same(again, model)
    for name in (
        "objectives", "reward_mean", "reward_scale", "recipe", "tokenizer_fingerprint", "base_model", "iteration",
    ):  # fmt: skip
        assert getattr(again.config, name) == getattr(model.config, name)
    assert not again.training


def test_auto_classes_know_value_models(tmp_path: Path) -> None:
    model = make_value_model("a", "b")
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ValueModelConfig)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, ValueModel)
    assert_same(again, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_is_kept_and_can_be_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    make_base().to(dtype).save_pretrained(tmp_path / "base")
    model = ValueModel.from_backbone(str(tmp_path / "base"), ["a"])
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        model.head.weight.normal_()
    model.save_pretrained(tmp_path)
    again = ValueModel.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(again.backbone.rotary_emb.inv_freq, model.backbone.rotary_emb.inv_freq)
    assert_same(again, model)
    assert {p.dtype for p in ValueModel.from_pretrained(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_an_adapter_repo_can_be_loaded_in_bfloat16(tmp_path: Path) -> None:
    base = make_base()
    lora_model(base).save_pretrained(tmp_path)
    model = ValueModel.from_pretrained(tmp_path, backbone=base, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.backbone.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(values(model)).all()


def test_an_adapter_repo_comes_back_bit_for_bit_and_merged_up_to_rounding(tmp_path: Path) -> None:
    base = make_base()
    model = lora_model(base)
    expected = values(model)
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.glob("*.safetensors")} == {ADAPTER_WEIGHTS, HEAD_WEIGHTS}
    with safe_open(tmp_path / ADAPTER_WEIGHTS, framework="pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118

    same = ValueModel.from_pretrained(tmp_path, backbone=base, merge=False)
    assert_same(same, model)
    assert same.lora is not None
    trainable = {name for name, p in same.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in trainable)

    merged = ValueModel.from_pretrained(tmp_path, backbone=base)
    assert merged.lora is None
    torch.testing.assert_close(values(merged), expected, atol=1e-5, rtol=1e-5)
    assert not any("lora_" in name for name, _ in merged.named_parameters())


def test_an_adapter_repo_finds_its_backbone_by_name(tmp_path: Path) -> None:
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    model = lora_model(type(base).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "value")
    again = ValueModel.from_pretrained(tmp_path / "value", merge=False)
    assert_same(again, model)
    auto = AutoModel.from_pretrained(tmp_path / "value")
    assert isinstance(auto, ValueModel)
    torch.testing.assert_close(values(auto), values(model), atol=1e-5, rtol=1e-5)


def test_a_merged_model_can_be_saved_whole(tmp_path: Path) -> None:
    base = make_base()
    lora_model(base).save_pretrained(tmp_path / "adapter")
    merged = ValueModel.from_pretrained(tmp_path / "adapter", backbone=base)
    merged.save_pretrained(tmp_path / "whole")
    assert_same(ValueModel.from_pretrained(tmp_path / "whole"), merged)


def test_a_second_adapter_is_refused() -> None:
    model = lora_model(make_base())
    with pytest.raises(ValueError, match="has a LoRA adapter already; merge it first"):
        model.add_lora(LoraConfig(target_modules=["q_proj"]))


def test_only_adapter_and_head_are_trained() -> None:
    model = lora_model(make_base())
    model.train()
    model(IDS).values.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or name.startswith("head."))
        assert (parameter.grad is not None) == parameter.requires_grad


def test_under_autocast_the_head_still_computes_in_float32():
    model, hidden = make_value_model("a", "b"), torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = model.values_of(hidden)
    assert torch.equal(values, model.values_of(hidden))
