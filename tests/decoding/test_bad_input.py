"""Bad input to a processor: errors that say what was given, expected and to be done; and nothing is lost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mavis_logits import MavisConfig, MavisLogitsProcessor, ValueModel
from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from tiny import PAD, VOCABULARY, make_base, make_head, make_value_model

IDS = torch.tensor([[5, 6, 7], [PAD, 8, 9]])


def scores(rows: int = 2, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


def steer(functions: Any = None, **settings: Any) -> MavisLogitsProcessor:
    functions = functions if functions is not None else make_value_model("a", "b")
    return MavisLogitsProcessor(functions, **{"top_k": 4, "pad_token_id": PAD} | settings)


# ---- when the processor is made: before anything is generated ----


def test_a_value_function_for_another_tokenizer() -> None:
    def tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))

    model = make_value_model("a")
    model.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer("a", "b"))
    steer(model, tokenizer=tokenizer("a", "b"))
    with pytest.raises(ValueError, match=r"reads tokens of another tokenizer .* use a value function made for"):
        steer(model, tokenizer=tokenizer("b", "a"))


def test_an_unknown_objective() -> None:
    with pytest.raises(ValueError, match=r"objective 'bb' \(did you mean 'b'\?\); there are values for \['a', 'b'\]"):
        steer(weights={"a": 0.5, "bb": 0.5})
    with pytest.raises(ValueError, match=r"weights name the objective 'c'"):
        steer(config=MavisConfig(weights={"c": 1.0}))


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weights must be finite, got \[.*\] for \['a', 'b'\]"):
        steer(weights={"a": weight})
    mavis = steer()
    with pytest.raises(ValueError, match="weights must be finite"):
        mavis.weights = [0.5, weight]
    assert mavis.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("beta", [math.nan, math.inf, -1.0, torch.ones(2, 2), [1.0, -1.0]])
def test_a_beta_out_of_range(beta: Any) -> None:
    with pytest.raises(ValueError, match=r"beta must be a finite number of at least 0, or one a row \[R\], got"):
        steer(beta=beta)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, "15"])
def test_fewer_than_one_candidate(top_k: Any) -> None:
    with pytest.raises(ValueError, match="top_k must be a whole number of at least 1, or None for all tokens, got"):
        steer(top_k=top_k)


def test_a_mistyped_setting() -> None:
    with pytest.raises(
        ValueError, match="unknown setting 'normalise' of MavisLogitsProcessor; did you mean 'normalize'"
    ):
        steer(normalise="none")


def test_a_head_of_another_base_model() -> None:
    with pytest.raises(ValueError, match=r"on the hidden states of .*, but the model given has weights 2:\w{16}: load"):
        steer(make_head(make_base(), "a"), model=make_base(seed=5))


def test_a_head_on_another_device() -> None:
    with pytest.raises(ValueError, match="the value head is on meta, the base model on cpu: move one of them"):
        steer(make_head(make_base(), "a").to("meta"), model=make_base())


@pytest.mark.parametrize("kind", ["model", "head"])
def test_a_damaged_file(kind: str, tmp_path: Path) -> None:
    base = make_base()
    function: Any = make_value_model("a") if kind == "model" else make_head(base, "a")
    function.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"has a corrupt or half-written safetensors file .*: download or save it again"):
        MavisLogitsProcessor.from_pretrained(str(tmp_path), model=base)


def test_a_head_loaded_without_its_model(tmp_path: Path) -> None:
    make_head(make_base(), "a").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a value head, which needs its base model's hidden states: pass model="):
        MavisLogitsProcessor.from_pretrained(str(tmp_path))


# ---- at the first step ----


def test_a_head_without_a_model_attached() -> None:
    base = make_base()
    mavis = steer(make_head(base, "a"))
    with pytest.raises(ValueError, match=r"what the base model has computed: pass model=model, or use mavis\.attach"):
        mavis(IDS, scores())
    with mavis.attach(base):
        assert base.generate(IDS[:1], max_new_tokens=2, logits_processor=[mavis]).shape[1] > 3
    with pytest.raises(ValueError, match="need what the base model has computed"):
        base.generate(IDS[:1], max_new_tokens=2, logits_processor=[mavis])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    model = make_value_model("a", "b")
    with torch.no_grad():
        model.head.bias[1] = bad
    with pytest.raises(ValueError, match=rf"value function for 'b' gave {bad} \(row 0, candidate 0\): its weights"):
        steer(model)(IDS, scores())


def test_a_value_model_that_overflows_in_its_dtype() -> None:
    model = make_value_model("a").half()
    with torch.no_grad():
        model.backbone.layers[1].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"for 'a' gave (nan|-?inf) .* overflows in its dtype; load it in float32"):
        steer(model)(IDS, scores())


def test_values_that_are_not_finite_from_a_head() -> None:
    base = make_base()
    head = make_head(base, "a")
    with torch.no_grad():
        head.out.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"the value function for 'a' gave nan"):
        base.generate(IDS, max_new_tokens=2, logits_processor=[steer(head, model=base)])


def test_a_value_model_on_another_device() -> None:
    mavis = steer(make_value_model("a").to("meta"))
    with pytest.raises(ValueError, match=r"scores are on cpu, .* for \['a'\] on meta: pass device='cpu' or move"):
        mavis(IDS, scores())


def test_a_value_model_of_a_smaller_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"knows 97 tokens, but the base model's scores have 120: it was made for"):
        steer()(IDS, scores(vocabulary=120))


@pytest.mark.parametrize("ids", [torch.zeros(2, 0, dtype=torch.long), torch.tensor([[PAD, PAD, PAD], [5, 6, 7]])])
def test_an_empty_prompt(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="empty"):
        steer()(ids, scores())


def test_a_prompt_longer_than_the_value_models_context() -> None:
    config = make_base().config.to_dict() | {"max_position_embeddings": 8}
    model = ValueModel.from_backbone(LlamaForCausalLM(LlamaConfig(**config)), ["a"])
    mavis = steer(model)
    fitting = torch.arange(2, 9)[None]  # 7 tokens, and a candidate
    assert torch.isfinite(mavis(fitting, scores(1))).any()
    with pytest.raises(ValueError, match=r"of 9 tokens is longer than the 8 .* \['a'\] can read: shorten the prompt"):
        mavis(torch.arange(2, 10)[None], scores(1))


@pytest.mark.parametrize(
    ("ids", "shape"),
    [
        (torch.tensor([5, 6, 7]), (1, VOCABULARY)),  # one packed row of all requests
        (torch.tensor([[5, 6, 7]]), (1, 3, VOCABULARY)),
        (torch.tensor([[5, 6, 7]]), (2, VOCABULARY)),
        (None, (2, VOCABULARY)),
    ],
)
def test_the_shapes_of_continuous_batching(ids: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Continuous batching gives processors no history: use generate"):
        steer()(ids, torch.randn(shape))


@pytest.mark.parametrize("name", ["weights", "beta"])
def test_settings_of_another_number_of_requests(name: str) -> None:
    given = {"weights": torch.ones(3, 2), "beta": torch.ones(3)}[name]
    with pytest.raises(ValueError, match=f"{name} are given for 3 requests, but the batch has 2 rows"):
        steer(**{name: given})(IDS, scores())


def test_an_attention_that_takes_no_mask_of_ours() -> None:
    model = make_value_model("a")
    model.backbone.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r'takes no 4-D mask \(attn_implementation="sdpa" does\)'):
        steer(model, reading="packed")(IDS, scores())


# ---- and nothing is lost ----


def test_a_processor_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base()
    mavis, fresh = steer(), steer()
    base.generate(IDS, do_sample=False, max_new_tokens=3, pad_token_id=PAD, logits_processor=[mavis])
    model = mavis.functions.models[0]
    right = model.head.bias.detach().clone()
    with torch.no_grad():
        model.head.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="gave nan"):
        base.generate(IDS, max_new_tokens=3, pad_token_id=PAD, logits_processor=[mavis])
    with torch.no_grad():
        model.head.bias.copy_(right)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.backbone.layers[1], "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base.generate(IDS, max_new_tokens=3, pad_token_id=PAD, logits_processor=[mavis])
    monkeypatch.undo()
    again = base.generate(IDS, do_sample=False, max_new_tokens=6, pad_token_id=PAD, logits_processor=[mavis])
    expected = base.generate(IDS, do_sample=False, max_new_tokens=6, pad_token_id=PAD, logits_processor=[fresh])
    assert torch.equal(again, expected)
