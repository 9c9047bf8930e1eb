"""Several value functions as one: names, outputs, weights and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from mavis_logits import MavisLogitsProcessor, ValueHead, ValueModel
from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.values.ensemble import ValueFunctions
from mavis_logits.values.loading import load_value_functions
from tiny import PAD, VOCABULARY, functions, make_base, make_head, make_value_model


def tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))


def parts(functions: ValueFunctions) -> dict[int, torch.Tensor]:
    """Made-up values [2, 3, outputs] of every value function; all different."""
    torch.manual_seed(0)
    return {f: torch.randn(2, 3, len(f.config.objectives)) for f in functions.all}


# ---- objectives ----


def test_one_value_function_bears_the_names_of_its_config() -> None:
    model = make_value_model("a", "b")
    functions = ValueFunctions(model)
    assert functions.objectives == ["a", "b"]
    assert functions.all == [model]
    values = parts(functions)
    assert torch.equal(functions.gather(values), values[model])


def test_models_and_heads_mix_in_the_order_given() -> None:
    base = make_base()
    head, model = make_head(base, "a", "b"), make_value_model("c")
    functions = ValueFunctions([head, model])
    assert functions.objectives == ["a", "b", "c"]
    assert (functions.models, functions.heads) == ([model], [head])
    values = parts(functions)
    assert torch.equal(functions.gather(values), torch.cat([values[head], values[model]], dim=-1))


def test_a_mapping_names_and_orders_outputs() -> None:
    model, other = make_value_model("a", "b"), make_value_model("reward")
    functions = ValueFunctions({"b": model, "mine": other, "a": model})
    assert functions.objectives == ["b", "mine", "a"]
    assert functions.all == [model, other]
    values = parts(functions)
    whole = functions.gather(values)
    assert torch.equal(whole[..., 0], values[model][..., 1])
    assert torch.equal(whole[..., 1], values[other][..., 0])
    assert torch.equal(whole[..., 2], values[model][..., 0])


def test_some_outputs_of_a_model_may_be_left_out() -> None:
    model = make_value_model("a", "b")
    functions = ValueFunctions({"b": model})
    values = parts(functions)
    assert torch.equal(functions.gather(values), values[model][..., 1:])


def test_value_functions_are_in_evaluation_mode_while_they_are_read() -> None:
    model = make_value_model("a").train()
    functions = ValueFunctions(model)
    with functions.reading():
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("given", [[], {}, ()])
def test_nothing_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="no value function given: pass at least one ValueModel or ValueHead"):
        ValueFunctions(given)


def test_an_objective_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"several value functions predict \['a'\]: pass a mapping"):
        ValueFunctions([make_value_model("a"), make_value_model("a", "b")])


def test_an_objective_that_a_value_function_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'c' is none of the objectives \['a', 'b'\] of its value function"):
        ValueFunctions({"c": make_value_model("a", "b")})


@pytest.mark.parametrize("given", ["org/model", 3, None, make_base()])
def test_what_is_no_value_function_is_refused(given: Any) -> None:
    for form in ([given], {"a": given}):
        with pytest.raises(ValueError, match=f"expected a ValueModel or a ValueHead, got {type(given).__name__}"):
            ValueFunctions(form)


@pytest.mark.parametrize("given", [3, None])
def test_what_is_no_collection_either_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=f"expected a ValueModel or a ValueHead, got {type(given).__name__}"):
        ValueFunctions(given)


# ---- weights ----


def test_weights_by_name_by_order_and_by_row() -> None:
    functions = ValueFunctions(make_value_model("a", "b"))
    assert functions.weights(None).tolist() == [0.5, 0.5]
    assert functions.weights({"b": 2}).tolist() == [0.0, 2.0]
    assert functions.weights([1, -0.5]).tolist() == [1.0, -0.5]
    assert functions.weights(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"aa": 1.0}, r"weights name the objective 'aa' \(did you mean 'a'\?\); there are values for \['a', 'b'\]"),
        ({"zzz": 1.0}, r"weights name the objective 'zzz'; there are values for \['a', 'b'\]"),
        ([1.0], r"weights must be \[2\] or \[rows, 2\] for \['a', 'b'\], got \[1\]"),
        (torch.ones(2, 2, 2), r"weights must be \[2\] or \[rows, 2\] .*, got \[2, 2, 2\]"),
        (1.0, r"weights must be \[2\] or .*, got \[\]"),
        ([1.0, float("nan")], r"weights must be finite, got \[1.0, nan\]"),
        ({"a": float("inf")}, r"weights must be finite, got \[inf, 0.0\]"),
        (["x", "y"], r"weights must be numbers, by objective or in the order \['a', 'b'\], got"),
        ({"a": "much"}, r"weights must be numbers"),
        ({"a": None}, r"weights must be numbers"),
    ],
)
def test_other_weights_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValueFunctions(make_value_model("a", "b")).weights(weights)


# ---- tokenizers and vocabularies ----


def test_value_functions_for_another_tokenizer_are_refused() -> None:
    ours, other = tokenizer("a", "b"), tokenizer("b", "a")
    model = make_value_model("a")
    model.config.tokenizer_fingerprint, model.config.base_model = tokenizer_fingerprint(ours), "org/base"
    ValueFunctions(model, ours)
    with pytest.raises(ValueError, match=r"of another tokenizer \(\w{16}, of org/base\) than the one given"):
        ValueFunctions(model, other)
    model.config.tokenizer_fingerprint = None  # unknown: nothing to compare
    ValueFunctions(model, other)


def test_a_smaller_vocabulary_is_refused_and_a_larger_one_is_not() -> None:
    functions = ValueFunctions(make_value_model("a"))
    functions.check_vocabulary(VOCABULARY)
    functions.check_vocabulary(VOCABULARY - 3)  # scores may be cut, a value model's table padded
    with pytest.raises(
        ValueError, match="knows 97 tokens, but the base model's scores have 98: it was made for another tokenizer"
    ):
        functions.check_vocabulary(VOCABULARY + 1)


# ---- loading ----


def test_each_id_is_loaded_once_and_objects_pass_through(tmp_path: Path) -> None:
    base, model = make_base(), make_value_model("c")
    make_value_model("a", "b").save_pretrained(tmp_path / "model")
    make_head(base, "d").save_pretrained(tmp_path / "head")
    loaded = load_value_functions(
        {"a": str(tmp_path / "model"), "b": tmp_path / "model", "c": model, "d": tmp_path / "head"}, base, "cpu", {}
    )
    assert loaded["a"] is loaded["b"]
    assert loaded["c"] is model
    assert isinstance(loaded["a"], ValueModel)
    assert isinstance(loaded["d"], ValueHead)
    assert ValueFunctions(loaded).objectives == ["a", "b", "c", "d"]
    assert isinstance(load_value_functions(str(tmp_path / "model"), None, None, {}), ValueModel)
    assert [type(f) for f in load_value_functions([tmp_path / "model", model], None, None, {})] == [ValueModel] * 2


def test_an_adapter_repo_takes_its_backbone_from_the_base_model(tmp_path: Path) -> None:
    base = make_base()
    base.config.name_or_path = "org/base"
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    ValueModel.from_backbone(base, ["a"], num_layers=1, lora=lora).save_pretrained(tmp_path)
    loaded = load_value_functions(tmp_path, base, None, {"dtype": torch.bfloat16})
    assert loaded.config.backbone == "org/base"
    assert loaded.dtype == torch.bfloat16
    assert loaded.lora is None


def test_a_peft_classifier_of_the_hub_is_a_value_function(tmp_path: Path) -> None:
    config = make_base().config
    config.num_labels, config.pad_token_id = 1, PAD
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    classifier = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    adapter = get_peft_model(classifier, LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    assert load_value_functions(tmp_path / "adapter", None, None, {}).config.objectives == ["reward"]


def test_a_head_without_its_model_is_refused(tmp_path: Path) -> None:
    make_head(make_base(), "a").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a value head, which needs its base model's hidden states: pass model="):
        load_value_functions(str(tmp_path), None, None, {})


def test_what_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_value_functions(str(tmp_path / "nowhere"), None, None, {})


def test_a_head_whose_objectives_have_no_weight_is_not_read() -> None:
    base = make_base()
    heads = functions("heads", base)
    mavis = MavisLogitsProcessor(heads, {"a": 1.0}, 4.0, model=base, top_k=6, pad_token_id=PAD, trace=True)
    rested = heads["b"]

    def fail(*_: Any) -> None:
        raise AssertionError("a head was read that nobody asked")

    with rested.register_forward_pre_hook(fail):
        base.generate(torch.tensor([[5, 6, 7]]), logits_processor=[mavis], max_new_tokens=3, pad_token_id=PAD)
        assert torch.isnan(mavis.trace.steps[0].values[..., 1]).all()
        assert torch.isfinite(mavis.trace.steps[0].values[..., 0]).all()
        mavis.weights = {"a": 0.5, "b": 0.5}
        with pytest.raises(AssertionError, match="nobody asked"):
            base.generate(torch.tensor([[5, 6, 7]]), logits_processor=[mavis], max_new_tokens=3, pad_token_id=PAD)
