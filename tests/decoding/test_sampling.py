"""`MavisSampling` is Algorithm 2 at every step, as the slow twin computes it, however rows come and go."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, TextStreamer
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper

from mavis_logits import MavisLogitsProcessor, MavisSampling
from mavis_logits.testing import algorithm_2, recompute_all
from strategy_checks import Collector, letter_tokenizer
from tiny import ARCHITECTURES, EOS, PAD, VOCABULARY, functions, make_base, make_head, make_value_model

K, BETA = 6, 3.0
WEIGHTS = {"a": 0.7, "b": 0.3}


def strategy(kind: str, base: Any, **settings: Any) -> MavisSampling:
    settings = {"top_k": K, "pad_token_id": PAD, "eos_token_id": EOS} | settings
    return MavisSampling(functions(kind, base), WEIGHTS, BETA, **settings)


def slow_policy(mavis: MavisSampling, base: Any, sequence: Tensor, log_ref: Tensor, weights: Tensor) -> Tensor:
    """pi_MAVIS [V] after `sequence`, re-forwarding everything."""
    config = mavis.config
    count = config.top_k or len(log_ref)
    candidates = log_ref.argsort(descending=True)[:count]
    if config.candidate_min_p is not None:
        candidates = candidates[log_ref[candidates].exp() >= config.candidate_min_p * log_ref.max().exp()]
    combined = recompute_all(mavis.functions, base, sequence, candidates).double() @ weights
    values = dict(zip(candidates.tolist(), combined.tolist(), strict=True))
    return algorithm_2(log_ref, values.__getitem__, len(candidates), float(mavis.beta))


def assert_algorithm_2(mavis: MavisSampling, base: Any, output: Any, mask: Tensor) -> int:
    """Every step of every row is the slow policy of the base model's own distribution; how many were compared."""
    length = mask.shape[1]
    compared = 0
    for row, sequence in enumerate(output.sequences):
        start = int(mask[row % len(mask)].argmax()) if len(mask) == len(output.sequences) else 0
        for t, scores in enumerate(output.scores):
            before = sequence[start : length + t]
            if t and EOS in sequence[length : length + t]:
                continue  # finished
            logits = base(before[None]).logits[0, -1]
            torch.testing.assert_close(output.logits[t][row], logits, atol=1e-3, rtol=1e-3)
            expected = slow_policy(
                mavis, base, before, torch.log_softmax(logits.detach().double(), -1), mavis.weights.double()
            )
            torch.testing.assert_close(scores[row].double().exp(), expected, atol=1e-4, rtol=1e-3)
            assert expected[sequence[length + t]] > 0
            compared += 1
    return compared


FULL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "top_k": 0}


@pytest.mark.parametrize("min_p", [None, 0.2, 1.0])
@pytest.mark.parametrize("kind", ["model", "head", "heads", "mixed", "words", "words and head"])
@pytest.mark.parametrize("sample", [True, False])
def test_every_step_is_algorithm_2(
    kind: str, sample: bool, min_p: float | None, base: Any, prompts: dict[str, Tensor]
) -> None:
    mavis = strategy(kind, base, candidate_min_p=min_p)
    torch.manual_seed(1)
    output = base.generate(**prompts, do_sample=sample, max_new_tokens=9, custom_generate=mavis, **FULL)
    assert assert_algorithm_2(mavis, base, output, prompts["attention_mask"]) >= 19


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_base_model(architecture: str, prompts: dict[str, Tensor]) -> None:
    base = make_base(architecture)
    mavis = MavisSampling(make_value_model("a", "b", architecture="gpt2"), WEIGHTS, BETA, top_k=K, pad_token_id=PAD)
    torch.manual_seed(0)
    output = base.generate(**prompts, do_sample=True, max_new_tokens=8, custom_generate=mavis, **FULL)
    assert_algorithm_2(mavis, base, output, prompts["attention_mask"])


