"""Hidden states caught behind the base model's scores: the right position, once, and none that are not the base's."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    PreTrainedModel,
)

from mavis_logits import MavisLogitsProcessor
from mavis_logits.backbone import Backbone
from mavis_logits.backbone.hidden import HiddenStates
from tiny import PAD, make_base, make_head

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@torch.no_grad()
def run(base: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Any:
    return base(input_ids=ids, **kwargs)


def expected(base: PreTrainedModel, ids: Tensor) -> Tensor:
    """The state [R, T, d] of every position, read from the trunk."""
    with torch.no_grad():
        return base.base_model(ids).last_hidden_state


def upto(length: int) -> Tensor:
    """The first tokens of every sequence; more than there are, with others behind."""
    return torch.cat([IDS, torch.full((len(IDS), 8), 13)], dim=1)[:, :length]


def assert_state(states: dict[int | None, Tensor] | None, wanted: Tensor, layer: int | None = None) -> None:
    assert states is not None
    torch.testing.assert_close(states[layer], wanted, atol=1e-5, rtol=1e-5)


def test_layers_of_a_model_that_sees_are_those_of_its_decoder() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**sizes, vocab_size=20))
    )
    assert [type(layer).__name__ for layer in Backbone.of(model).layers] == ["LlamaDecoderLayer"] * 2


def test_the_state_of_the_last_position_is_handed_out_once() -> None:
    base = make_base()
    hidden = HiddenStates(base)
    assert hidden.take(upto(4)) is None  # nothing was read yet
    run(base, IDS, logits_to_keep=1)
    assert_state(hidden.take(upto(4)), expected(base, IDS)[:, -1])
    assert hidden.take(upto(4)) is None


def test_a_step_with_a_cache_follows_the_prompt() -> None:
    base = make_base()
    hidden = HiddenStates(base)
    cache = DynamicCache(config=base.config)
    run(base, IDS[:, :3], past_key_values=cache, logits_to_keep=1)
    assert_state(hidden.take(upto(3)), expected(base, IDS)[:, 2])
    run(base, IDS[:, 3:], past_key_values=cache)
    assert_state(hidden.take(upto(4)), expected(base, IDS)[:, 3])


def test_positions_of_one_forward_are_told_apart_by_length() -> None:
    """As in assisted decoding: three drafted tokens are read at once, and the processor is called for each position."""
    base = make_base()
    hidden = HiddenStates(base)
    cache = DynamicCache(config=base.config)
    run(base, IDS[:, :1], past_key_values=cache)
    run(base, IDS[:, 1:], past_key_values=cache)
    states = expected(base, IDS)
    for length in (2, 3, 4):
        assert_state(hidden.take(upto(length)), states[:, length - 1])
    assert hidden.take(upto(5)) is None


def test_lengths_that_the_forward_has_not_read_get_nothing() -> None:
    base = make_base()
    hidden = HiddenStates(base)
    run(base, IDS)
    assert hidden.take(upto(9)) is None
    assert_state(hidden.take(upto(3)), expected(base, IDS)[:, 2])
    assert hidden.take(upto(2)) is None  # an earlier position than one handed out already


def test_another_models_forward_leaves_no_state() -> None:
    base, assistant = make_base(), make_base(seed=1)
    hidden = HiddenStates(base)
    run(assistant, IDS)
    assert hidden.take(upto(4)) is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_states_of_inner_layers_come_with_those_of_the_output(architecture: str) -> None:
    base = make_base(architecture)
    with torch.no_grad():
        wanted = base.base_model(IDS, output_hidden_states=True).hidden_states
    hidden = HiddenStates(base, [1, None, 1])
    run(base, IDS, logits_to_keep=1)
    assert_state(hidden.take(upto(4)), wanted[1][:, -1], layer=1)
    run(base, IDS, logits_to_keep=3)
    for length in (2, 3, 4):
        taken = hidden.take(upto(length))
        assert_state(taken, wanted[1][:, length - 1], layer=1)
        assert_state(taken, wanted[-1][:, length - 1])
    hidden.remove()
    run(base, IDS)
    assert hidden.take(upto(4)) is None


def test_threads_do_not_see_each_others_states() -> None:
    base = make_base()
    hidden = HiddenStates(base)
    run(base, IDS)
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(hidden.take(upto(4))))
    thread.start()
    thread.join()
    assert seen == [None]
    assert hidden.take(upto(4)) is not None


def test_removed_hooks_leave_nothing_behind() -> None:
    base = make_base()
    hidden = HiddenStates(base, [None, 1])
    hidden.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())
    run(base, IDS)
    assert hidden.take(upto(4)) is None


def test_a_model_without_output_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no output embedding; steering needs a causal language model"):
        HiddenStates(make_base().model)


@pytest.mark.parametrize("layer", [None, 1])
def test_a_model_compiled_before_is_steered_all_the_same(layer: int | None) -> None:
    base = make_base()
    compiled = CompileConfig(backend="eager", fullgraph=True)
    compiled._compile_all_devices = True  # else generate compiles on GPUs only
    settings = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD}
    static = settings | {"cache_implementation": "static", "compile_config": compiled}
    base.generate(IDS, **static)
    with MavisLogitsProcessor(make_head(base, "a", layer=layer), model=base, top_k=4, pad_token_id=PAD) as mavis:
        steered = base.generate(IDS, logits_processor=[mavis], **static)
        assert mavis.stats.passed_through == 0
        assert torch.equal(steered, base.generate(IDS, logits_processor=[mavis], **settings))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [None, [[20, 21, 22, 23], [24, 25, 26, 27]], [[20, 21, 22, 23, 28, 29, 30]] * 2])
@pytest.mark.parametrize("layer", [None, 1])
def test_states_under_guidance_are_those_of_the_prompt(layer: int | None, negative: Any, use_cache: bool) -> None:
    """Classifier-free guidance runs the model on other sequences between its pass over the prompt and the processor."""
    base = make_base()
    hidden = HiddenStates(base, [layer])
    seen = []

    class Take(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append((input_ids, hidden.take(input_ids)))
            return scores

    base.generate(
        IDS, attention_mask=torch.ones_like(IDS), pad_token_id=PAD, do_sample=False, max_new_tokens=5,
        guidance_scale=1.5, negative_prompt_ids=None if negative is None else torch.tensor(negative),
        use_cache=use_cache, logits_processor=[Take()],
    )  # fmt: skip
    hidden.remove()
    assert len(seen) == 5
    for input_ids, states in seen:
        with torch.no_grad():
            wanted = base.base_model(input_ids, output_hidden_states=True).hidden_states
        assert_state(states, wanted[-1 if layer is None else layer][:, -1], layer=layer)


def test_a_pass_left_over_from_plain_decoding_is_not_taken_for_the_next() -> None:
    base = make_base()
    hidden = HiddenStates(base)
    kept = base.generate(IDS, max_new_tokens=1, pad_token_id=PAD, return_dict_in_generate=True)  # its cache lives on
    other = IDS.flip(1)
    run(base, other)
    assert_state(hidden.take(other), expected(base, other)[:, -1])
    assert kept.sequences.shape == (2, 5)
