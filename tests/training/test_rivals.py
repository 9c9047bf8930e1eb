"""Rivals of value functions as settings of an evaluation, each against a slow twin that starts from scratch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LogitsProcessor, LogitsProcessorList

from chat_model import chat_model, save_random_adapter
from mavis_logits.backbone import Backbone
from mavis_logits.core.chat import encode_prompt
from mavis_logits.values.value_head import ValueHead
from mavis_training.measure.completions import Protocol, complete_all, completions_origin
from mavis_training.measure.settings import check_setting, steerings
from mavis_training.rewards.load import load_reward
from mavis_training.rivals.decoding import Decoding
from mavis_training.rivals.directions import load_direction, save_direction

ROWS = [{"id": str(i), "prompt": prompt} for i, prompt in enumerate(["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"])]
REWARD = """
def ones(prompts, completions, **columns):
    return [float(text.count("w1")) - 0.1 * len(prompt) for prompt, text in zip(prompts, completions, strict=True)]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two adapters, a direction and a reward for the chat model."""
    folder = tmp_path_factory.mktemp("rivals")
    for seed, name in enumerate(("a", "b")):
        save_random_adapter(folder / name, seed, rank=2 + seed)
    width = Backbone.of(chat_model()[0]).output_embedding.shape[1]
    save_direction(folder / "d", torch.linspace(-1, 1, width), 1, "tiny")
    (folder / "reward.py").write_text(REWARD)
    return folder


class Seen(LogitsProcessor):
    """Keeps every step's distribution."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids, scores):
        self.steps.append(torch.log_softmax(scores.float(), dim=-1))
        return scores


def log_probs(model, tokens: list[int]) -> torch.Tensor:
    """log pi [V] after some tokens, from scratch."""
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].float(), dim=-1)


def with_adapter(place: Path, name: str):
    return PeftModel.from_pretrained(chat_model()[0], place / name).eval()


def soup(place: Path, shares: dict[str, float]):
    """The base model with the adapters' products added to its weights, by hand."""
    model = chat_model()[0]
    with torch.no_grad():
        for name, share in shares.items():
            tuned = with_adapter(place, name).merge_and_unload()
            plain = dict(chat_model()[0].named_parameters())
            for key, parameter in model.named_parameters():
                parameter += share * (dict(tuned.named_parameters())[key] - plain[key])
    return model


def twin_of(place: Path, kind: str):
    """(setting, log pi [V] of a row and its tokens from scratch) of a kind of rival."""
    base, tokenizer = chat_model()
    a, b = str(place / "a"), str(place / "b")
    if kind == "plain":
        return {"temperature": 0.7}, lambda row, own, new: torch.log_softmax(log_probs(base, own + new) / 0.7, -1)
    if kind == "adapters":
        model = soup(place, {"a": 0.3, "b": 0.7})
        return {"adapters": {a: 0.3, b: 0.7}}, lambda row, own, new: log_probs(model, own + new)
    tuned = {name: with_adapter(place, name) for name in "ab"}
    if kind == "mixture":

        def mixed(row, own, new):
            return torch.log_softmax(sum(s * log_probs(tuned[n], own + new) for n, s in (("a", 0.4), ("b", 0.6))), -1)

        return {"mixture": {a: 0.4, b: 0.6}}, mixed
    if kind == "token_rewards":

        def added(row, own, new):
            plain = log_probs(base, own + new)
            more = sum(s * (log_probs(tuned[n], own + new) - plain) for n, s in (("a", 1.5), ("b", 0.5)))
            return torch.log_softmax(plain + more, -1)

        return {"token_rewards": {a: 1.5, b: 0.5}}, added
    if kind == "partial_rewards":
        spec = f"{place / 'reward.py'}:ones"
        reward = load_reward(spec, "cpu")

        def asked(row, own, new):
            plain = log_probs(base, own + new)
            best = plain.topk(5)
            found = torch.full_like(plain, -torch.inf)
            for score, token in zip(best.values, best.indices.tolist(), strict=True):
                text = tokenizer.decode([*new, token], skip_special_tokens=True)
                found[token] = score + 2.0 * reward([row["prompt"]], [text])[0]
            return torch.log_softmax(found, -1)

        return {"partial_rewards": {spec: 2.0}, "candidates": 5}, asked
    moved = chat_model()[0]
    vector, layer = load_direction(str(place / "d"))
    Backbone.of(moved).layers[layer - 1].register_forward_hook(
        lambda module, args, output: (
            output + 3 * vector if isinstance(output, torch.Tensor) else (output[0] + 3 * vector, *output[1:])
        )
    )
    return {"directions": {str(place / "d"): 3.0}}, lambda row, own, new: log_probs(moved, own + new)