@pytest.mark.parametrize("architecture", ["mamba", "bloom", "gemma2", "mistral"])
def test_value_models_of_every_kind_read_along(architecture: str, base: Any, prompts: dict[str, Tensor]) -> None:
    for min_p in (None, 0.3):
        mavis = MavisSampling(
            make_value_model("a", "b", architecture=architecture), WEIGHTS, BETA, top_k=K, candidate_min_p=min_p
        )
        torch.manual_seed(0)
        output = base.generate(**prompts, do_sample=True, max_new_tokens=8, custom_generate=mavis, **FULL)
        assert_algorithm_2(mavis, base, output, prompts["attention_mask"])


@pytest.mark.parametrize("kind", ["model", "head", "heads", "mixed", "words", "words and head"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"candidate_min_p": 0.3},
        {"unscored": "keep"},
        {"unscored": "expected"},
        {"unscored": "keep", "candidate_min_p": 0.3, "normalize": "none"},
        {"kl_budget": 1.5},
        {"normalize": "gap"},
    ],
)
def test_the_same_text_as_the_processor(
    kind: str, settings: dict[str, Any], base: Any, prompts: dict[str, Tensor]
) -> None:
    given = {"top_k": K, "pad_token_id": PAD, "eos_token_id": EOS} | settings
    value_functions = functions(kind, base)
    processor = MavisLogitsProcessor(value_functions, WEIGHTS, BETA, model=base, **given)
    with processor:
        expected = base.generate(**prompts, do_sample=False, max_new_tokens=20, logits_processor=[processor])
    mavis = MavisSampling(value_functions, WEIGHTS, BETA, **given)
    assert torch.equal(base.generate(**prompts, do_sample=False, max_new_tokens=20, custom_generate=mavis), expected)


def test_a_wide_and_an_uncut_head(base: Any, prompts: dict[str, Tensor]) -> None:
    for top_k in (60, VOCABULARY, None):
        mavis = MavisSampling(make_head(base, "a", "b"), WEIGHTS, BETA, top_k=top_k)
        torch.manual_seed(0)
        output = base.generate(**prompts, do_sample=True, max_new_tokens=6, custom_generate=mavis, **FULL)
        assert assert_algorithm_2(mavis, base, output, prompts["attention_mask"]) >= 12


def test_finished_rows_leave_the_batch_and_change_nothing(base: Any, prompts: dict[str, Tensor]) -> None:
    rows: list[int] = []
    hook = base.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    batch = {name: tensor.repeat(4, 1) for name, tensor in prompts.items()}
    mavis = strategy("mixed", base, top_k=20)
    torch.manual_seed(3)
    output = base.generate(**batch, do_sample=True, max_new_tokens=40, custom_generate=mavis, pad_token_id=PAD)
    hook.remove()
    decoding = rows[rows.index(len(output)) :]
    assert decoding == sorted(decoding, reverse=True)
    assert decoding[-1] < len(output)
    new = output[:, prompts["input_ids"].shape[1] :]
    for row in new.tolist():
        if EOS in row:
            assert set(row[row.index(EOS) + 1 :]) <= {PAD}
    assert mavis.stats.tokens == sum(row.index(EOS) + 1 if EOS in row else len(row) for row in new.tolist())


@pytest.mark.parametrize("kind", ["model", "head", "heads"])
def test_values_are_those_of_the_finished_sequences(kind: str, base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = strategy(kind, base)
    torch.manual_seed(0)
    output = base.generate(**prompts, do_sample=True, max_new_tokens=12, custom_generate=mavis, **FULL)
    length = prompts["input_ids"].shape[1]
    for row, sequence in enumerate(output.sequences):
        new = sequence[length:].tolist()
        end = length + (new.index(EOS) + 1 if EOS in new else len(new))
        text = sequence[int(prompts["attention_mask"][row].argmax()) : end]
        expected = recompute_all(mavis.functions, base, text[:-1], text[-1:])[0]
        torch.testing.assert_close(output.values[row], expected, atol=1e-4, rtol=1e-4)


def test_generates_temperature_shapes_the_reference(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = strategy("model", base)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)])
    settings = FULL | {"temperature": 0.7, "top_k": 5}
    torch.manual_seed(0)
    output = base.generate(**prompts, do_sample=True, max_new_tokens=6, custom_generate=mavis, **settings)
    for t, scores in enumerate(output.logits):
        before = output.sequences[0, int(prompts["attention_mask"][0].argmax()) : prompts["input_ids"].shape[1] + t]
        expected = warpers(before[None], base(before[None]).logits[:, -1])[0]
        torch.testing.assert_close(scores[0], expected, atol=1e-3, rtol=1e-3)


