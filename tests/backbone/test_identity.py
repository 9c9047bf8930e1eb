"""A base model is known by what computes its states: not by its name, its folder, its wrappers or its precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mavis_logits.backbone.fingerprint import Identity, parameters_fingerprint
from mavis_logits.backbone.weights import state_of
from rare_models import make
from tiny import VOCABULARY, make_base

CPU = torch.device("cpu")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def with_lora(seed: int = 1, **config: Any) -> PeftModel:
    """The base model with an adapter that does something."""
    return trained(get_peft_model(make_base(), LoraConfig(**LORA | config)), seed).eval()


def trained(model: Any, seed: int = 1) -> Any:
    """Every LoRA weight at random."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model


def difference(model: nn.Module, of: nn.Module) -> str | None:
    """What tells `model` from `of`, by the record that is kept of that."""
    record = Identity(of)
    return Identity(model).difference(record.fingerprint, record.sketch)


def changed(change: Callable[[torch.Tensor], torch.Tensor], part: str = "") -> nn.Module:
    """The base model with some of its weights changed."""
    base = make_base()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if part in name:
                parameter.copy_(change(parameter))
    return base


# ---- the same model ----


def loaded_from_a_folder(folder: Path) -> nn.Module:
    make_base().save_pretrained(folder / "there")
    return AutoModelForCausalLM.from_pretrained(folder / "there")  # type: ignore[no-any-return]


def compiled_layers(_: Path) -> nn.Module:
    base = make_base()
    base.model.layers[0] = torch.compile(base.model.layers[0])
    return base


def with_a_loaded_adapter(_: Path) -> nn.Module:
    base = make_base()
    trained(get_peft_model(base, LoraConfig(**LORA))).base_model.disable_adapter_layers()
    return base


def merged_and_unmerged(_: Path) -> nn.Module:
    model = with_lora()
    model.merge_adapter()
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    return model


def with_saved_modules(_: Path) -> nn.Module:
    model = with_lora(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.base_model.disable_adapter_layers()
    return model


def offloaded_to_disk(folder: Path) -> nn.Module:
    return disk_offload(make_base(), str(folder), execution_device=CPU)  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[Path], nn.Module]] = {
    "another folder": loaded_from_a_folder,
    "bfloat16": lambda _: make_base().bfloat16(),
    "float16": lambda _: make_base().half(),
    "bfloat16 in float32": lambda _: make_base().bfloat16().float(),
    "float16 in float32": lambda _: make_base().half().float(),
    "compiled": lambda _: torch.compile(make_base()),  # type: ignore[return-value]
    "compiled layers": compiled_layers,
    "data parallel": lambda _: nn.DataParallel(make_base()),
    "untrained adapter": lambda _: get_peft_model(make_base(), LoraConfig(**LORA)),
    "adapter loaded only": with_a_loaded_adapter,
    "adapter merged and unmerged": merged_and_unmerged,
    "saved modules off": with_saved_modules,
    "offloaded": lambda _: cpu_offload(make_base(), execution_device=CPU),
    "offloaded to disk": offloaded_to_disk,
}


@pytest.mark.parametrize("copy_of_it", COPIES)
def test_a_copy_is_known(copy_of_it: str, tmp_path: Path) -> None:
    assert difference(COPIES[copy_of_it](tmp_path), of=make_base()) is None


@pytest.mark.parametrize("copy_of_it", COPIES)
def test_a_model_is_known_by_a_record_of_its_copy(copy_of_it: str, tmp_path: Path) -> None:
    assert difference(make_base(), of=COPIES[copy_of_it](tmp_path)) is None


def test_copies_of_one_precision_have_one_fingerprint(tmp_path: Path) -> None:
    alike = [copied for name, copied in COPIES.items() if not name.startswith("float16")]
    exact = {Identity(copied(tmp_path / str(number))).fingerprint for number, copied in enumerate(alike)}
    assert len(exact) == 1
    version, _, digits = exact.pop().partition(":")
    assert (version, len(digits)) == ("2", 16)
    assert int(digits, 16) >= 0


def test_tied_weights_count_as_if_they_were_not() -> None:
    tied = make_base()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    apart = make_base()
    with torch.no_grad():
        apart.lm_head.weight.copy_(apart.model.embed_tokens.weight)
    assert Identity(tied).fingerprint == Identity(apart).fingerprint != Identity(make_base()).fingerprint


