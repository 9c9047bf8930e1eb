"""Adapters on one backbone, scored in one forward, give the values that each gives alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from mavis_logits import MavisLogitsProcessor, ValueModel
from mavis_logits.scoring.scorer import RaggedScorer, make_scorer
from mavis_logits.testing import check_scorer
from mavis_logits.values.ensemble import ValueFunctions
from mavis_logits.values.fused import FusedValueModel, StackedLoRALinear, fusable_groups, why_not_fused
from tiny import PAD, VOCABULARY, make_adapter, make_base, make_value_model


@pytest.fixture
def adapters() -> list[ValueModel]:
    return [make_adapter("a", seed=2), make_adapter("b", "c", seed=3, rank=2), make_adapter("d", seed=4)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gemma3", "qwen3"])
def test_fused_scoring_equals_separate_scoring(architecture: str) -> None:
    models = [
        make_adapter("a", seed=2, architecture=architecture),
        make_adapter("b", "c", seed=3, rank=2, architecture=architecture),
    ]
    scorer = make_scorer(FusedValueModel(models))
    assert isinstance(scorer, RaggedScorer)
    for seed in (0, 1):
        check_scorer(scorer, VOCABULARY, seed=seed, steps=8, models=models)


def test_models_without_adapters_on_one_backbone_are_read_once() -> None:
    first = make_value_model("a")
    second = ValueModel._assemble(type(first.config)(first.config.backbone_config, objectives=["b"]), first.backbone)
    with torch.no_grad():
        second.head.weight.normal_()
    fused = FusedValueModel([first, second])
    assert fused.copies == 1
    check_scorer(make_scorer(fused), VOCABULARY, steps=6, models=[first, second])


def test_an_adapter_and_the_bare_backbone_are_fused_too() -> None:
    bare = make_adapter("a", seed=2)
    with torch.no_grad():
        for name, parameter in bare.backbone.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    bare.merge_lora()  # an adapter of zeros: the backbone itself
    models = [bare, make_adapter("b", seed=3)]
    assert why_not_fused(*models) is None
    check_scorer(make_scorer(FusedValueModel(models)), VOCABULARY, steps=6, models=models)


def test_the_backbone_is_in_memory_once(adapters: list[ValueModel]) -> None:
    fused = FusedValueModel(adapters)
    assert fused.copies == 3
    own = {p.data_ptr() for n, p in adapters[0].backbone.state_dict().items() if "lora_" not in n}
    shared = {p.data_ptr() for p in fused.backbone.parameters()}
    assert shared <= own
    extra = sum(b.numel() for m in fused.modules() if isinstance(m, StackedLoRALinear) for b in (m.down, m.up))
    assert extra < sum(p.numel() for p in fused.backbone.parameters()) / 2


@pytest.mark.parametrize("given", ["list", "mapping"])
def test_generate_is_the_same_fused_and_one_after_another(adapters: list[ValueModel], given: str) -> None:
    base = make_base(seed=5)
    prompts = torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, 10]])
    functions: Any = adapters
    if given == "mapping":
        functions = {"x": adapters[0], "c": adapters[1], "y": adapters[2]}
    weights = [0.5, 0.2, 0.3, 1.0] if given == "list" else {"x": 0.5, "c": 0.3, "y": 1.0}
    ids = []
    for fuse in (True, None, False):
        mavis = MavisLogitsProcessor(functions, weights, fuse=fuse, pad_token_id=PAD, top_k=6)
        assert len(mavis.functions.models) == (3 if fuse is False else 1)
        ids.append(
            base.generate(
                input_ids=prompts, attention_mask=(prompts != PAD).long(), do_sample=False, max_new_tokens=12,
                logits_processor=[mavis], pad_token_id=PAD,
            )
        )  # fmt: skip
    assert torch.equal(ids[0], ids[2])
    assert torch.equal(ids[1], ids[2])


def test_adapters_loaded_from_folders_are_fused_or_merged(tmp_path: Path) -> None:
    base = make_base(seed=1)
    base.config.name_or_path = str(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    folders = {}
    for name, seed in (("a", 2), ("b", 3)):
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
        model = ValueModel.from_backbone(base, [name], lora=config)
        torch.manual_seed(seed)
        with torch.no_grad():
            model.head.weight.normal_()
            for key, parameter in model.backbone.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.3)
        model.save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
    fused = MavisLogitsProcessor.from_pretrained(folders, model=base, top_k=5)
    apart = MavisLogitsProcessor.from_pretrained(folders, model=base, top_k=5, fuse=False)
    assert isinstance(fused.functions.models[0], FusedValueModel)
    assert [model.lora for model in apart.functions.models] == [None, None]
    scores, ids = torch.randn(2, VOCABULARY), torch.tensor([[5, 6, 7], [8, 9, 10]])
    torch.testing.assert_close(fused(ids, scores), apart(ids, scores), atol=1e-4, rtol=1e-4)
    alone = MavisLogitsProcessor.from_pretrained(folders["a"], model=base, top_k=5)
    assert alone.functions.models[0].lora is None  # nothing to fuse it with: merged


def test_models_that_do_not_fit_are_scored_separately_or_refused() -> None:
    one, other = make_adapter("a", seed=2), make_adapter("b", seed=3, base_seed=7)
    assert fusable_groups([one, other]) == []
    assert len(ValueFunctions([one, other]).models) == 2
    with pytest.raises(ValueError, match=r"fuse=True, but the backbones for .* differ \(at .*use fuse"):
        ValueFunctions([one, other], fuse=True)
    with pytest.raises(ValueError, match="no LoRA adapter of their own"):
        ValueFunctions([one, make_value_model("b")], fuse=True)
    with pytest.raises(ValueError, match="fuse=True runs several value models"):
        ValueFunctions(one, fuse=True)
    with pytest.raises(ValueError, match="cannot be scored in one forward"):
        FusedValueModel([one, other])
    dora = make_adapter("c", seed=4, use_dora=True)
    assert "no plain LoRA" in (why_not_fused(one, dora) or "")
    assert "float64" in (why_not_fused(one, make_adapter("c", seed=4).double()) or "")
    assert why_not_fused(one, make_adapter("d", seed=4)) is None
