"""Base and value models quantised by torchao, bitsandbytes or quanto, where these packages are installed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    QuantoConfig,
)

from mavis_logits import MavisLogitsProcessor, MavisSampling, ValueHead, ValueModel
from mavis_logits.backbone import Backbone
from mavis_logits.backbone.fingerprint import Identity
from tiny import EOS, PAD, VOCABULARY, make_head, make_value_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
CALL: dict[str, Any] = {
    "attention_mask": torch.ones_like(IDS),
    "do_sample": False,
    "max_new_tokens": 4,
    "pad_token_id": PAD,
}


def make_base(seed: int = 0) -> PreTrainedModel:
    """Wide enough for blocks of 64 weights, which kernels of four bits want in both directions."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": EOS}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids, num_key_value_heads=4, max_position_embeddings=512)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def torchao(model: PreTrainedModel, folder: Path, kind: str) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    configs = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int8 activations": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(16)),
        "float8": lambda: quantization.Float8WeightOnlyConfig(),
    }
    quantization.quantize_(model, configs[kind]())
    return model


def bitsandbytes(model: PreTrainedModel, folder: Path, kind: str) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    settings: dict[str, Any] = {
        "8 bits": {"load_in_8bit": True},
        "fp4": {"load_in_4bit": True},
        "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    }[kind]
    model.save_pretrained(folder / kind)
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(folder / kind, quantization_config=config, device_map="cpu").eval()  # type: ignore[no-any-return]


def quanto(model: PreTrainedModel, folder: Path, kind: str) -> PreTrainedModel:
    pytest.importorskip("optimum.quanto")
    model.save_pretrained(folder / kind)
    config = QuantoConfig(weights=kind)
    return AutoModelForCausalLM.from_pretrained(folder / kind, quantization_config=config, device_map="cpu").eval()  # type: ignore[no-any-return]


WAYS = [(torchao, kind) for kind in ("int8", "int8 activations", "int4", "float8")]
WAYS += [(bitsandbytes, kind) for kind in ("8 bits", "fp4", "nf4 twice")]
WAYS += [(quanto, kind) for kind in ("int8", "int4", "float8")]


@pytest.mark.parametrize(("quantise", "kind"), WAYS)
def test_a_quantised_copy_is_known_before_and_after_it_has_run(quantise: Any, kind: str, tmp_path: Path) -> None:
    plain, record = make_base(), Identity(make_base())
    small = quantise(make_base(), tmp_path, kind)
    assert Identity(small).difference(record.fingerprint, record.sketch) is None
    own = Identity(small)
    assert Identity(plain).difference(own.fingerprint, own.sketch) is None
    small(IDS)  # bitsandbytes packs weights anew
    assert Identity(small).fingerprint == own.fingerprint
    assert Identity(small).difference(record.fingerprint, record.sketch) is None
    other = quantise(make_base(seed=5), tmp_path / "other", kind)
    assert Identity(other).difference(record.fingerprint, record.sketch) is not None


@pytest.mark.parametrize(("quantise", "kind"), [(torchao, "int8"), (bitsandbytes, "8 bits"), (quanto, "int8")])
def test_a_tuned_copy_of_eight_bits_is_told_apart(quantise: Any, kind: str, tmp_path: Path) -> None:
    tuned, record = make_base(), Identity(make_base())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "proj" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    found = Identity(quantise(tuned, tmp_path, kind)).difference(record.fingerprint, record.sketch)
    assert "of 21 weights differ" in str(found)


@pytest.mark.parametrize(("quantise", "kind"), WAYS)
def test_a_head_steers_a_quantised_base(quantise: Any, kind: str, tmp_path: Path) -> None:
    small = quantise(make_base(), tmp_path, kind)
    assert Backbone.of(small).output_embedding.shape == (VOCABULARY, 64)
    for head in (ValueHead.for_model(small, ["a"], width=16), make_head(make_base(), "a")):
        processor = MavisLogitsProcessor(head, beta=3.0, top_k=5, model=small)
        steered = small.generate(IDS, logits_processor=[processor], **CALL)
        strategy = MavisSampling(head, beta=3.0, top_k=5, model=small)
        if kind != "int8 activations":  # what one row gives then depends on the others
            assert torch.equal(small.generate(IDS, custom_generate=strategy, **CALL), steered)


@pytest.mark.parametrize(
    ("quantise", "kind"), [(torchao, "int8"), (bitsandbytes, "8 bits"), (bitsandbytes, "fp4"), (quanto, "int8")]
)
def test_a_value_model_may_be_cut_from_a_quantised_base(quantise: Any, kind: str, tmp_path: Path) -> None:
    small = quantise(make_base(), tmp_path, kind)
    model = ValueModel.from_backbone(small, ["a"], num_layers=1)
    assert type(model.backbone.layers[0].mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path / "value")
    again = ValueModel.from_pretrained(tmp_path / "value")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def quantisation(kind: str) -> Any:
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_a_value_model_is_loaded_quantised_but_for_its_head(kind: str, tmp_path: Path) -> None:
    model = make_value_model("a")
    model.save_pretrained(tmp_path)
    small = ValueModel.from_pretrained(tmp_path, quantization_config=quantisation(kind), device_map="cpu")
    assert type(small.head.weight) is torch.nn.Parameter
    assert small.head.weight.dtype == torch.float32
    assert not torch.equal(small(IDS).values, model(IDS).values)
    torch.testing.assert_close(small(IDS).values, model(IDS).values, atol=1.0, rtol=0.1)
    small.save_pretrained(tmp_path / "again")
    again = ValueModel.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(IDS).values, small(IDS).values)


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_a_classifier_that_was_quantised_when_loaded_is_not_saved_as_something_else(kind: str, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    config = copy.deepcopy(make_base().config)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    small = ValueModel.from_pretrained(
        tmp_path / "classifier", quantization_config=quantisation(kind), device_map="cpu"
    )
    with pytest.raises(ValueError, match="load it without quantization_config, save that, and give"):
        small.save_pretrained(tmp_path / "own")
    ValueModel.from_pretrained(tmp_path / "classifier").save_pretrained(tmp_path / "own")  # the way out
    again = ValueModel.from_pretrained(tmp_path / "own", quantization_config=quantisation(kind), device_map="cpu")
    torch.testing.assert_close(again(IDS).values, small(IDS).values, atol=0.5, rtol=0.05)