def test_a_text_model_is_that_inside_a_model_with_a_vision_tower() -> None:
    seeing = make("llava")
    text = LlamaForCausalLM(copy.deepcopy(seeing.config.text_config))
    text.model.load_state_dict(seeing.model.language_model.state_dict())
    text.lm_head.weight = seeing.lm_head.weight
    assert difference(text, of=seeing) is None
    with torch.no_grad():
        for parameter in seeing.model.vision_tower.parameters():
            parameter.add_(1)
    assert difference(text, of=seeing) is None


# ---- adapters ----


def test_an_active_adapter_makes_another_model() -> None:
    assert difference(with_lora(), of=make_base()) == (
        "the adapter default is active, without which it is the same: disable it"
    )
    found = difference(make_base(), of=with_lora())
    assert found is not None
    assert found.startswith("4 of 21 weights differ")
    assert "_proj" in found


def test_the_same_adapter_under_another_name_makes_the_same_model() -> None:
    other = trained(get_peft_model(make_base(), LoraConfig(**LORA), adapter_name="mine"))
    assert difference(other, of=with_lora()) is None


def test_an_adapter_may_be_merged_or_not() -> None:
    record = with_lora()
    merged = with_lora()
    merged.merge_adapter()
    assert difference(merged, of=record) is None
    assert difference(with_lora().merge_and_unload(), of=record) is None
    assert difference(with_lora().merge_and_unload().half(), of=record) is None
    assert difference(record, of=with_lora().merge_and_unload()) is None


