"""`pipeline("mavis-text-generation")`, and steering in an ordinary pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from chat_model import chat_model
from mavis_logits import MavisLogitsProcessor, ValueHead, ValueModel
from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.decoding.strategies import MavisSampling
from mavis_logits.plugs.pipeline import TASK, MavisTextGenerationPipeline

PROMPT = "w5 w6 w7"
CHAT = [{"role": "user", "content": "w8 w9"}]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "return_full_text": False}


@pytest.fixture
def chat() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return chat_model()


@pytest.fixture
def functions(chat: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> dict[str, ValueModel]:
    """Value models that want opposite things, each strongly."""
    found = {}
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        found[name] = ValueModel.from_backbone(chat[0], [name], tokenizer_fingerprint=tokenizer_fingerprint(chat[1]))
        with torch.no_grad():
            found[name].head.weight.normal_()
    return found


@pytest.fixture
def pipe(chat: Any, functions: Any) -> MavisTextGenerationPipeline:
    model, tokenizer = chat
    return pipeline(TASK, model=model, tokenizer=tokenizer, value_models=functions, weights={"a": 1.0}, beta=20.0)


def texts(output: Any) -> list[str]:
    """The texts of what a pipeline returned for a list of inputs."""
    return [one[0]["generated_text"] for one in output]


def test_the_task_is_steered_as_generate_is(chat: Any, functions: Any, pipe: MavisTextGenerationPipeline) -> None:
    model, tokenizer = chat
    inputs = tokenizer(PROMPT, return_tensors="pt")
    for weights in ({"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": -0.5}):
        mavis = MavisLogitsProcessor(functions, weights, 20.0, model=model)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, logits_processor=[mavis])
        expected = tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
        assert pipe(PROMPT, weights=weights, **GREEDY)[0]["generated_text"] == expected
    assert len({pipe(PROMPT, weights={o: 1.0}, **GREEDY)[0]["generated_text"] for o in "ab"}) == 2


def test_without_weights_in_the_call_those_of_the_pipeline_hold(pipe: MavisTextGenerationPipeline) -> None:
    first = pipe(PROMPT, **GREEDY)
    pipe(PROMPT, weights={"b": 1.0}, beta=0.0, **GREEDY)
    assert pipe(PROMPT, **GREEDY) == first == pipe(PROMPT, weights=[1.0, 0.0], beta=20.0, **GREEDY)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_input_may_have_weights_and_a_beta_of_its_own(pipe: MavisTextGenerationPipeline, batch_size: int) -> None:
    prompts = [PROMPT, "w5", "w20 w21", PROMPT]
    weights = [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {"b": 1.0}]
    betas = [20.0, 5.0, 1.0, 0.0]
    one_by_one = [
        pipe(prompt, weights=w, beta=b, **GREEDY) for prompt, w, b in zip(prompts, weights, betas, strict=True)
    ]
    assert pipe(prompts, weights=weights, beta=betas, batch_size=batch_size, **GREEDY) == one_by_one
    rows = torch.tensor([[w.get("a", 0.0), w.get("b", 0.0)] for w in weights])
    assert pipe(prompts, weights=rows, beta=betas, batch_size=batch_size, **GREEDY) == one_by_one
    only_weights = [pipe(prompt, weights=w, **GREEDY) for prompt, w in zip(prompts, weights, strict=True)]
    assert pipe(prompts, weights=weights, batch_size=batch_size, **GREEDY) == only_weights
    assert len(set(texts(only_weights))) > 1


def test_chats_are_answered(pipe: MavisTextGenerationPipeline) -> None:
    other = [{"role": "user", "content": "w30"}]
    answer = pipe(CHAT, weights={"b": 1.0}, do_sample=False, max_new_tokens=4)[0]["generated_text"]
    assert [message["role"] for message in answer] == ["user", "assistant"]
    both = pipe([CHAT, other], weights=[{"b": 1.0}, {"a": 1.0}], do_sample=False, max_new_tokens=4, batch_size=2)
    assert both[0][0]["generated_text"] == answer
    assert both[1] == pipe(other, weights={"a": 1.0}, do_sample=False, max_new_tokens=4)


def test_several_samples_of_one_input(pipe: MavisTextGenerationPipeline) -> None:
    torch.manual_seed(0)
    found = pipe([PROMPT, "w5"], weights=[{"a": 1.0}, {"b": 1.0}], num_return_sequences=3, max_new_tokens=3)
    assert [len(samples) for samples in found] == [3, 3]


def test_a_streamer_gets_the_text(chat: Any, pipe: MavisTextGenerationPipeline) -> None:
    streamer = TextIteratorStreamer(chat[1], skip_prompt=True, skip_special_tokens=True, timeout=5)
    output = pipe(PROMPT, streamer=streamer, **GREEDY)[0]["generated_text"]
    assert "".join(streamer).strip() == output.strip()


def test_stop_sequences_stop(chat: Any, pipe: MavisTextGenerationPipeline) -> None:
    chat[1].add_tokens(["abcdef"])  # transformers puts this word before every token to see what it decodes to
    words = pipe(PROMPT, **GREEDY)[0]["generated_text"].split()
    stopped = pipe(PROMPT, stop_sequence=words[1], **GREEDY)[0]["generated_text"]
    assert stopped.split() == words[: words.index(words[1]) + 1]


def test_temperature_is_applied_to_the_reference_once(chat: Any, functions: Any) -> None:
    """log pi(x) = log pi_T(x) + beta v(x) + const: the pipeline's 0.7 sharpens the reference and leaves beta alone."""
    model, tokenizer = chat
    strategy = MavisSampling(functions, {"a": 1.0}, 3.0, model=model, tokenizer=tokenizer, trace=True, top_k=50)
    pipe = pipeline(TASK, model=model, tokenizer=tokenizer, strategy=strategy)
    with torch.no_grad():
        logits = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]
    for temperature in (None, 1.0, 0.5):
        given = {} if temperature is None else {"temperature": temperature}
        pipe(PROMPT, max_new_tokens=1, **given)
        assert pipe.strategy.trace is not None
        step = pipe.strategy.trace.steps[0]
        reference = torch.log_softmax(logits / (temperature or 0.7), dim=-1)
        torch.testing.assert_close(step.reference[0], reference[step.candidates[0]])
        values = step.values[0, :, 0]
        expected = step.reference[0] + 3.0 * (values - values.min()) / (values.max() - values.min())
        torch.testing.assert_close(step.tilted[0], torch.log_softmax(expected, dim=-1))