KINDS = ["plain", "adapters", "mixture", "token_rewards", "partial_rewards", "directions"]


@pytest.mark.parametrize("system", [None, "w9 w8"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_step_is_what_it_is_from_scratch(place, kind, system) -> None:
    setting, twin = twin_of(place, kind)
    if system is not None:
        setting = setting | {"system": system}
    check_setting(setting)
    decoding, (model, tokenizer) = Decoding.of(setting), chat_model()
    own = [decoding.encode(row, tokenizer, "auto") for row in ROWS]
    batch = tokenizer.pad({"input_ids": own}, return_tensors="pt", padding_side="left")
    before = [parameter.clone() for parameter in model.parameters()]
    torch.manual_seed(0)
    with decoding.applied(model, tokenizer, batch, ROWS, lambda spec: load_reward(spec, "cpu"), (1.0, 1.0)) as made:
        output = model.generate(
            **batch, logits_processor=LogitsProcessorList([*made, seen := Seen()]), do_sample=True, max_new_tokens=7,
            top_k=0, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    start, compared = batch["input_ids"].shape[1], 0
    for row, item in enumerate(ROWS):
        for step, said in enumerate(seen.steps):
            new = output[row, start : start + step].tolist()
            if tokenizer.eos_token_id in new:
                break
            expected = twin(item, own[row], new)
            torch.testing.assert_close(said[row].exp(), expected.exp(), atol=2e-5, rtol=1e-3)
            compared += 1
    assert compared > len(ROWS)
    for parameter, old in zip(model.parameters(), before, strict=True):  # the base model is as it was
        torch.testing.assert_close(parameter, old)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_log_ratios_are_those_of_what_was_sampled(place, kind, monkeypatch) -> None:
    setting, twin = twin_of(place, kind)
    setting = setting | {"system": "w9 w8"}
    base, tokenizer = chat_model()
    rows, generated = ROWS[:2], []
    generate = type(base).generate

    def kept(self, *args, **kwargs):
        generated.append(generate(self, *args, **kwargs))
        return generated[-1]

    monkeypatch.setattr(type(base), "generate", kept)
    done = complete_all(base, tokenizer, rows, Protocol([0], 6, 2, 1.0), None, setting, lambda _: None)
    decoding = Decoding.of(setting)
    for row, item in enumerate(rows):
        own = decoding.encode(item, tokenizer, "auto")
        start = max(len(decoding.encode(one, tokenizer, "auto")) for one in rows)
        new = generated[0][row, start:].tolist()
        new = new[: done.lengths[row]]
        plain = encode_prompt(item["prompt"], tokenizer)
        expected = sum(
            float(twin(item, own, new[:i])[token] - log_probs(base, plain + new[:i])[token])
            for i, token in enumerate(new)
        )
        assert done.log_ratios[row] == pytest.approx(expected, abs=2e-3)


def test_a_policy_like_the_reference_spends_nothing(place) -> None:
    model, tokenizer = chat_model()
    settings = [
        {"temperature": 0.8},
        {"token_rewards": {str(place / "a"): 0.0}},
        {"directions": {str(place / "d"): 0.0}},
    ]
    for setting in settings:
        done = complete_all(model, tokenizer, ROWS, Protocol([0, 1], 6, 2, 0.8), None, setting, lambda _: None)
        assert done.log_ratios == pytest.approx([0.0] * 6, abs=1e-3)
        assert len(done.texts) == 6


def test_a_value_function_tilts_what_the_rival_leaves(place) -> None:
    model, tokenizer = chat_model()
    torch.manual_seed(0)
    head = ValueHead.for_model(model, ["a"], width=16)
    torch.nn.init.normal_(head.out.weight)
    settings = {
        "none": {"system": "w9 w8", "beta": 0.0, "top_k": None},
        "some": {"system": "w9 w8", "beta": 3.0, "top_k": None, "normalize": "none"},
        "prompt": {"system": "w9 w8"},
    }
    made = steerings(settings, {"a": head}, model, tokenizer, plain=False)
    assert made["prompt"] is None
    found = {
        name: complete_all(model, tokenizer, ROWS, Protocol([0, 1, 2], 8, 3, 0.7), made[name], setting, lambda _: None)
        for name, setting in settings.items()
    }
    assert found["none"].log_ratios == pytest.approx(found["prompt"].log_ratios, abs=1e-3)
    assert found["none"].texts == found["prompt"].texts
    assert sum(found["some"].log_ratios) > sum(found["none"].log_ratios) + 1


def test_under_a_nucleus_there_is_no_ratio() -> None:
    model, tokenizer = chat_model()
    done = complete_all(model, tokenizer, ROWS, Protocol([0], 5, 3, 1.0, 0.9), None, {"system": "w1"}, lambda _: None)
    assert done.log_ratios is None


def test_prompts_are_put_as_the_template_has_them() -> None:
    _, tokenizer = chat_model()
    row, turns = ROWS[0], [{"role": "user", "content": "w1 w2 w3"}]
    examples = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    decoding = Decoding(system="w9", examples=[["w5", "w6"]])
    system = [{"role": "system", "content": "w9"}]
    expected = tokenizer.apply_chat_template([*system, *examples, *turns], add_generation_prompt=True)["input_ids"]
    assert decoding.encode(row, tokenizer, "auto") == expected
    assert decoding.encode(row, tokenizer, "none") == tokenizer("w9\n\nw5\nw6\n\nw1 w2 w3")["input_ids"]
    other = {"id": "x", "prompt": "w1", "conversation": [{"role": "system", "content": "w2"}, *turns]}
    assert decoding.encode(other, tokenizer, "auto") == expected


def test_completions_of_another_adapter_are_of_another_origin(place, tmp_path) -> None:
    shutil.copytree(place / "a", tmp_path / "x")
    setting = {"adapters": {str(tmp_path / "x"): 1.0}}
    before = completions_origin(setting, ROWS, None)
    assert completions_origin(setting, ROWS, None) == before
    shutil.copy(place / "b" / "adapter_model.safetensors", tmp_path / "x")
    assert completions_origin(setting, ROWS, None) != before
    plain = completions_origin({"system": "w1"}, ROWS, "no/such/folder")  # nothing steers: no value function is read
    assert plain["value_functions"] is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"system": " "}, "system must be a text"),
        ({"examples": ["ab"]}, "pairs of a question and its answer"),
        ({"temperature": 0.0}, "temperature"),
        ({"mixture": {"a": 0.5, "b": 0.6}}, "must sum to 1"),
        ({"adapters": {"a": "much"}}, "finite number"),
        ({"adapters": {"a": 1.0}, "mixture": {"b": 1.0}}, "give one of them"),
        ({"candidates": 0, "partial_rewards": {"x": 1.0}}, "at least 1"),
        ({"system": "w1", "strategy": "beam_search"}, "leave strategy out"),
        ({"sistem": "w1"}, "sistem"),
    ],
)  # fmt: skip
def test_settings_that_are_none_are_refused(setting, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_setting(setting)


def test_what_does_not_fit_the_model_is_refused(place, tmp_path) -> None:
    model, tokenizer = chat_model()

    def run(setting):
        return complete_all(model, tokenizer, ROWS, Protocol([0], 3, 3), None, setting, lambda _: None)

    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        run({"adapters": {str(tmp_path): 1.0}})
    save_direction(tmp_path / "d", torch.ones(3), 1, "other")
    with pytest.raises(ValueError, match="has 3 numbers"):
        run({"directions": {str(tmp_path / "d"): 1.0}})
    with pytest.raises(OSError):
        run({"directions": {str(tmp_path / "missing"): 1.0}})
