"""Libraries that are handed a pipeline: they switch on its task, stream from threads, save, copy and hash it."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from chat_model import chat_model
from mavis_logits import MavisLogitsProcessor, ValueHead, ValueModel
from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.plugs.pipeline import TASK, MavisTextGenerationPipeline

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
PROMPTS = ["w5 w6 w7", "w8"]


@pytest.fixture
def chat() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return chat_model()


@pytest.fixture
def value_model(chat: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> ValueModel:
    torch.manual_seed(0)
    model = ValueModel.from_backbone(chat[0], ["a"], tokenizer_fingerprint=tokenizer_fingerprint(chat[1]))
    with torch.no_grad():
        model.head.weight.normal_()
    return model


@pytest.fixture
def pipe(chat: Any, value_model: ValueModel) -> MavisTextGenerationPipeline:
    return pipeline(TASK, model=chat[0], tokenizer=chat[1], value_models=value_model, beta=20.0)


def steered(pipe: MavisTextGenerationPipeline, **kwargs: Any) -> list[str]:
    found = [pipe(prompt, **(GREEDY | kwargs))[0]["generated_text"] for prompt in PROMPTS]
    assert found != [pipe(prompt, beta=0.0, **(GREEDY | kwargs))[0]["generated_text"] for prompt in PROMPTS]
    return found


def test_its_task_is_that_of_its_inputs_and_outputs(chat: Any, value_model: ValueModel, pipe: Any) -> None:
    """However it was made, and with `task_specific_params` and the like looked up as for any text generation."""
    given = {"model": chat[0], "tokenizer": chat[1], "value_models": value_model, "beta": 20.0}
    by_class = pipeline("text-generation", pipeline_class=MavisTextGenerationPipeline, **given)
    by_hand = MavisTextGenerationPipeline(**given)
    ordinary = pipeline("text-generation", model=chat[0], tokenizer=chat[1])
    assert {one.task for one in (pipe, by_class, by_hand)} == {ordinary.task}
    assert steered(pipe) == steered(by_class) == steered(by_hand)


def langchain_answers(pipe: Any, prompts: list[str], **kwargs: Any) -> list[str]:
    """What `langchain_huggingface.HuggingFacePipeline._generate` does."""
    answers = []
    for response in pipe(prompts, **kwargs):
        if pipe.task not in ("text-generation", "text2text-generation", "image-text-to-text"):
            raise ValueError(f"Got invalid task {pipe.task}")
        answers.append((response[0] if isinstance(response, list) else response)["generated_text"])
    return answers


def langchain_stream(pipe: Any, prompt: str, stop: list[str], **kwargs: Any) -> Iterator[str]:
    """What `langchain_huggingface.HuggingFacePipeline._stream` does."""
    ids = pipe.tokenizer.convert_tokens_to_ids(stop)

    class StopOnTokens(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> bool:
            return any(input_ids[0][-1] == stop_id for stop_id in ids)

    streamer = TextIteratorStreamer(pipe.tokenizer, timeout=10.0, skip_prompt=True, skip_special_tokens=True)
    criteria = StoppingCriteriaList([StopOnTokens()])
    given = {"text_inputs": prompt, "streamer": streamer, "stopping_criteria": criteria, **kwargs}
    thread = threading.Thread(target=pipe, kwargs=given)
    thread.start()
    yield from streamer
    thread.join()


def test_a_client_like_langchain_gets_steered_text(pipe: Any) -> None:
    assert langchain_answers(pipe, PROMPTS, **GREEDY) == steered(pipe)


def test_a_client_like_langchain_streams_and_stops(pipe: Any) -> None:
    words = steered(pipe, return_full_text=False)[0].split()
    assert "".join(langchain_stream(pipe, PROMPTS[0], [], **GREEDY)).split() == words
    stopped = "".join(langchain_stream(pipe, PROMPTS[0], [words[1]], **GREEDY)).split()
    assert stopped == words[: words.index(words[1]) + 1] != words


def test_langchain(pipe: Any) -> None:
    langchain = pytest.importorskip("langchain_huggingface")
    llm = langchain.HuggingFacePipeline(pipeline=pipe)
    bound = llm.bind(pipeline_kwargs=GREEDY)
    assert bound.batch(PROMPTS) == [bound.invoke(prompt) for prompt in PROMPTS] == steered(pipe)
    assert "".join(bound.stream(PROMPTS[0])).split() == steered(pipe, return_full_text=False)[0].split()


def test_a_client_like_haystack_makes_the_pipeline_itself(chat: Any, value_model: ValueModel) -> None:
    """What `haystack_integrations...TransformersChatGenerator` does: it takes the arguments of `pipeline`."""
    given = {"task": "text-generation", "model": chat[0], "tokenizer": chat[1]}
    ours = {"pipeline_class": MavisTextGenerationPipeline, "value_models": value_model, "beta": 20.0}
    made = pipeline(**given, **ours)
    prompt = made.tokenizer.apply_chat_template(
        [{"role": "user", "content": "w5"}], tokenize=False, chat_template=None, add_generation_prompt=True, tools=None
    )
    options = {"return_full_text": False, "stopping_criteria": StoppingCriteriaList(), "pad_token_id": 0, **GREEDY}
    replies = [output.get("generated_text", "") for output in made(prompt, **options)]
    expected = made([{"role": "user", "content": "w5"}], **GREEDY)[0]["generated_text"][-1]["content"]
    assert replies == [expected] != [made(prompt, beta=0.0, **options)[0]["generated_text"]]


def test_haystack(chat: Any, value_model: ValueModel) -> None:
    generators = pytest.importorskip("haystack_integrations.components.generators.transformers")
    ours = {"pipeline_class": MavisTextGenerationPipeline, "value_models": value_model, "beta": 20.0}
    given = {"model": chat[0], "tokenizer": chat[1], **ours}
    options = {**GREEDY, "pad_token_id": 0}
    generator = generators.TransformersChatGenerator(
        task="text-generation", huggingface_pipeline_kwargs=dict(given), generation_kwargs=options
    )
    (reply,) = generator.run("w5")["replies"]
    made = pipeline("text-generation", **given)
    assert reply.text == made([{"role": "user", "content": "w5"}], **GREEDY)[0]["generated_text"][-1]["content"]


def test_saving_it_saves_model_and_tokenizer_and_leaves_the_model_as_it_was(
    chat: Any, value_model: ValueModel, pipe: Any, tmp_path: Path
) -> None:
    """Its code is this package's, its value functions have a home of their own: none of it goes along."""
    pipe.save_pretrained(tmp_path)
    assert not hasattr(chat[0].config, "custom_pipelines")
    assert not list(tmp_path.glob("*.py"))
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    again = pipeline(TASK, model=str(tmp_path), value_models=value_model, beta=20.0)
    assert steered(again) == steered(pipe)
    ordinary = pipeline("text-generation", model=str(tmp_path))
    assert ordinary(PROMPTS[0], **GREEDY) == pipe(PROMPTS[0], beta=0.0, **GREEDY)