def test_weights_and_beta_per_request_follow_their_rows(base: Any, prompts: dict[str, Tensor]) -> None:
    count = len(prompts["input_ids"])
    weights = torch.rand(count, 2)
    beta = torch.tensor([0.0, 8.0, 3.0][:count])
    value_model = make_value_model("a", "b")
    together = MavisSampling(value_model, weights, beta, top_k=K)
    both = base.generate(
        **prompts, do_sample=False, max_new_tokens=25, custom_generate=together, num_return_sequences=1
    )
    for row in range(count):
        alone = MavisSampling(value_model, weights[row], float(beta[row]), top_k=K)
        one = base.generate(
            input_ids=prompts["input_ids"][row : row + 1], attention_mask=prompts["attention_mask"][row : row + 1],
            do_sample=False, max_new_tokens=25, custom_generate=alone,
        )  # fmt: skip
        width = min(one.shape[1], both.shape[1])
        assert torch.equal(one[0, :width], both[row, :width])


class Turn(StoppingCriteria):
    """Changes the weights half way; stops nothing."""

    def __init__(self, mavis: MavisSampling, at: int) -> None:
        self.mavis, self.at = mavis, at

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] == self.at:
            self.mavis.weights = {"b": 1.0}
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_weights_change_between_steps(base: Any, prompts: dict[str, Tensor]) -> None:
    models = {"a": make_value_model("a"), "b": make_value_model("b", seed=5)}
    mavis = MavisSampling(models, {"a": 1.0}, BETA, top_k=K)  # b, of weight 0, is not run until it counts
    length = prompts["input_ids"].shape[1]
    turn = Turn(mavis, length + 4)
    output = base.generate(
        **prompts, do_sample=False, max_new_tokens=8, custom_generate=mavis, stopping_criteria=[turn], **FULL
    )
    for t in (2, 6):
        before = output.sequences[0, int(prompts["attention_mask"][0].argmax()) : length + t]
        weights = torch.tensor([1.0, 0.0] if t < 4 else [0.0, 1.0], dtype=torch.double)
        expected = slow_policy(mavis, base, before, torch.log_softmax(output.logits[t][0].double(), -1), weights)
        torch.testing.assert_close(output.scores[t][0].double().exp(), expected, atol=1e-4, rtol=1e-3)


def test_seeds_and_several_sequences(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = strategy("model", base)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(
            base.generate(**prompts, do_sample=True, max_new_tokens=8, num_return_sequences=3, custom_generate=mavis)
        )
    assert torch.equal(runs[0], runs[1])
    assert runs[0].shape != runs[2].shape or not torch.equal(runs[0], runs[2])
    assert len(runs[0]) == 3 * len(prompts["input_ids"])


def test_sampling_draws_from_the_distribution_it_reports(base: Any) -> None:
    mavis = strategy("model", base)
    prompt = torch.tensor([[5, 6, 7]]).expand(4000, -1)
    torch.manual_seed(0)
    output = base.generate(input_ids=prompt, do_sample=True, max_new_tokens=1, custom_generate=mavis, **FULL)
    policy = output.scores[0][0].exp()
    drawn = torch.bincount(output.sequences[:, -1], minlength=VOCABULARY) / len(prompt)
    assert (drawn - policy).abs().max() < 5 * (0.25 / len(prompt)) ** 0.5


def test_trace_and_stats_tell_what_the_processors_do(base: Any, prompts: dict[str, Tensor]) -> None:
    value_functions = functions("model", base)
    given = {"top_k": K, "pad_token_id": PAD, "eos_token_id": EOS, "trace": True}
    processor = MavisLogitsProcessor(value_functions, WEIGHTS, BETA, **given)
    mavis = MavisSampling(value_functions, WEIGHTS, BETA, **given)
    length = prompts["input_ids"].shape[1]
    ids = base.generate(**prompts, do_sample=False, max_new_tokens=10, logits_processor=[processor])
    again = base.generate(**prompts, do_sample=False, max_new_tokens=10, custom_generate=mavis)
    assert torch.equal(ids, again)
    assert mavis.stats.kl == pytest.approx(processor.stats.kl, abs=1e-3)
    ratios = [m.trace.log_ratios(ids[:, length:]) for m in (processor, mavis)]
    torch.testing.assert_close(ratios[0], ratios[1], atol=1e-4, rtol=1e-3)
    assert torch.equal(mavis.trace[3].taken, ids[:, length + 3])


def test_a_streamer_gets_every_token(base: Any) -> None:
    streamer = Collector()
    mavis = strategy("model", base, streamer=streamer)
    output = base.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=6, custom_generate=mavis)
    assert torch.equal(torch.cat([tokens.reshape(-1) for tokens in streamer.parts]), output[0])
    assert streamer.ended


