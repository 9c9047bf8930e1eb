"""In every way in which `generate` runs, the distribution is Algorithm 2 as the slow twin computes it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import CompileConfig, PreTrainedTokenizerFast, pipeline

from mavis_logits import MavisLogitsProcessor
from processor_checks import BETA, WEIGHTS, K, Recorder, assert_algorithm_2, steer
from tiny import ARCHITECTURES, EOS, PAD, VOCABULARY, functions, make_base, make_head, make_value_model

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "temperature and top-p": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "repetition penalty": {"do_sample": True, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("kind", ["model", "head", "heads", "mixed", "words", "words and head"])
@pytest.mark.parametrize("mode", MODES)
def test_generate_samples_from_algorithm_2(kind: str, mode: str, base: Any, prompts: dict[str, Tensor]) -> None:
    recorder = steer(kind, base)
    torch.manual_seed(0)
    base.generate(**prompts, max_new_tokens=8, logits_processor=[recorder], **MODES[mode])
    assert len(recorder.calls) >= 4
    assert_algorithm_2(recorder, base)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["several sequences", "beams", "two hundred steps"])
def test_value_models_of_every_architecture(
    architecture: str, mode: str, base: Any, prompts: dict[str, Tensor]
) -> None:
    """Left-padded rows that end at different times, reordered beams, long generations: equal to re-forwarding."""
    value_model = make_value_model("a", "b", architecture=architecture)
    recorder = Recorder(MavisLogitsProcessor(value_model, WEIGHTS, BETA, top_k=K, pad_token_id=PAD, eos_token_id=EOS))
    settings = MODES.get(mode, {"do_sample": True, "suppress_tokens": [EOS]})
    torch.manual_seed(0)
    steps = 200 if mode == "two hundred steps" else 10
    base.generate(**prompts, max_new_tokens=steps, logits_processor=[recorder], **settings)
    recorder.calls = recorder.calls[:: max(1, len(recorder.calls) // 3)] + recorder.calls[-1:]
    assert_algorithm_2(recorder, base)


@pytest.mark.parametrize("kind", ["model", "head", "heads"])
def test_assisted_decoding_with_rejections(kind: str, base: Any) -> None:
    recorder = steer(kind, base)
    torch.manual_seed(0)
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    out = base.generate(
        prompt, assistant_model=make_base(seed=9), do_sample=False, max_new_tokens=16, logits_processor=[recorder]
    )
    if kind != "model":  # a draft has no state of the base model behind it; the result is exact all the same
        assert recorder.inner.stats.passed_through > 0
    assert_algorithm_2(recorder, base)
    plain = steer(kind, base)
    assert torch.equal(out, base.generate(prompt, do_sample=False, max_new_tokens=16, logits_processor=[plain]))


@pytest.mark.parametrize("kind", ["model", "head", "heads"])
def test_prompt_lookup(kind: str, base: Any) -> None:
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    recorder = steer(kind, base)
    out = base.generate(
        prompt, prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=12, logits_processor=[recorder]
    )
    assert_algorithm_2(recorder, base)
    assert torch.equal(
        out, base.generate(prompt, do_sample=False, max_new_tokens=12, logits_processor=[steer(kind, base)])
    )


@pytest.mark.parametrize("kind", ["model", "head", "heads"])
def test_compiled_static_cache(kind: str, base: Any, prompts: dict[str, Tensor]) -> None:
    compiled = CompileConfig(backend="eager", fullgraph=True)
    compiled._compile_all_devices = True  # else generate compiles on GPUs only
    recorder = steer(kind, base)
    out = base.generate(
        **prompts,
        do_sample=False,
        max_new_tokens=6,
        cache_implementation="static",
        compile_config=compiled,
        logits_processor=[recorder],
    )
    assert_algorithm_2(recorder, base)
    assert torch.equal(
        out, base.generate(**prompts, do_sample=False, max_new_tokens=6, logits_processor=[steer(kind, base)])
    )


@pytest.mark.parametrize("kind", ["model", "head", "heads"])
def test_rows_that_end_at_different_times(kind: str, base: Any, prompts: dict[str, Tensor]) -> None:
    with torch.no_grad():
        base.get_output_embeddings().weight[EOS] *= 2  # end often
    recorder = steer(kind, base)
    torch.manual_seed(1)
    out = base.generate(
        **prompts, do_sample=True, max_new_tokens=30, num_return_sequences=4, logits_processor=[recorder]
    )
    lengths = {(row != PAD).sum().item() for row in out}
    assert len(lengths) > 2
    assert_algorithm_2(recorder, base)


def test_a_second_chat_turn_goes_on_from_the_cache(base: Any) -> None:
    recorder = steer("model", base)
    model = recorder.inner.functions.models[0]
    out = base.generate(torch.tensor([[5, 6, 7, 8, 9]]), do_sample=False, max_new_tokens=5, logits_processor=[recorder])
    queries: list[int] = []
    hook = model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: queries.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    turn = torch.cat([out, torch.tensor([[20, 21, 22]])], dim=1)
    base.generate(turn, do_sample=False, max_new_tokens=5, logits_processor=[recorder])
    hook.remove()
    assert queries[0] <= 4 + K  # the new turn (the last token of the old one was never scored) and the candidates
    assert_algorithm_2(recorder, base)


def test_two_hundred_steps(base: Any) -> None:
    recorder = steer("model", base)
    torch.manual_seed(0)
    base.generate(
        torch.tensor([[5, 6, 7], [8, 9, 10]]),
        do_sample=True,
        max_new_tokens=200,
        eos_token_id=-1,
        logits_processor=[recorder],
    )
    recorder.calls = recorder.calls[::40] + recorder.calls[-1:]
    assert_algorithm_2(recorder, base, steered=10)


def test_a_step_feeds_exactly_k_queries_per_live_row(base: Any, prompts: dict[str, Tensor]) -> None:
    models = {"a": make_value_model("a", seed=3), "b": make_value_model("b", seed=4)}
    mavis = MavisLogitsProcessor(models, WEIGHTS, BETA, top_k=K, pad_token_id=PAD, eos_token_id=EOS)
    mavis(prompts["input_ids"], torch.randn(3, VOCABULARY))  # construct scorers, which try the backbone once
    mavis.reset()
    fed: dict[str, list[tuple[int, ...]]] = {"a": [], "b": []}
    base.generate(**prompts, do_sample=False, max_new_tokens=1, logits_processor=[mavis])
    for name, model in models.items():
        model.backbone.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: fed[name].append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
    recorder = Recorder(mavis)
    out = base.generate(**prompts, do_sample=True, max_new_tokens=12, logits_processor=[recorder])
    steps = out.shape[1] - prompts["input_ids"].shape[1]
    for shapes in fed.values():
        assert len(shapes) == steps
        assert all(q == K for _, q in shapes[1:])


@pytest.mark.parametrize("kind", ["model", "head", "heads", "mixed", "words", "words and head"])
def test_beta_zero_over_the_whole_vocabulary_changes_nothing(kind: str, base: Any, prompts: dict[str, Tensor]) -> None:
    model = base if kind != "model" else None
    mavis = MavisLogitsProcessor(functions(kind, base), beta=0.0, model=model, top_k=VOCABULARY, pad_token_id=PAD)
    torch.manual_seed(3)
    plain = base.generate(**prompts, do_sample=True, max_new_tokens=10)
    torch.manual_seed(3)
    steered = base.generate(**prompts, do_sample=True, max_new_tokens=10, logits_processor=[mavis])
    assert torch.equal(plain, steered)
    assert mavis.stats.steps == 10
    assert mavis.stats.kl == pytest.approx(0, abs=1e-3)


def test_top_k_none_scores_the_vocabulary_with_a_head(base: Any, prompts: dict[str, Tensor]) -> None:
    head = make_head(base, "a")
    both = []
    for top_k in (None, VOCABULARY):
        mavis = MavisLogitsProcessor(head, beta=BETA, model=base, top_k=top_k, pad_token_id=PAD)
        with mavis:
            both.append(base.generate(**prompts, do_sample=False, max_new_tokens=6, logits_processor=[mavis]))
    assert torch.equal(*both)


def test_one_object_serves_many_calls(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = steer("mixed", base)
    for rows in ([0, 1, 2], [1], [2, 0]):
        batch = {name: tensor[rows] for name, tensor in prompts.items()}
        for sample in (False, True):
            base.generate(**batch, do_sample=sample, max_new_tokens=5, logits_processor=[mavis])
    assert_algorithm_2(mavis, base)


def test_two_threads_get_correct_results(base: Any) -> None:
    recorder = steer("mixed", base)
    batches = [torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11]])]
    expected = [base.generate(b, do_sample=False, max_new_tokens=12, logits_processor=[recorder]) for b in batches]
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = base.generate(batches[i], do_sample=False, max_new_tokens=12, logits_processor=[recorder])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(2))


def test_streamer(base: Any) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Keep(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    streamer, mavis = Keep(), steer("mixed", base)
    out = base.generate(
        torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=6, streamer=streamer, logits_processor=[mavis]
    )
    assert streamer.tokens == out[0].tolist()


@pytest.mark.parametrize("kind", ["model", "head", "heads"])
def test_text_generation_pipeline(kind: str, base: Any) -> None:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")))
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side = "w0", "w1", "left"
    write = pipeline("text-generation", model=base, tokenizer=tokenizer, batch_size=2)
    recorder = steer(kind, base)
    torch.manual_seed(0)
    out = write(["w5 w6 w7", "w8"], max_new_tokens=6, do_sample=True, temperature=1.0, logits_processor=[recorder])
    assert len(out) == 2
    assert_algorithm_2(recorder, base)
