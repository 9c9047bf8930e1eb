"""Value models that others have saved, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Gemma2ForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2ForSequenceClassification,
)

from mavis_logits import ValueModel
from mavis_logits.backbone.fingerprint import weights_fingerprint
from mavis_logits.hub.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD_WEIGHTS
from tiny import PAD, make_base, make_value_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
CLASSIFIERS = {
    "llama": LlamaForSequenceClassification,
    "gpt2": GPT2ForSequenceClassification,
    "qwen2": Qwen2ForSequenceClassification,
    "gemma2": Gemma2ForSequenceClassification,
}


def make_classifier(labels: int, architecture: str = "llama") -> PreTrainedModel:
    config = make_base(architecture).config
    config.num_labels, config.pad_token_id = labels, PAD
    torch.manual_seed(3)
    model = CLASSIFIERS[architecture](config).eval()
    with torch.no_grad():
        model.score.weight.normal_()
    return model


@torch.no_grad()
def assert_agrees(model: ValueModel, classifier: Any) -> None:
    """The value of every prefix is what the classifier says of that prefix."""
    values = model(IDS).values
    for length in (1, 4, 6):
        expected = classifier(IDS[:, :length]).logits
        torch.testing.assert_close(values[:, length - 1], expected, atol=1e-5, rtol=1e-5)


# ---- sequence classifiers ----


@pytest.mark.parametrize("architecture", CLASSIFIERS)
@pytest.mark.parametrize("labels", [1, 3])
def test_a_sequence_classifier_is_a_value_model(architecture: str, labels: int, tmp_path: Path) -> None:
    classifier = make_classifier(labels, architecture)
    classifier.save_pretrained(tmp_path)
    model = ValueModel.from_pretrained(tmp_path)
    assert_agrees(model, classifier)
    assert model.config.objectives == (["reward"] if labels == 1 else ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert not model.training


def test_outputs_are_named_by_the_checkpoint_or_by_the_caller(tmp_path: Path) -> None:
    classifier = make_classifier(2)
    classifier.config.id2label = {0: "helpful", 1: "harmless"}
    classifier.save_pretrained(tmp_path)
    assert ValueModel.from_pretrained(tmp_path).config.objectives == ["helpful", "harmless"]
    assert ValueModel.from_pretrained(tmp_path, objectives=["x", "y"]).config.objectives == ["x", "y"]
    with pytest.raises(ValueError, match=r"has 2 outputs, but 1 objectives were named: \['x'\]"):
        ValueModel.from_pretrained(tmp_path, objectives=["x"])


def peft_classifier(folder: Path, base: str | None, labels: int) -> Any:
    """A LoRA-trained classifier saved in `folder`, as PEFT does it."""
    classifier = make_classifier(labels)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(classifier, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("labels", [1, 3])
def test_a_peft_classifier_finds_its_base_and_how_many_outputs_it_has(labels: int, tmp_path: Path) -> None:
    make_classifier(1).save_pretrained(tmp_path / "base")
    # The base's own score layer is for one label; what counts is the adapter's.
    expected = peft_classifier(tmp_path / "adapter", str(tmp_path / "base"), labels)
    base = json.loads((tmp_path / "base/config.json").read_text())
    del base["id2label"], base["label2id"]
    (tmp_path / "base/config.json").write_text(json.dumps(base))
    state = load_file(tmp_path / "base/model.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "score.weight"}, tmp_path / "base/model.safetensors", {"format": "pt"}
    )
    model = ValueModel.from_pretrained(tmp_path / "adapter")
    assert_agrees(model, expected)
    assert len(model.config.objectives) == labels


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_a_loaded_backbone_is_used_and_left_as_it_was(kind: str, tmp_path: Path) -> None:
    expected = peft_classifier(tmp_path, None, 2)
    backbone = make_classifier(2) if kind == "classifier" else make_base()
    backbone.base_model.load_state_dict(make_classifier(2).base_model.state_dict())
    before = weights_fingerprint(backbone)
    model = ValueModel.from_pretrained(tmp_path, backbone=backbone, objectives=["a", "b"])
    assert_agrees(model, expected)
    assert weights_fingerprint(backbone) == before


def test_a_peft_classifier_is_read_merged_only(tmp_path: Path) -> None:
    peft_classifier(tmp_path, None, 1)
    with pytest.raises(ValueError, match="is read merged: use merge=True"):
        ValueModel.from_pretrained(tmp_path, backbone=make_classifier(1), merge=False)


def test_an_encoder_classifier_cannot_be_read(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no linear `score` layer on a decoder"):
        ValueModel.from_pretrained(tmp_path)


# ---- TRL's value head ----


def trl_checkpoint(
    folder: Path, prefix: str = "", bias: bool = True, shards: int = 1
) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """What `AutoModelForCausalLMWithValueHead` wrote: the model's weights, and v_head.summary beside them."""
    base = make_base(seed=4)
    base.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(5)
    weight, offset = torch.randn(1, 32), torch.randn(1) if bias else torch.zeros(1)
    state = {prefix + name: tensor.clone() for name, tensor in base.state_dict().items()}
    state |= {"v_head.summary.weight": weight} | ({"v_head.summary.bias": offset} if bias else {})
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return base, weight, offset
    names, weight_map = sorted(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base, weight, offset


@pytest.mark.parametrize(
    ("prefix", "bias", "shards"), [("", True, 1), ("", False, 1), ("pretrained_model.", True, 1), ("", True, 3)]
)
def test_a_trl_value_head_checkpoint_is_a_value_model(prefix: str, bias: bool, shards: int, tmp_path: Path) -> None:
    base, weight, offset = trl_checkpoint(tmp_path, prefix, bias, shards)
    model = ValueModel.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden = base(IDS, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model(IDS).values, hidden @ weight.T + offset, atol=1e-5, rtol=1e-5)
    assert model.config.objectives == ["reward"]
    assert ValueModel.from_pretrained(tmp_path, objectives=["helpful"]).config.objectives == ["helpful"]


def test_what_was_read_can_be_saved_as_our_own(tmp_path: Path) -> None:
    trl_checkpoint(tmp_path / "trl")
    model = ValueModel.from_pretrained(tmp_path / "trl")
    model.save_pretrained(tmp_path / "own")
    again = ValueModel.from_pretrained(tmp_path / "own")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


# ---- refusals ----


def save_own(folder: Path) -> str:
    make_value_model("a").save_pretrained(folder)
    return "model.safetensors"


def save_own_adapter(folder: Path) -> str:
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    ValueModel.from_backbone(make_base(), ["a"], lora=lora).save_pretrained(folder)
    return ADAPTER_WEIGHTS


def save_own_adapter_head(folder: Path) -> str:
    save_own_adapter(folder)
    return HEAD_WEIGHTS


def save_classifier(folder: Path) -> str:
    make_classifier(1).save_pretrained(folder)
    return "model.safetensors"


def save_peft_classifier(folder: Path) -> str:
    peft_classifier(folder, None, 1)
    return ADAPTER_WEIGHTS


def save_trl(folder: Path) -> str:
    trl_checkpoint(folder)
    return "model.safetensors"


SAVED = [save_own, save_own_adapter, save_own_adapter_head, save_classifier, save_peft_classifier, save_trl]


@pytest.mark.parametrize("save", SAVED)
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file_is_an_os_error_that_says_so(save: Any, damage: str, tmp_path: Path) -> None:
    file = tmp_path / save(tmp_path)
    content = file.read_bytes()
    file.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"\xff" * 64, "empty": b""}[damage])
    backbone = make_classifier(1) if save is save_peft_classifier else make_base()
    with pytest.raises(OSError, match=r"corrupt or half-written safetensors file .*: download or save it again"):
        ValueModel.from_pretrained(tmp_path, backbone=backbone)


