"""The one seam to foreign models: their parts, how they may be read, and that asking leaves no trace."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mavis_logits import MavisBlockwise, MavisSampling, MavisTreeSearch, ValueHead, ValueModel
from mavis_logits.backbone import Backbone, UnsupportedModel
from mavis_logits.backbone.anatomy import arguments_of
from mavis_logits.commands.doctor import report
from mavis_logits.scoring.scorer import LengthLimitedScorer, PlainScorer, RaggedScorer, RepeatedStateScorer, make_scorer
from mavis_logits.testing import check_scorer, recompute_values
from rare_models import IDS, RARE, SHAPE, make
from tiny import ARCHITECTURES, PAD, VOCABULARY, make_base, make_head, make_value_model

KINDS = {
    "llama": "packed", "gpt2": "packed", "qwen2": "packed", "qwen3": "packed", "mistral": "packed", "gemma3": "packed",
    "opt": "packed", "bert": "packed", "llava": "packed",
    "gemma2": "masked",  # transformers runs it with eager attention
    "bloom": "repeated", "mamba": "repeated", "mpt": "repeated", "gpt_neo": "repeated", "bart": "repeated",
    "qwen3_next": "repeated",
    "openai-gpt": "plain",
}  # fmt: skip
SCORERS = {"packed": RaggedScorer, "masked": RaggedScorer, "repeated": RepeatedStateScorer, "plain": PlainScorer}


def values_on(base: PreTrainedModel) -> ValueModel:
    model = ValueModel.from_backbone(base, ["a"], pad_token_id=PAD)
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
    return model


@pytest.mark.parametrize("architecture", sorted(KINDS))
def test_every_family_is_read_in_the_fastest_way_that_is_right(architecture: str) -> None:
    """And what a scorer gives by it is what re-forwarding gives; beyond every window, since these are of 4 tokens."""
    model = values_on(make(architecture))
    reading = Backbone.of(model.backbone).reading
    assert reading.kind == KINDS[architecture], reading
    assert bool(reading.reason) == (reading.kind != "packed")
    scorer = make_scorer(model) if reading.kind != "plain" else PlainScorer(model)
    assert type(scorer) is SCORERS[reading.kind]
    check_scorer(scorer, VOCABULARY, steps=4, tolerance=2e-3)


@pytest.mark.parametrize("architecture", ["mpt", "gpt_neo", "llama"])
def test_the_verdict_does_not_hang_on_weights_or_dtype(architecture: str) -> None:
    for scale in (0.01, 1.0):
        assert Backbone.of(make(architecture, scale)).reading.kind == KINDS[architecture]
    assert Backbone.of(make(architecture).to(torch.bfloat16)).reading.kind == KINDS[architecture]


def test_asking_leaves_the_process_and_the_model_as_they_were() -> None:
    base = make_base("qwen2")
    base.config.rope_parameters["rope_theta"] = 12345.0  # a configuration that no other test has asked about
    before, weights = copy.deepcopy(base.config.to_dict()), {k: v.clone() for k, v in base.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            assert Backbone.of(base).reading.kind == "packed"
            assert Backbone.of(base).trees.kind == "packed"
            assert len(Backbone.of(base).layers) == 2
            Backbone.of(base).require_causal()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(4), expected)
    assert base.config.to_dict() == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())
    assert not base._forward_pre_hooks
    assert not base.model._forward_pre_hooks


def test_threads_that_ask_at_once_get_one_answer() -> None:
    base = make_base("qwen2")
    base.config.rope_parameters["rope_theta"] = 54321.0
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(Backbone.of(base).reading)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reading.kind for reading in found] == ["packed"] * 4


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) | set(RARE)))
def test_states_of_a_layer_are_those_that_the_model_shows(architecture: str) -> None:
    base = make(architecture)
    backbone = Backbone.of(base)
    ids = torch.randint(3, 90, (2, 7))
    caught: list[torch.Tensor] = []
    handle = backbone.catch(1, caught.append)
    with torch.no_grad():
        shown = base(ids, output_hidden_states=True).hidden_states
    handle.remove()
    assert len(backbone.layers) == 2
    torch.testing.assert_close(caught[0], shown[0 if architecture == "mamba" else 1])  # Mamba shows no embedding
    with pytest.raises(UnsupportedModel, match="has 2 layers: name one of 1 to 2"):
        backbone.catch(3, caught.append)


def test_wrappers_are_seen_through() -> None:
    base = make_base("llama")
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    parallel = nn.Module()
    parallel.module = base  # as DistributedDataParallel keeps it
    for wrapper in (torch.compile(base), parallel):
        assert Backbone.of(wrapper).model is base
        assert Backbone.of(wrapper).decoder is base.model
    assert Backbone.of(adapted).model is adapted.get_base_model()
    assert Backbone.of(torch.compile(adapted)).decoder is adapted.get_base_model().model


def test_parts_are_those_of_the_text_side() -> None:
    llava = make("llava")
    assert Backbone.of(llava).decoder is llava.model.language_model
    assert [type(layer).__name__ for layer in Backbone.of(llava).layers] == ["LlamaDecoderLayer"] * 2
    t5 = T5ForConditionalGeneration(T5Config(**IDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    assert Backbone.of(t5).decoder is t5.decoder
    assert Backbone.of(t5).is_encoder_decoder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.Linear(2, 2), "expected a transformers language model, got Linear"),
        ("a name", "expected a transformers language model, got str"),
    ],
)
def test_what_is_no_language_model_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        Backbone.of(given)


def test_a_model_that_looks_ahead_is_refused_as_a_backbone() -> None:
    both_ways = BertLMHeadModel(BertConfig(**IDS, **SHAPE))
    with pytest.raises(UnsupportedModel, match=r"reads text in both directions.*is_decoder=True"):
        ValueModel.from_backbone(both_ways, ["a"])


def test_an_argument_that_would_be_dropped_is_an_error() -> None:
    mpt = Backbone.of(values_on(make("mpt")).backbone)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UnsupportedModel, match="MptModel takes no position_ids"):
        mpt.states(ids, position_ids=torch.tensor([[4, 5, 6]]))
    gpt = Backbone.of(make("openai-gpt"))
    with pytest.raises(UnsupportedModel, match="takes no cache"):
        gpt.states(ids, cache=object())
    assert arguments_of(gpt.decoder).bind("gpt", {"use_cache": False}) == {}


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) | set(RARE)))
def test_left_padding_changes_no_value(architecture: str) -> None:
    model = values_on(make(architecture))
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).values
        for i, row in enumerate(rows):
            torch.testing.assert_close(
                batch[i, width - len(row) :], model(torch.tensor([row])).values[0], atol=2e-3, rtol=1e-3
            )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_past_the_length_where_frequencies_change_everything_is_read_from_scratch(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 8}
    else:
        rope |= {"factor": 2.0}
    config = LlamaConfig(**IDS, **SHAPE, max_position_embeddings=8 if kind == "dynamic" else 64, rope_parameters=rope)
    torch.manual_seed(0)
    model = values_on(LlamaForCausalLM(config).eval())
    scorer = make_scorer(model)
    assert isinstance(scorer, LengthLimitedScorer)
    assert scorer.limit == 8
    sequence, candidates = [5, 6, 7], torch.tensor([[8, 9, 10]])
    scorer.begin(1)
    pending = torch.tensor([sequence])
    for step in range(9):
        found = scorer.read(pending, [pending.shape[1]], candidates)
        assert (len(sequence) + 1 > 8) == (not scorer._short)
        torch.testing.assert_close(found[0], recompute_values(model, sequence, candidates[0]), atol=1e-4, rtol=1e-4)
        scorer.commit(torch.tensor([step % 3]))
        sequence = [*sequence, int(candidates[0, step % 3])]
        pending = pending[:, :0]


@pytest.mark.parametrize(
    "architecture", ["mpt", "gpt_neo", "mamba", "bloom", "qwen3_next", "openai-gpt", "bart", "llava"]
)
def test_strategies_write_what_generate_writes(architecture: str, prompts: dict[str, torch.Tensor]) -> None:
    """Without a tilt, token by token, with rows of different lengths."""
    base = make(architecture)
    plain = base.generate(**prompts, do_sample=False, max_new_tokens=9, pad_token_id=PAD)
    steer = MavisSampling(make_head(base), beta=0.0, unscored="keep", model=base)
    found = base.generate(**prompts, do_sample=False, max_new_tokens=9, pad_token_id=PAD, custom_generate=steer)
    assert torch.equal(plain, found)


def test_an_encoder_decoder_is_steered_by_its_head() -> None:
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(**IDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=PAD)
    ).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, PAD, PAD]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    head = make_head(base)
    plain = base.generate(**inputs, do_sample=False, max_new_tokens=8)
    still = MavisSampling(head, beta=0.0, unscored="keep", model=base)
    assert torch.equal(base.generate(**inputs, do_sample=False, max_new_tokens=8, custom_generate=still), plain)
    steer = MavisSampling(head, beta=9.0, model=base)
    assert not torch.equal(base.generate(**inputs, do_sample=False, max_new_tokens=8, custom_generate=steer), plain)


@pytest.mark.parametrize("architecture", ["llama", "mamba", "bart"])
def test_searches_go_back_and_on_whatever_way_the_base_is_read(
    architecture: str, prompts: dict[str, torch.Tensor]
) -> None:
    """Sequences that were replaced on the way are read as if they had been there from the start."""
    base = make(architecture)
    values = make_value_model("a")
    for strategy in (
        MavisBlockwise(values, num_blocks=2, block_length=2, beta=0.0, model=base),
        MavisTreeSearch(values, num_simulations=3, beta=0.0, model=base),
    ):
        found = {}
        for reading in ("auto", "repeated"):
            strategy.reading = reading
            torch.manual_seed(0)
            found[reading] = base.generate(**prompts, do_sample=True, max_new_tokens=6, custom_generate=strategy)
        assert torch.equal(found["auto"], found["repeated"])


def test_a_reading_can_be_insisted_on(prompts: dict[str, torch.Tensor]) -> None:
    base, values = make_base("mamba"), make_value_model("a")
    assert isinstance(make_scorer(values, reading="repeated"), RepeatedStateScorer)
    with pytest.raises(ValueError, match=r"reading='packed', but the MambaModel for \['a'\] is repeated: .*recurrent"):
        make_scorer(values_on(base), reading="packed")
    with pytest.raises(ValueError, match="reading='packed', but the base MambaForCausalLM is repeated"):
        base.generate(**prompts, custom_generate=MavisSampling(values, model=base, reading="packed"))
    with pytest.raises(ValueError, match="reading must be one of auto, packed, repeated, got 'fast'"):
        MavisSampling(values, reading="fast")


def test_reading_from_scratch_is_said_once_with_its_reason() -> None:
    with pytest.warns(UserWarning, match="reads every candidate from scratch, which is slow: OpenAIGPTModel"):
        make_scorer(values_on(make("openai-gpt")))


@pytest.mark.parametrize("architecture", ["llama", "mamba", "mpt", "openai-gpt"])
def test_rows_that_are_copied_go_their_own_ways(architecture: str) -> None:
    model = values_on(make(architecture))
    scorer = PlainScorer(model) if KINDS[architecture] == "plain" else make_scorer(model)
    scorer.begin(1)
    candidates = torch.tensor([[7, 8]])
    scorer.read(torch.tensor([[5, 6]]), [2], candidates)
    scorer.select(torch.tensor([0, 0]))
    scorer.commit(torch.tensor([0, 1]))
    found = scorer.read(torch.zeros(2, 0, dtype=torch.long), [0, 0], torch.tensor([[9, 10], [9, 10]]))
    for row, token in enumerate((7, 8)):
        expected = recompute_values(model, [5, 6, token], torch.tensor([9, 10]))
        torch.testing.assert_close(found[row], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) | set(RARE)))
def test_a_cut_copy_is_the_first_layers(architecture: str) -> None:
    base = make(architecture)
    one = Backbone.of(base).truncated(1)
    assert len(Backbone.of(one).layers) == 1
    inner, own = Backbone.of(base).layers[0].state_dict(), Backbone.of(one).layers[0].state_dict()
    assert inner.keys() == own.keys()
    assert all(torch.equal(inner[name], own[name]) for name in inner)
    whole = Backbone.of(base).truncated()
    ids = torch.randint(3, 90, (1, 6))
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).last_hidden_state, Backbone.of(base).decoder(ids).last_hidden_state)
    with pytest.raises(ValueError, match="num_layers must be 1 to 2"):
        Backbone.of(base).truncated(3)


def test_a_value_model_of_any_family_is_saved_and_loaded(tmp_path: Any) -> None:
    for architecture in ("bart", "opt", "llava", "qwen3_next", "bert"):
        model = values_on(make(architecture))
        model.save_pretrained(tmp_path / architecture)
        again = ValueModel.from_pretrained(tmp_path / architecture)
        ids = torch.randint(3, 90, (2, 6))
        with torch.no_grad():
            torch.testing.assert_close(again(ids).values, model(ids).values)


def test_the_doctor_says_what_was_found() -> None:
    text = "\n".join(report(Backbone.of(make("gpt_neo"))))
    assert "value model       repeated" in text
    assert "a law broken on purpose" in text
    assert "in the way of generate itself" in text
    assert "packed training   no" in text
    assert "over a ragged cache" in "\n".join(report(Backbone.of(make_base("llama"))))


def test_heads_read_every_family(prompts: dict[str, torch.Tensor]) -> None:
    for architecture in ("mpt", "mamba", "llava", "bart"):
        base = make(architecture)
        head = ValueHead.for_model(base, ["a"], width=16, layer=1)
        assert head.config.hidden_size == 32
        found = base.generate(**prompts, max_new_tokens=3, custom_generate=MavisSampling(head, model=base))
        assert np.prod(found.shape) > 0