def test_another_adapter_loaded_beside_changes_nothing_until_it_is_active() -> None:
    model = with_lora()
    record = Identity(model).fingerprint
    model.add_adapter("other", LoraConfig(**LORA))
    trained(model, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.mul_(2)
    assert Identity(with_lora()).fingerprint != Identity(make_base()).fingerprint
    first = Identity(model).fingerprint
    state = state_of(model)
    model.set_adapter("other")
    assert Identity(model).fingerprint != first
    assert state_of(model) != state
    model.set_adapter("default")
    assert Identity(model).fingerprint == first
    assert record is not None


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_do_more_than_add_count_too(config: dict[str, Any]) -> None:
    model = with_lora(**config)
    assert difference(with_lora(**config), of=model) is None
    assert difference(with_lora(seed=2, **config), of=model) is not None
    assert difference(make_base(), of=model) is not None
    with model.disable_adapter():
        assert difference(model, of=make_base()) is None


def test_the_strength_of_an_adapter_counts() -> None:
    model = with_lora()
    before, state = Identity(model).fingerprint, state_of(model)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    assert Identity(model).fingerprint != before
    assert state_of(model) != state


def test_saved_modules_count_while_they_are_active() -> None:
    model = with_lora(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    assert "lm_head" in str(difference(model, of=with_lora()))


def test_a_soft_prompt_makes_another_model() -> None:
    model = get_peft_model(make_base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert difference(model, of=make_base()) is not None
    assert difference(model.get_base_model(), of=make_base()) is None
    with model.disable_adapter():
        assert difference(model, of=make_base()) is None


def test_adapters_are_left_out_when_asked() -> None:
    merged = with_lora()
    merged.merge_adapter()
    for model in (with_lora(), merged, with_lora(use_dora=True), with_lora(modules_to_save=["lm_head"])):
        record = Identity(make_base())
        assert Identity(model, adapters=False).difference(record.fingerprint, record.sketch) is None


# ---- other models ----


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "other weights": lambda: make_base(seed=5),
    "one tensor": lambda: changed(lambda w: w * 1.05, "layers.1.mlp.up_proj"),
    "a little of everything": lambda: changed(lambda w: w * (1 + 1e-3 * torch.randn_like(w))),
    "fine-tuned in half precision": lambda: changed(lambda w: w + 0.01 * torch.randn_like(w)).half(),
    "merged adapter": lambda: with_lora().merge_and_unload(),
    "another family": lambda: make_base("qwen2"),
    "another size": lambda: make_base("gpt2"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_is_told_apart(other: str) -> None:
    assert difference(OTHERS[other](), of=make_base()) is not None


def test_what_differs_is_named_with_its_size() -> None:
    assert difference(OTHERS["one tensor"](), of=make_base()) == (
        "1 of 21 weights differ, layers.1.mlp.up_proj.weight the most, by 5.0%"
    )
    assert str(difference(OTHERS["another family"](), of=make_base())).startswith(
        "it has 6 more, layers.0.self_attn.q_proj.bias among them; "
    )
    cut = make_base()
    del cut.model.layers[1]
    assert difference(cut, of=make_base()) == "it lacks 9 of 21 weights"


def test_a_table_that_has_grown_may_be_compared_as_far_as_it_went() -> None:
    grown, record = make_base(), Identity(make_base())
    grown.resize_token_embeddings(VOCABULARY + 3)
    assert "embed_tokens" in str(Identity(grown).difference(record.fingerprint, record.sketch))
    assert Identity(grown, vocabulary=VOCABULARY).difference(record.fingerprint, record.sketch) is None


# ---- quantised copies (with torchao and bitsandbytes: test_quantised.py) ----


def to_levels(weight: torch.Tensor, levels: int) -> torch.Tensor:
    """What is left of a weight in blocks of 32 with evenly spaced levels, as a GGUF file holds it."""
    blocks = weight.reshape(-1, 32)
    step = blocks.abs().amax(dim=1, keepdim=True) / (levels // 2)
    return (blocks / step).round().mul(step).reshape(weight.shape)


def test_a_copy_of_four_bits_is_known_when_it_was_taken_back_to_floats() -> None:
    small = changed(lambda w: to_levels(w, 16), "proj")
    assert difference(small, of=make_base()) is None
    assert difference(make_base(), of=small) is None
    assert difference(small.bfloat16(), of=make_base()) is None
    tuned = changed(lambda w: to_levels(w + 0.5 * w.std() * torch.randn_like(w), 16), "proj")
    assert difference(tuned, of=make_base()) is not None


class Packed(nn.Module):
    """A layer as GPTQ makes it: nothing that could be read without knowing how."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(4))


def test_what_is_packed_in_an_unknown_way_does_not_count() -> None:
    packed = make_base()
    packed.model.layers[0].self_attn.q_proj = Packed(packed.model.layers[0].self_attn.q_proj)
    assert difference(packed, of=make_base()) is None
    with torch.no_grad():
        packed.model.norm.weight.mul_(1.1)
    assert difference(packed, of=make_base()) is not None


def test_float8_with_scales_is_read() -> None:
    base = make_base()
    for module in list(base.modules()):
        if isinstance(module, nn.Linear) and module is not base.lm_head:
            scale = module.weight.detach().abs().max() / 448
            weight = (module.weight.detach() / scale).to(torch.float8_e4m3fn)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    assert difference(base, of=make_base()) is None
    assert difference(make_base(), of=base) is None
    assert difference(base, of=make_base(seed=5)) is not None


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(make_base().config)
    assert difference(empty, of=make_base()) == "none of its weights can be read"


# ---- records ----


def test_fingerprints_of_the_first_version_are_still_known() -> None:
    first = parameters_fingerprint(make_base())
    assert len(first) == 16
    for copied in (make_base(), make_base().bfloat16(), torch.compile(make_base())):
        assert Identity(copied).difference(first) is None
    assert Identity(get_peft_model(make_base(), LoraConfig(**LORA))).difference(first) is None
    assert "of version 1" in str(Identity(make_base(seed=5)).difference(first))


def test_fingerprints_are_what_they_were() -> None:
    """Those in files would not be known else. Of weights that do not depend on a random generator."""
    base = make_base()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 251 / 128 - 1).reshape(parameter.shape))
    assert parameters_fingerprint(base) == "984e095927f2c5b7"
    assert Identity(base).fingerprint == "2:5047871ffa52e77b"


def test_an_unknown_record_says_nothing_and_a_newer_one_is_refused() -> None:
    assert Identity(make_base()).difference(None) is None
    with pytest.raises(ValueError, match=r"of version 3, which this mavis-logits does not know: pip install -U"):
        Identity(make_base()).difference("3:0123456789abcdef")
    with pytest.raises(ValueError, match="a sketch of a base model's weights is damaged"):
        Identity(make_base()).difference("2:0123456789abcdef", "AAAA")


def test_the_state_of_a_model_changes_with_whatever_is_done_to_it() -> None:
    def done(change: Callable[[Any], Any]) -> bool:
        base = make_base()
        before = state_of(base)
        assert state_of(base) == before
        change(base)
        return state_of(base) != before

    @torch.no_grad()
    def written(base: Any) -> None:
        base.model.norm.weight[0] += 1

    def behind_the_back(base: Any) -> None:
        for parameter in base.parameters():
            parameter.data.mul_(1.5)

    assert done(written)
    assert done(behind_the_back)
    assert done(lambda base: base.bfloat16())
    assert done(lambda base: base.resize_token_embeddings(VOCABULARY + 1))
    assert done(lambda base: get_peft_model(base, LoraConfig(**LORA)))
    assert not done(lambda base: base(torch.tensor([[1, 2, 3]])))