def test_two_threads_share_a_base_model_and_a_strategy(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = strategy("mixed", base)
    expected = base.generate(**prompts, do_sample=False, max_new_tokens=20, custom_generate=mavis)
    results: list[Tensor] = []

    def run() -> None:
        results.append(base.generate(**prompts, do_sample=False, max_new_tokens=20, custom_generate=mavis))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, r"num_beams=2 \(asks for generate's own beam search.*MavisBeamSearch"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        (
            {"inputs_embeds": torch.ones(3, 5, 32)},
            "inputs_embeds is for the base model",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    arguments: Any, message: str, base: Any, prompts: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match=message):
        base.generate(**prompts, max_new_tokens=3, custom_generate=strategy("model", base), **arguments)


def test_more_of_what_is_refused(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = strategy("model", base)
    processor = MavisLogitsProcessor(make_value_model("a", "b"), top_k=K)
    with pytest.raises(ValueError, match="steers by itself"):
        base.generate(**prompts, max_new_tokens=3, custom_generate=mavis, logits_processor=[processor])
    right = {name: tensor.flip(1) for name, tensor in prompts.items()}
    with pytest.raises(ValueError, match="padded on the right"):
        base.generate(**right, max_new_tokens=3, custom_generate=mavis)
    past = base(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot go on from past_key_values"):
        base.generate(torch.tensor([[5, 6, 7, 8]]), past_key_values=past, max_new_tokens=3, custom_generate=mavis)
    with pytest.raises(ValueError, match=r"weights are given for 2 requests, but the batch has 3 rows"):
        base.generate(**prompts, max_new_tokens=3, custom_generate=strategy_with_rows(base, 2))
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        strategy("model", base, stop_strings=["x"])
    with pytest.raises(ValueError, match=r"candidate_min_p must be above 0 and at most 1, got 1.5"):
        strategy("model", base, candidate_min_p=1.5)


def strategy_with_rows(base: Any, rows: int) -> MavisSampling:
    return MavisSampling(make_value_model("a", "b"), torch.rand(rows, 2), top_k=K)


def test_a_nan_value_ends_the_call(base: Any, prompts: dict[str, Tensor]) -> None:
    model = make_value_model("a", "b")
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    with pytest.raises(ValueError, match=r"the value function for 'b' gave nan"):
        base.generate(**prompts, max_new_tokens=3, custom_generate=MavisSampling(model, WEIGHTS, top_k=K))


def test_stop_strings_and_a_text_streamer(base: Any, capsys: Any) -> None:
    tokenizer = letter_tokenizer()
    prompt = torch.tensor([[5, 6, 7]])
    value_model = make_value_model("a")
    free = base.generate(prompt, do_sample=False, max_new_tokens=8, custom_generate=MavisSampling(value_model))
    word = tokenizer.decode(free[0, 5])
    stopped = MavisSampling(
        value_model,
        tokenizer=tokenizer,
        stop_strings=[word],
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    output = base.generate(prompt, do_sample=False, max_new_tokens=8, custom_generate=stopped)
    first = free[0, 3:].tolist().index(int(free[0, 5]))
    assert torch.equal(output, free[:, : 4 + first])
    assert capsys.readouterr().out.split() == tokenizer.decode(output[0, 3:]).split()