def test_in_an_ordinary_pipeline_temperature_comes_after_the_tilt(chat: Any, functions: Any) -> None:
    """What the documents say of `logits_processor=[mavis]`: at temperature T, beta acts as beta / T."""
    model, tokenizer = chat
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    seen: list[torch.Tensor] = []

    class Watch:
        """Stands after all other processors' results and keeps what `generate` would sample from."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(torch.log_softmax(scores / 0.7, dim=-1))
            return scores

    mavis = MavisLogitsProcessor(functions, {"a": 1.0}, 3.0, model=model, top_k=50)
    torch.manual_seed(0)
    pipe(PROMPT, max_new_tokens=1, logits_processor=[mavis, Watch()])
    twin = MavisLogitsProcessor(functions, {"a": 1.0}, 3.0 / 0.7, model=model, top_k=50, reference_temperature=0.7)
    with torch.no_grad():
        ids = tokenizer(PROMPT, return_tensors="pt")
        expected = twin(ids["input_ids"], model(**ids).logits[:, -1])
    torch.testing.assert_close(seen[0], torch.log_softmax(expected, dim=-1))


@pytest.mark.parametrize("how", ["processor", "strategy"])
def test_an_ordinary_pipeline_is_steered(chat: Any, functions: Any, how: str) -> None:
    model, tokenizer = chat
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    plain = pipe([PROMPT, "w5"], **GREEDY)
    results = []
    for objective in ("a", "b"):
        if how == "processor":
            mavis = MavisLogitsProcessor(functions, {objective: 1.0}, 20.0, model=model)
            results.append(pipe([PROMPT, "w5"], logits_processor=[mavis], batch_size=2, **GREEDY))
        else:
            strategy = MavisSampling(functions, {objective: 1.0}, 20.0, model=model)
            results.append(pipe([PROMPT, "w5"], custom_generate=strategy, batch_size=2, **GREEDY))
    assert len({str(result) for result in (plain, *results)}) == 3


def test_value_heads_and_folders(chat: Any, tmp_path: Path) -> None:
    model, tokenizer = chat
    ValueHead.for_model(model, ["c", "d"], width=8).save_pretrained(tmp_path / "head")
    pipe = pipeline(TASK, model=model, tokenizer=tokenizer, value_models=tmp_path / "head", settings={"top_k": 5})
    assert pipe.strategy.objectives == ["c", "d"]
    assert pipe.strategy.config.top_k == 5
    assert pipe(PROMPT, weights={"d": 1.0}, **GREEDY)[0]["generated_text"]


def test_inputs_may_come_one_by_one(pipe: MavisTextGenerationPipeline) -> None:
    prompts = [PROMPT, "w5"]
    lazily = pipe((prompt for prompt in prompts), weights={"b": 1.0}, **GREEDY)
    assert list(lazily) == pipe(prompts, weights={"b": 1.0}, **GREEDY)


# ---- bad input ----


def test_bad_input(chat: Any, functions: Any, pipe: MavisTextGenerationPipeline) -> None:
    model, tokenizer = chat
    with pytest.raises(ValueError, match=r"steers by value_models= .* or by strategy= .*: give one of the two"):
        pipeline(TASK, model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="give one of the two"):
        pipeline(TASK, model=model, tokenizer=tokenizer, value_models=functions, strategy=MavisSampling(functions))
    with pytest.raises(ValueError, match=r"weights name the objective 'aa' \(did you mean 'a'\?\)"):
        pipe(PROMPT, weights={"aa": 1.0}, **GREEDY)
    with pytest.raises(ValueError, match="weights name the objective 'z'"):
        pipe([PROMPT, PROMPT], weights=[{"a": 1.0}, {"z": 1.0}], **GREEDY)
    with pytest.raises(ValueError, match="weights are given for 1 inputs, but there are 2"):
        pipe([PROMPT, PROMPT], weights=[{"a": 1.0}], **GREEDY)
    with pytest.raises(ValueError, match="weights for each input need a list of inputs, got str"):
        pipe(PROMPT, weights=[{"a": 1.0}], **GREEDY)
    with pytest.raises(ValueError, match="weights must be numbers, by objective or in the order"):
        pipe(PROMPT, weights="a", **GREEDY)
    with pytest.raises(ValueError, match="beta must be a finite number of at least 0"):
        pipe(PROMPT, beta=-1.0, **GREEDY)
    with pytest.raises(ValueError, match=r"num_beams=2 \(asks for generate's own beam search"):
        pipe(PROMPT, num_beams=2, **GREEDY)