@pytest.mark.parametrize("save", [save_own, save_classifier, save_trl])
def test_a_checkpoint_without_some_weight_is_refused(save: Any, tmp_path: Path) -> None:
    file = tmp_path / save(tmp_path)
    state = load_file(file)
    name = next(name for name in state if "layers.1.mlp" in name)
    save_file({k: v for k, v in state.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(OSError, match=r"lacks 1 weights, .*layers\.1\.mlp.* among them: download or save it again"):
        ValueModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("save", [save_own, save_classifier, save_trl])
def test_pickles_are_never_loaded(save: Any, tmp_path: Path) -> None:
    file = tmp_path / save(tmp_path)
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        ValueModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        ValueModel.from_pretrained(tmp_path, use_safetensors=False)


def test_broken_json_is_an_os_error(tmp_path: Path) -> None:
    save_own(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mavis_')
    with pytest.raises(OSError, match=r"config\.json is no valid JSON .*: download or save it again"):
        ValueModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", [ADAPTER_WEIGHTS, HEAD_WEIGHTS])
def test_an_adapter_repo_without_a_file_names_it(missing: str, tmp_path: Path) -> None:
    save_own_adapter(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(OSError, match=f"is an adapter repo without {missing}: download or save it again"):
        ValueModel.from_pretrained(tmp_path, backbone=make_base())


def test_a_backbone_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_own_adapter(tmp_path)
    with pytest.raises(ValueError, match="its config names no backbone: pass backbone=MODEL"):
        ValueModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"] = str(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        OSError, match=r"on the first layers of .*nowhere, which could not be loaded: pass the loaded model"
    ):
        ValueModel.from_pretrained(tmp_path)


def test_an_adapter_for_another_architecture_is_refused(tmp_path: Path) -> None:
    save_own_adapter(tmp_path)
    for check in (True, False):
        with pytest.raises(ValueError, match="does not fit the backbone"):
            ValueModel.from_pretrained(tmp_path, backbone=make_base("gpt2"), check=check)


def test_what_is_no_value_model_is_refused(tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no value model \(found: llama\).*ValueModel.from_backbone makes a new one"):
        ValueModel.from_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        ValueModel.from_pretrained(tmp_path / "nowhere")


def test_the_adapter_config_alone_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"task_type": "CAUSAL_LM"}))
    with pytest.raises(ValueError, match=r"is no value model \(found: CAUSAL_LM\)"):
        ValueModel.from_pretrained(tmp_path)


def test_auto_class_of_transformers_and_ours_agree_on_a_classifier(tmp_path: Path) -> None:
    make_classifier(2).save_pretrained(tmp_path)
    assert_agrees(ValueModel.from_pretrained(tmp_path), AutoModelForSequenceClassification.from_pretrained(tmp_path))
