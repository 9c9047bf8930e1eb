"""T5 and BART: steered by heads, words and policies, as slow twins say that read everything from scratch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

from mavis_logits import MavisBeamSearch, MavisBestOfN, MavisLogitsProcessor, MavisSampling, ValuePolicy
from mavis_logits.backbone import Backbone
from mavis_logits.testing import algorithm_2
from mavis_logits.values.value_policy import ValuePolicyConfig
from mavis_logits.values.words import Words
from processor_checks import Recorder
from tiny import make_head
from tiny_models import WORDS, tiny_tokenizer

K, BETA, PAD, EOS = 6, 3.0, 0, 1
INSTRUCTION = "w5 w6 w7"
SOURCES = [[5, 6, 7, 8, EOS], [9, 10, EOS]]
IDS = {"vocab_size": len(WORDS), "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "t5":
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        base: Any = T5ForConditionalGeneration(T5Config(**IDS, **shape))
    else:
        sides = {f"{side}_{name}": size for side in ("encoder", "decoder")
                 for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
        base = BartForConditionalGeneration(
            BartConfig(**IDS | {"decoder_start_token_id": 2}, d_model=32, max_position_embeddings=24, **sides)
        )
        base.generation_config.forced_eos_token_id = None
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return base.eval()


def call(sources: list[list[int]] = SOURCES, **more: Any) -> dict[str, Any]:
    width = max(map(len, sources))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in sources])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "max_new_tokens": 4, "do_sample": False, **more}


@torch.no_grad()
def log_probs(model: Any, source: list[int], answer: Tensor) -> Tensor:
    logits = model(input_ids=torch.tensor([source]), decoder_input_ids=answer[None], use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1)


class Slow(LogitsProcessor):
    """Algorithm 2 with everything read from scratch; each row belongs to the prompt of its share of the batch."""

    def __init__(self, base: Any, values: Any, sources: list[list[int]] = SOURCES) -> None:
        self.base, self.values, self.sources = base, values, sources

    @torch.no_grad()
    def _values(self, source: list[int], answer: Tensor) -> Tensor:
        """[V] of the one objective."""
        if isinstance(self.values, ValuePolicy):
            return log_probs(self.values.backbone, source, answer) - log_probs(self.base, source, answer)
        if isinstance(self.values, Words):
            inserted = tiny_tokenizer()(INSTRUCTION)["input_ids"]
            return log_probs(self.base, inserted + source, answer) - log_probs(self.base, source, answer)
        caught: list[Tensor] = []
        hook = Backbone.of(self.base).catch(self.values.config.layer, caught.append)
        log_probs(self.base, source, answer)
        hook.remove()
        states = caught[0][:, -1] if caught[0].ndim == 3 else caught[0]
        return self.values(states, torch.arange(len(WORDS))[None])[0, :, 0].double()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found = torch.full_like(scores, -torch.inf)
        for row, answer in enumerate(input_ids):
            source = self.sources[row * len(self.sources) // len(input_ids)]
            values = self._values(source, answer)
            log_ref = torch.log_softmax(scores[row].double(), dim=-1)
            policy = algorithm_2(log_ref, lambda token, values=values: float(values[token]), K, BETA)
            found[row] = policy.log().to(scores.dtype)
        return found


def value_function(which: str, base: Any) -> Any:
    if which == "words":
        words = Words({"joke": INSTRUCTION}, tiny_tokenizer(), base)
        words.config.settings.clear()
        return words
    if which == "policy":
        config = LoraConfig(
            r=4, target_modules=["q", "v"] if isinstance(base, T5ForConditionalGeneration) else ["q_proj"]
        )
        tuned = get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        return ValuePolicy(ValuePolicyConfig.of(base, "joke", settings={}), tuned.get_base_model())
    return make_head(base, "a", layer=1 if which == "inner head" else None)


FUNCTIONS = ["head", "inner head", "words", "policy"]


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("which", FUNCTIONS)
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 0}],
                         ids=["greedy", "beams", "samples"])  # fmt: skip
def test_the_processor_is_algorithm_2(kind: str, which: str, more: dict[str, Any]) -> None:
    base = make(kind)
    values = value_function(which, base)
    mavis = MavisLogitsProcessor(values, beta=BETA, top_k=K, model=base)
    for sources in (SOURCES, SOURCES[::-1]):  # caches of the first call must not be taken for those of the second
        recorder, slow, compared = Recorder(mavis), Slow(base, values, sources), 0
        base.generate(**call(sources, **more), logits_processor=[recorder])
        for input_ids, scores, out in recorder.calls:
            expected = slow(input_ids, scores).exp()
            steered = [row for row in range(len(out)) if not torch.equal(out[row], scores[row])]  # not yet closed
            torch.testing.assert_close(out[steered].exp(), expected[steered], atol=1e-4, rtol=1e-3)
            compared += len(steered)
        assert compared >= 4
    assert mavis.stats.passed_through == 0


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("which", FUNCTIONS)
def test_sampling_is_algorithm_2(kind: str, which: str) -> None:
    base = make(kind)
    values = value_function(which, base)
    expected = base.generate(**call(), logits_processor=[Slow(base, values)])
    strategy = MavisSampling(values, beta=BETA, top_k=K, model=base)
    assert torch.equal(base.generate(**call(), custom_generate=strategy), expected)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_searches_read_the_prompt_of_each_row(kind: str) -> None:
    """One sample of each prompt is what MavisSampling writes."""
    base = make(kind)
    words = value_function("words", base)
    settings: dict[str, Any] = {"beta": BETA, "top_k": K, "model": base}
    expected = base.generate(**call(), custom_generate=MavisSampling(words, **settings))
    assert torch.equal(
        base.generate(**call(), custom_generate=MavisBestOfN(words, num_samples=1, **settings)), expected
    )
    for several in (MavisBestOfN(words, num_samples=3, **settings), MavisBeamSearch(words, num_beams=3, **settings)):
        rows = base.generate(**call(do_sample=True), custom_generate=several)
        swapped = base.generate(**call(SOURCES[::-1], do_sample=True), custom_generate=several)
        assert len(rows) == len(swapped) == len(SOURCES)


def test_an_answer_that_has_been_begun_is_gone_on_with() -> None:
    base = make("t5")
    words = value_function("words", base)
    begun = torch.tensor([[PAD, 11, 12], [PAD, 13, 14]])
    mavis = MavisLogitsProcessor(words, beta=BETA, top_k=K, model=base)
    found = base.generate(**call(decoder_input_ids=begun), logits_processor=[mavis])
    expected = base.generate(**call(decoder_input_ids=begun), logits_processor=[Slow(base, words)])
    assert torch.equal(found, expected)


def test_without_a_mask_padding_is_text_to_an_encoder() -> None:
    base = make("bart")
    words = value_function("words", base)
    mavis = MavisLogitsProcessor(words, beta=BETA, top_k=K, model=base)
    without = call()
    del without["attention_mask"]
    found = base.generate(**without, logits_processor=[mavis])
    slow = Slow(base, words, without["input_ids"].tolist())
    assert torch.equal(found, base.generate(**without, logits_processor=[slow]))


def test_words_need_to_know_what_the_encoder_has_read() -> None:
    base = make("bart")
    mavis = MavisLogitsProcessor(value_function("words", base), beta=BETA, top_k=K, model=base)
    encoded = base.get_encoder()(torch.tensor([SOURCES[0]]))
    with pytest.raises(ValueError, match=r"BartForConditionalGeneration reads prompts with an encoder.*input_ids"):
        base.generate(encoder_outputs=encoded, max_new_tokens=3, logits_processor=[mavis])
    with pytest.raises(ValueError, match=r"a prompt has 25 tokens, more than the 24"):
        base.generate(torch.full((1, 22), 5), max_new_tokens=3, logits_processor=[mavis])