@pytest.fixture(params=["model", "head"])
def either(request: Any, chat: Any, value_model: ValueModel) -> MavisTextGenerationPipeline:
    """A pipeline steered by a value model, and one by a head, which watches the language model."""
    head = ValueHead.for_model(chat[0], ["a"], width=8)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    values = value_model if request.param == "model" else head
    return pipeline(TASK, model=chat[0], tokenizer=chat[1], value_models=values, beta=20.0)


def sent(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("again", [copy.deepcopy, sent])
def test_a_copy_steers_alike_and_by_itself(either: Any, again: Any) -> None:
    wanted = steered(either)
    other = again(either)
    other.strategy.beta = 0.0
    assert steered(either) == wanted
    assert other(PROMPTS[0], beta=20.0, **GREEDY)[0]["generated_text"] == wanted[0]


def test_data_sets_are_mapped_by_it_and_the_function_has_a_hash(either: Any, caplog: Any) -> None:
    def complete(row: dict[str, str]) -> dict[str, str]:
        return {"text": either(row["prompt"], **GREEDY)[0]["generated_text"]}

    rows = Dataset.from_dict({"prompt": PROMPTS})
    assert Hasher.hash(complete) == Hasher.hash(complete)
    with caplog.at_level(logging.WARNING, logger="datasets"):
        assert rows.map(complete)["text"][:] == steered(either)
    assert "couldn't be hashed" not in caplog.text


def test_an_evaluation_harness_copies_its_arguments_for_every_request(chat: Any, value_model: ValueModel) -> None:
    """What `lm_eval.models.huggingface.HFLM` does: a deep copy of the arguments, then `model.generate` by name."""
    mavis = MavisLogitsProcessor(value_model, beta=20.0, model=chat[0])
    shared = {"logits_processor": [mavis], "do_sample": False, "until": ["w49"]}
    batch = chat[1](PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    wanted = chat[0].generate(**inputs, do_sample=False, max_new_tokens=6, logits_processor=[mavis])
    for _ in range(2):
        given = copy.deepcopy(shared)
        del given["until"]
        given |= {"stopping_criteria": StoppingCriteriaList(), "pad_token_id": chat[1].pad_token_id, "use_cache": True}
        found = chat[0].generate(**inputs, max_length=inputs["input_ids"].shape[1] + 6, **given)
        assert found.tolist() == wanted.tolist()
    assert chat[0].generate(**inputs, do_sample=False, max_new_tokens=6).tolist() != wanted.tolist()
