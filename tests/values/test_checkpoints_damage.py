"""Value models in files that are damaged, stale or half of something else; settings that must reach every format."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FalconH1Config, FalconH1ForCausalLM, LlamaForSequenceClassification

from mavis_logits import MavisLogitsProcessor, ValueHead, ValueModel
from mavis_logits.hub.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD_WEIGHTS
from tiny import PAD, make_base, make_head, make_value_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
WEIGHTS = "model.safetensors"
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@torch.no_grad()
def values(model: ValueModel) -> Tensor:
    return model(IDS).values  # type: ignore[no-any-return]


def edit(file: Path, **changes: Tensor | None) -> None:
    """Put tensors into a file, or take those out that are None."""
    state = load_file(file) | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file, {"format": "pt"})


def shuffled(model: Any) -> Any:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


# Each saves a value model in `folder / "saved"` and returns its values.


def save_whole(folder: Path) -> Tensor:
    model = make_value_model("a")
    model.save_pretrained(folder / "saved")
    return values(model)


def save_adapter(folder: Path) -> Tensor:
    make_base().save_pretrained(folder / "base")
    base = str(folder / "base")
    model = shuffled(ValueModel.from_backbone(base, ["a"], lora=LoraConfig(**LORA)))
    model.save_pretrained(folder / "saved")
    return values(model)


def classifier(labels: int = 1) -> Any:
    config = copy.deepcopy(make_base().config)
    config.num_labels, config.pad_token_id = labels, PAD
    return shuffled(LlamaForSequenceClassification(config))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def save_classifier(folder: Path) -> Tensor:
    model = classifier()
    model.save_pretrained(folder / "saved")
    return logits(model)


def save_adapted_classifier(folder: Path) -> Tensor:
    classifier().save_pretrained(folder / "base")
    base = LlamaForSequenceClassification.from_pretrained(folder / "base")
    model = shuffled(get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, **LORA)))
    model.save_pretrained(folder / "saved")
    return logits(model)


def save_trl(folder: Path) -> Tensor:
    base = make_base()
    base.save_pretrained(folder / "saved")
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    edit(folder / "saved" / WEIGHTS, **head)
    with torch.no_grad():
        hidden = base(IDS, output_hidden_states=True).hidden_states[-1]
    return hidden @ head["v_head.summary.weight"].T + head["v_head.summary.bias"]


SAVES = [save_whole, save_adapter, save_classifier, save_adapted_classifier, save_trl]
ADAPTERS = [save_adapter, save_adapted_classifier]
PLAIN = [save_whole, save_classifier, save_trl]


# ---- settings ----


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": torch.bfloat16},
        {"torch_dtype": torch.bfloat16},
        {"dtype": "bfloat16"},
        {"dtype": "auto"},
        {"attn_implementation": "eager"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"dtype": torch.float16, "attn_implementation": "eager"},
    ],
    ids=str,
)
def test_settings_reach_every_format(save: Callable[[Path], Tensor], settings: dict[str, Any], tmp_path: Path) -> None:
    expected = save(tmp_path)[:, -1]
    model = ValueModel.from_pretrained(tmp_path / "saved", **settings)
    dtype = settings.get("dtype", settings.get("torch_dtype", torch.float32))
    dtype = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
    assert model.backbone.dtype == dtype
    assert model.backbone.config._attn_implementation == settings.get("attn_implementation", "sdpa")
    assert model.backbone.rotary_emb.inv_freq.dtype == torch.float32
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.5, "rtol": 0.05}
    torch.testing.assert_close(values(model)[:, -1].reshape(-1), expected.reshape(-1)[-1:], **close)


def test_settings_reach_an_adapter_on_a_loaded_classifier(tmp_path: Path) -> None:
    save_adapted_classifier(tmp_path)
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", attn_implementation="eager")
    model = ValueModel.from_pretrained(tmp_path / "saved", backbone=base, dtype=torch.bfloat16)
    assert (model.backbone.dtype, model.backbone.config._attn_implementation) == (torch.bfloat16, "eager")
    assert base.dtype == torch.float32


def test_a_processor_hands_settings_to_models_and_spares_heads_them(tmp_path: Path) -> None:
    base = make_base()
    make_value_model("a").save_pretrained(tmp_path / "model")
    make_head(base, "b").save_pretrained(tmp_path / "head")
    names = [str(tmp_path / "model"), str(tmp_path / "head")]
    mavis = MavisLogitsProcessor.from_pretrained(names, model=base, attn_implementation="eager", dtype=torch.bfloat16)
    model, head = mavis.functions.all
    assert model.backbone.config._attn_implementation == "eager"
    assert (model.dtype, head.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("save", ADAPTERS)
@pytest.mark.parametrize("setting", ["quantization_config", "offload_folder", "max_memory", "typo"])
def test_what_has_no_effect_on_an_adapter_is_refused_by_name(save: Any, setting: str, tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ValueError, match=rf"is read without {setting}: .* makes a whole value model of it"):
        ValueModel.from_pretrained(tmp_path / "saved", **{setting: {"a": "b"}})
    ValueModel.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "whole")  # the way out
    assert (tmp_path / "whole" / WEIGHTS).is_file()


@pytest.mark.parametrize("dtype", ["blah", "nn"])
def test_a_dtype_that_is_none_is_refused(dtype: str, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    with pytest.raises(ValueError, match=f"dtype must be a torch.dtype, the name of one or 'auto', got '{dtype}'"):
        ValueModel.from_pretrained(tmp_path / "saved", dtype=dtype)


def test_a_backbones_attention_is_kept(tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path)
    base = type(make_base()).from_pretrained(tmp_path, attn_implementation="eager")
    assert ValueModel.from_backbone(base, ["a"]).backbone.config._attn_implementation == "eager"


# ---- too few, too many, of another shape ----


@pytest.mark.parametrize("save", PLAIN)
def test_a_tensor_of_another_shape_is_an_os_error_that_names_it(save: Any, tmp_path: Path) -> None:
    save(tmp_path)
    file = tmp_path / "saved" / WEIGHTS
    name = next(name for name in load_file(file) if "layers.1.mlp.up_proj" in name)
    edit(file, **{name: torch.zeros(3, 32)})
    with pytest.raises(OSError, match=r"1 weights of another shape .*up_proj.* among them: \[3, 32\], expected \[48"):
        ValueModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("save", PLAIN)
@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj.lora_A.weight", "layers.2.mlp.up_proj.weight"])
def test_a_tensor_that_would_be_left_out_is_an_os_error_that_names_it(save: Any, name: str, tmp_path: Path) -> None:
    save(tmp_path)
    prefix = "backbone" if save is save_whole else "model"
    edit(tmp_path / "saved" / WEIGHTS, **{f"{prefix}.{name}": torch.zeros(2, 32)})
    with pytest.raises(OSError, match=rf"1 weights that its config knows no place for, {prefix}\.{name} among them"):
        ValueModel.from_pretrained(tmp_path / "saved")


def test_what_stands_beside_a_classifier_may_be_there(tmp_path: Path) -> None:
    expected = save_classifier(tmp_path)
    edit(tmp_path / "saved" / WEIGHTS, **{"lm_head.weight": torch.zeros(97, 32)})
    found = values(ValueModel.from_pretrained(tmp_path / "saved"))
    torch.testing.assert_close(found[:, -1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("out.weight", torch.zeros(2, 16), OSError, "another shape"),
        ("out.weight", None, OSError, "lacks 1 weights, out.weight"),
        ("layers.1.weight", torch.zeros(16, 16), OSError, "knows no place for, layers.1.weight"),
    ],
)
def test_a_value_head_is_read_whole_or_not_at_all(
    name: str, tensor: Tensor | None, error: Any, message: str, tmp_path: Path
) -> None:
    make_head(make_base(), "a").save_pretrained(tmp_path)
    edit(tmp_path / WEIGHTS, **{name: tensor})
    with pytest.raises(error, match=message):
        ValueHead.from_pretrained(tmp_path)


def test_a_value_head_is_not_quantised(tmp_path: Path) -> None:
    make_head(make_base(), "a").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not quantised: leave quantization_config out"):
        ValueHead.from_pretrained(tmp_path, quantization_config={"load_in_8bit": True})


@pytest.mark.parametrize("save", ADAPTERS)
@pytest.mark.parametrize("damage", ["lost", "extra", "misshapen"])
def test_an_adapters_tensors_must_be_those_of_its_config(save: Any, damage: str, tmp_path: Path) -> None:
    save(tmp_path)
    file = tmp_path / "saved" / ADAPTER_WEIGHTS
    name = next(name for name in load_file(file) if "layers.0.self_attn.q_proj.lora_A" in name)
    changes: dict[str, tuple[str, Tensor | None, Any, str]] = {
        "lost": (name, None, OSError, r"lacks 1 weights, .*layers\.0\.self_attn\.q_proj\.lora_A"),
        "extra": (name.replace("q_proj", "k_proj"), torch.zeros(4, 32), ValueError, r"it has no .*k_proj\.lora_A"),
        "misshapen": (name, torch.zeros(2, 32), ValueError, r"does not fit the backbone given: [^$]*q_proj\.lora_A"),
    }
    name, tensor, error, message = changes[damage]
    edit(file, **{name: tensor})
    with pytest.raises(error, match=message):
        ValueModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("weight", torch.zeros(2, 32), ValueError, r"weight is \[2, 32\], expected \[1, 32\]"),
        ("bias", None, OSError, "lacks 1 weights, bias"),
        ("other", torch.zeros(1), ValueError, "it has no other"),
    ],
)
def test_an_adapters_head_must_be_whole(
    name: str, tensor: Tensor | None, error: Any, message: str, tmp_path: Path
) -> None:
    save_adapter(tmp_path)
    edit(tmp_path / "saved" / HEAD_WEIGHTS, **{name: tensor})
    with pytest.raises(error, match=message):
        ValueModel.from_pretrained(tmp_path / "saved")


def test_a_classifier_without_its_score_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path / "whole")
    edit(tmp_path / "whole/saved" / WEIGHTS, **{"score.weight": None})
    with pytest.raises(OSError, match=r"lacks 1 weights, score\.weight among them"):
        ValueModel.from_pretrained(tmp_path / "whole/saved")
    save_adapted_classifier(tmp_path)
    edit(tmp_path / "saved" / ADAPTER_WEIGHTS, **{"base_model.model.score.weight": None})
    with pytest.raises(OSError, match=r"lacks 1 weights, base_model\.model\.score\.weight among them"):
        ValueModel.from_pretrained(tmp_path / "saved")
    with pytest.raises(OSError, match="the adapter brings no `score` layer, and the backbone given has none"):
        ValueModel.from_pretrained(tmp_path / "saved", backbone=make_base())


def test_the_base_of_an_adapted_classifier_must_be_whole(tmp_path: Path) -> None:
    save_adapted_classifier(tmp_path)
    edit(tmp_path / "base" / WEIGHTS, **{"model.layers.0.mlp.up_proj.weight": None})
    with pytest.raises(OSError, match=r"base lacks 1 weights, model\.layers\.0\.mlp\.up_proj\.weight among them"):
        ValueModel.from_pretrained(tmp_path / "saved")


def test_a_trl_head_must_be_whole_and_have_as_many_outputs_as_are_named(tmp_path: Path) -> None:
    save_trl(tmp_path)
    with pytest.raises(ValueError, match=r"1 outputs were found, but 2 objectives named: \['a', 'b'\]"):
        ValueModel.from_pretrained(tmp_path / "saved", objectives=["a", "b"])
    edit(tmp_path / "saved" / WEIGHTS, **{"v_head.summary.weight": None})
    with pytest.raises(OSError, match=r"lacks v_head\.summary\.weight"):
        ValueModel.from_pretrained(tmp_path / "saved")


# ---- saved over something else ----


def test_a_merged_model_saved_over_its_adapter_is_read_as_what_it_is(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    merged = ValueModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        merged.head.weight.mul_(2)
    merged.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / ADAPTER_CONFIG).exists()
    torch.testing.assert_close(values(ValueModel.from_pretrained(tmp_path / "saved")), values(merged))


def test_an_adapter_saved_over_a_whole_model_is_read_as_what_it_is(tmp_path: Path) -> None:
    expected = save_adapter(tmp_path)
    adapter = ValueModel.from_pretrained(tmp_path / "saved", merge=False)
    make_value_model("b").save_pretrained(tmp_path / "over")
    adapter.save_pretrained(tmp_path / "over")
    assert not (tmp_path / "over" / WEIGHTS).exists()
    found = ValueModel.from_pretrained(tmp_path / "over")
    assert found.config.objectives == ["a"]
    torch.testing.assert_close(values(found), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_merged_for_the_moment_is_saved_as_it_is(tmp_path: Path) -> None:
    expected = save_adapter(tmp_path)
    model = ValueModel.from_pretrained(tmp_path / "saved", merge=False)
    model.lora.merge_adapter()
    model.save_pretrained(tmp_path / "again")
    found = ValueModel.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(values(found), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_name_is_saved(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    model = ValueModel.from_pretrained(tmp_path / "saved", merge=False)
    model.lora.add_adapter("mine", LoraConfig(**LORA))
    model.lora.set_adapter("mine")
    expected = values(shuffled(model))
    model.save_pretrained(tmp_path / "again")
    found = ValueModel.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(values(found), expected, atol=1e-5, rtol=1e-5)


# ---- what is in no file ----


def test_buffers_that_are_in_no_file_are_made_anew(tmp_path: Path) -> None:
    config = FalconH1Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=8,
        ssm_multipliers=[0.5, 2.0, 3.0, 0.7, 1.5], ssm_in_multiplier=0.5,
    )  # fmt: skip
    model = shuffled(ValueModel.from_backbone(FalconH1ForCausalLM(config), ["a"]))
    model.save_pretrained(tmp_path)
    again = ValueModel.from_pretrained(tmp_path)
    buffers = dict(model.named_buffers())
    assert any("mup_vector" in name for name in buffers)
    for name, buffer in again.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    torch.testing.assert_close(values(again), values(model), atol=1e-4, rtol=1e-4)


def test_a_config_that_says_fewer_layers_than_there_are_is_refused(tmp_path: Path) -> None:
    save_whole(tmp_path)
    path = tmp_path / "saved/config.json"
    config = json.loads(path.read_text())
    config["backbone_config"]["num_hidden_layers"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"9 weights that its config knows no place for, backbone\.layers\.1\."):
        ValueModel.from_pretrained(tmp_path / "saved")
