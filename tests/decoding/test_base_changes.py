"""Value heads and adapters by a base model that is another one, or becomes one: followed, or refused with reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mavis_logits import MavisLogitsProcessor, MavisSampling, ValueHead, ValueModel
from mavis_logits.backbone import Backbone
from mavis_logits.backbone.fingerprint import Identity, parameters_fingerprint
from mavis_logits.backbone.needs import Needs
from tiny import PAD, VOCABULARY, make_base, make_head

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
CALL: dict[str, Any] = {
    "attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD,
}  # fmt: skip
USES = [MavisLogitsProcessor, MavisSampling]


def write(model: Any, steering: Any, **call: Any) -> Tensor:
    """Four tokens, steered."""
    if isinstance(steering, MavisLogitsProcessor):
        return model.generate(input_ids=IDS, logits_processor=[steering], **CALL, **call)  # type: ignore[no-any-return]
    return model.generate(input_ids=IDS, custom_generate=steering, **CALL, **call)  # type: ignore[no-any-return]


def with_adapters(*names: str) -> PeftModel:
    """The base model with adapters that do something, the first of them active."""
    model: Any = make_base()
    torch.manual_seed(4)
    for number, name in enumerate(names):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if number == 0:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.eval()  # type: ignore[no-any-return]


# ---- heads: the same base model ----


@pytest.mark.parametrize("kind", USES)
def test_a_head_for_an_adapted_model_steers_it(kind: Any) -> None:
    model = with_adapters("one")
    head = make_head(model, "a")
    steered = write(model, kind(head, beta=3.0, top_k=5, model=model))
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(write(merged, kind(head, beta=3.0, top_k=5, model=merged)), steered)
    assert not torch.equal(write(merged, kind(head, beta=0.0, top_k=5, model=merged)), steered)


@pytest.mark.parametrize("kind", USES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_follows_its_base_to_another_precision(kind: Any, dtype: torch.dtype) -> None:
    base = make_base()
    steering = kind(make_head(base, "a"), beta=3.0, top_k=5, model=base)
    write(base, steering)
    base.to(dtype)
    expected = write(base, kind(make_head(make_base(), "a").bind(base), beta=3.0, top_k=5, model=base))
    assert torch.equal(write(base, steering), expected)


@pytest.mark.parametrize("kind", USES)
def test_a_head_works_on_an_offloaded_base(kind: Any) -> None:
    base = make_base()
    head = make_head(base, "a")
    expected = write(base, kind(head, beta=3.0, top_k=5, model=base))
    away = cpu_offload(make_base(), execution_device=torch.device("cpu"))
    assert torch.equal(write(away, kind(head, beta=3.0, top_k=5, model=away)), expected)
    fresh = ValueHead.for_model(away, ["a"], width=16)
    assert fresh.device == torch.device("cpu")
    assert fresh.config.base_fingerprint == head.config.base_fingerprint


def test_a_head_reads_the_adapted_output_embedding() -> None:
    model = get_peft_model(make_base(), LoraConfig(r=4, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    merged = copy.deepcopy(model).merge_and_unload().lm_head.weight
    torch.testing.assert_close(Backbone.of(model).output_embedding, merged.detach())


# ---- heads: another base model ----


@pytest.mark.parametrize("kind", USES)
def test_another_adapter_is_refused_at_the_next_call_and_its_own_is_not(kind: Any) -> None:
    model = with_adapters("one", "two")
    steering = kind(make_head(model, "a"), beta=3.0, top_k=5, model=model)
    expected = write(model, steering)
    model.set_adapter("two")
    with pytest.raises(ValueError, match=r"What is different: .*; the adapter two is active"):
        write(model, steering)
    model.set_adapter("one")
    assert torch.equal(write(model, steering), expected)
    with model.disable_adapter(), pytest.raises(ValueError, match="of its adapters one, two none is active"):
        write(model, steering)
    assert torch.equal(write(model, steering), expected)


@pytest.mark.parametrize("kind", USES)
def test_an_adapter_put_on_later_is_refused_while_it_is_active(kind: Any) -> None:
    base = make_base()
    steering = kind(make_head(base, "a"), beta=3.0, top_k=5, model=base)
    expected = write(base, steering)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))  # in place
    assert torch.equal(write(base, steering), expected)  # it does nothing yet
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    with pytest.raises(ValueError, match="the adapter default is active, without which it is the same: disable it"):
        write(base, steering)
    adapted.base_model.disable_adapter_layers()  # the way out
    assert torch.equal(write(base, steering), expected)


@pytest.mark.parametrize("kind", USES)
def test_a_base_that_has_learned_is_refused_at_the_next_call(kind: Any) -> None:
    base = make_base()
    steering = kind(make_head(base, "a"), beta=3.0, top_k=5, model=base)
    write(base, steering)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"1 of 21 weights differ, layers\.1\.mlp\.up_proj\.weight the most, by 1\.0%"):
        write(base, steering)


@pytest.mark.parametrize("kind", USES)
def test_a_resized_table_is_refused_at_the_next_call_with_a_way_back(kind: Any) -> None:
    base = make_base()
    steering = kind(make_head(base, "a"), beta=3.0, top_k=5, model=base)
    expected = write(base, steering)
    base.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(ValueError, match=rf"take the size back with model\.resize_token_embeddings\({VOCABULARY}\)"):
        write(base, steering)
    base.resize_token_embeddings(VOCABULARY)
    fresh = kind(steering.functions.heads[0], beta=3.0, top_k=5, model=base)
    assert torch.equal(write(base, fresh), expected)


# ---- heads: the way out ----


def scaled(factor: float = 1.01) -> PreTrainedModel:
    base = make_base()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(factor)
    return base


@pytest.mark.parametrize("kind", USES)
def test_a_head_that_the_user_has_bound_by_hand_is_not_checked_again(kind: Any) -> None:
    head, base = make_head(make_base(), "a"), scaled()
    with pytest.raises(ValueError, match=r"head\.bind\(model, check=False\) if you know"):
        kind(head, model=base)
    head.bind(base, check=False)
    expected = write(base, kind(head, beta=3.0, top_k=5, model=base))
    same, own = scaled(), make_base()
    assert torch.equal(write(same, kind(head, beta=3.0, top_k=5, model=same)), expected)
    write(own, kind(head, beta=3.0, top_k=5, model=own))  # the one that it was made for is right as ever


def test_what_was_vouched_for_are_these_weights_and_no_others() -> None:
    head = make_head(make_base(), "a").bind(scaled(), check=False)
    with pytest.raises(ValueError, match="What is different"):
        head.bind(scaled(1.1))
    model = with_adapters("one", "two")
    head = make_head(make_base(), "a").bind(model, check=False)
    steering = MavisLogitsProcessor(head, top_k=5, model=model)
    write(model, steering)
    model.set_adapter("two")
    with pytest.raises(ValueError, match="the adapter two is active"):
        write(model, steering)


def test_a_head_is_checked_once_as_long_as_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base()
    head, looks = make_head(base, "a"), []
    monkeypatch.setattr(Identity, "difference", lambda *_: looks.append(1))
    head.bind(base)
    head.follow()
    assert len(looks) == 0  # for_model has seen it
    other = make_base()
    head.bind(other)
    head.bind(other)
    assert len(looks) == 1


def test_a_head_does_not_keep_its_base_alive_nor_copy_it() -> None:
    base = make_base()
    head = make_head(base, "a")
    twin = copy.deepcopy(head)
    assert twin._base() is base
    together = copy.deepcopy([base, head])
    assert together[1]._base() is together[0]
    del base, together
    head.follow()
    assert head._base() is None
    assert head.is_bound


def test_a_head_of_the_first_version_is_still_known(tmp_path: Path) -> None:
    base = make_base()
    make_head(base, "a").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["base_sketch"]
    config["base_fingerprint"] = parameters_fingerprint(base)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write(base, MavisLogitsProcessor.from_pretrained(tmp_path, top_k=5, model=base))
    with pytest.raises(ValueError, match="or in a precision that a fingerprint of version 1 does not know"):
        MavisLogitsProcessor.from_pretrained(tmp_path, model=make_base().half())
    head = ValueHead.from_pretrained(tmp_path).bind(half := make_base().half(), check=False)
    write(half, MavisLogitsProcessor(head, top_k=5, model=half))


# ---- adapters of value models ----


def save_adapter(folder: Path, base: PreTrainedModel) -> ValueModel:
    model = ValueModel.from_backbone(base, ["a"], lora=LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def values(model: ValueModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).values  # type: ignore[no-any-return]


@pytest.mark.parametrize("fuse", [None, False])
def test_an_adapter_finds_its_backbone_in_the_base_model_wherever_that_lies(fuse: bool | None, tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "here")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "here")
    expected = values(save_adapter(tmp_path / "values", base))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "there").eval()
    for model in (moved, get_peft_model(moved, LoraConfig(target_modules=["q_proj"])), moved.half(), moved):
        mavis = MavisLogitsProcessor.from_pretrained(tmp_path / "values", model=model, fuse=fuse)
        torch.testing.assert_close(values(mavis.functions.models[0]), expected, atol=0.05, rtol=0.01)


def test_an_adapter_takes_a_base_whose_table_has_grown(tmp_path: Path) -> None:
    expected = values(save_adapter(tmp_path, make_base()))
    grown = make_base()
    grown.resize_token_embeddings(VOCABULARY + 3)
    mavis = MavisLogitsProcessor.from_pretrained(tmp_path, top_k=5, model=grown)
    found = mavis.functions.models[0]
    torch.testing.assert_close(values(found), expected, atol=1e-5, rtol=1e-5)
    assert found.config.backbone_config.vocab_size == VOCABULARY + 3
    write(grown, mavis)


def test_a_base_that_is_not_an_adapters_backbone_is_not_used_for_it(tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")
    expected = values(save_adapter(tmp_path / "values", AutoModelForCausalLM.from_pretrained(tmp_path / "base")))
    other = make_base(seed=5)
    other.config.name_or_path = str(tmp_path / "base")  # it bears the name, and is none
    found = MavisLogitsProcessor.from_pretrained(tmp_path / "values", model=other).functions.models[0]
    torch.testing.assert_close(values(found), expected, atol=1e-5, rtol=1e-5)
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(OSError, match=r"could not be loaded: .* The base model given cannot take its place: 15 of 20"):
        MavisLogitsProcessor.from_pretrained(tmp_path / "values", model=other)


def test_an_adapter_on_other_weights_is_refused_with_a_way_out(tmp_path: Path) -> None:
    save_adapter(tmp_path, make_base())
    with pytest.raises(ValueError, match=r"on other weights .*, or check=False if you know .* is different: 15 of 20"):
        ValueModel.from_pretrained(tmp_path, backbone=make_base(seed=5))
    assert isinstance(ValueModel.from_pretrained(tmp_path, backbone=make_base(seed=5), check=False), ValueModel)


def test_an_adapter_of_the_first_version_on_other_weights_warns(tmp_path: Path) -> None:
    model = save_adapter(tmp_path, make_base())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["backbone_sketch"]
    trunk = Backbone.of(make_base()).truncated(model.config.backbone_config.num_hidden_layers)
    config["backbone_fingerprint"] = parameters_fingerprint(trunk)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(values(ValueModel.from_pretrained(tmp_path, backbone=make_base())), values(model))
    with pytest.warns(UserWarning, match="was trained on other weights"):
        ValueModel.from_pretrained(tmp_path, backbone=make_base(seed=5))


# ---- what is needed, in words ----


def test_the_needs_of_a_head_and_of_a_model_are_told(tmp_path: Path) -> None:
    head = ValueHead.for_model(make_base(), ["a"], width=16, layer=1, base_model="org/base", tokenizer_fingerprint="f")
    head.save_pretrained(tmp_path)
    needs = Needs.of(json.loads((tmp_path / "config.json").read_text()))
    assert needs == Needs.of(head.config)
    assert needs.in_words() == {
        "tokenizer": "that of org/base (fingerprint `f`)",
        "vocabulary": "97 tokens",
        "hidden state": "the state after layer 1, of width 32",
        "output embedding": "97 x 32",
        "weights": f"fingerprint `{head.config.base_fingerprint}`, in any precision, or quantised; adapters that are "
        "not active do not count",
    }
    model = ValueModel.from_backbone(make_base(), ["a"])
    assert Needs.of(model.config).in_words() == {
        "tokenizer": "that of the base model", "vocabulary": "97 tokens at most",
        "weights": "any: it reads tokens only",
    }  # fmt: skip


def test_a_head_for_states_of_another_width_is_refused() -> None:
    base = make_base()
    head = make_head(base, "a")
    head.config.hidden_size = 16
    with pytest.raises(ValueError, match="reads states of width 16, but those of LlamaForCausalLM have 32"):
        head.bind(base, check=False)
