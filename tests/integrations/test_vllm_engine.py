"""Steering inside the real vLLM, on a CPU: what `generate` with the processor writes, whoever else is in the batch.

Run with `make test-vllm`. The engine runs in a process of its own. A small random model makes batches cheap, so that
many requests come and go; SmolLM2 with the shipped head is at the end.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mavis_logits import MavisLogitsProcessor, ValueHead, ValueModel
from mavis_logits.core.weights import parse_weights
from mavis_logits.demo.smollm2 import converted_folder

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, EOS = 192, 1
TIE = 1e-4


def model(seed: int, noise: float = 0.0) -> LlamaForCausalLM:
    """A random model with decided scores; with `noise` a drafter that agrees with it often."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, pad_token_id=0, bos_token_id=2,
        eos_token_id=EOS, tie_word_embeddings=False,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        for parameter in made.parameters():
            if noise and parameter.ndim > 1:
                parameter.add_(noise * 0.2 * torch.randn_like(parameter))
    return made


@dataclass
class Setup:
    """A base model with a head, as folders and loaded."""

    folder: Path
    head: Path
    base: PreTrainedModel


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafter")
    model(0, noise=0.03).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[2, None], ids=["inner", "output"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("served"), request.param)


@pytest.fixture(scope="module")
def inner(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("served"), 2)


def make_setup(folder: Path, layer: int | None) -> Setup:
    base = model(0)
    base.save_pretrained(folder / "base")
    torch.manual_seed(3)
    head = ValueHead.for_model(
        base, ["kind", "short", "odd"], width=32, layer=layer, tilt_scale=[0.4, 0.5, 0.6],
        settings={"beta": 2.0, "normalize": "standard", "top_k": 20},
    )  # fmt: skip
    torch.nn.init.normal_(head.out.weight, std=0.4)
    head.save_pretrained(folder / "head")
    return Setup(folder / "base", folder / "head", base)


def run(tmp_path: Path, setup: Setup, batches: list[Any], v2: bool = False, serve: Any = None, **engine: Any) -> Any:
    """What an engine answers to some batches of requests."""
    job = {"v2": v2, "model": str(setup.folder), "serve": serve, "engine": engine, "batches": batches}
    asked, answers = tmp_path / "asked.json", tmp_path / "answers.json"
    asked.write_text(json.dumps(job))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("engine.py")), str(asked), str(answers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(answers.read_text())
    assert found["v2"] == v2
    return found


def requests(count: int, new: int, seed: int = 0, longest: int = 60, **params: Any) -> list[dict[str, Any]]:
    """Different prompts, lengths, weights and strengths; every fourth request is not steered."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    for number in range(count):
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, longest))]
        asked: dict[str, Any] = {}
        if number % 4:
            asked = {
                "mavis_weights": f"kind={rng.random():.3f},short={rng.uniform(-1, 1):.3f}",
                "mavis_beta": round(rng.uniform(0.5, 4), 3),
            }
            asked |= [{}, {"mavis_top_k": 7}, {"mavis_min_p": 0.02}, {"mavis_reference_temperature": 0.7}][number % 3]
        own = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True} | params
        made.append({"prompt": prompt, "params": own, "asked": asked})
    return made


def plain(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**request, "asked": {}} for request in batch]


def greedy(setup: Setup, request: dict[str, Any], values: Any = None) -> tuple[list[int], torch.Tensor]:
    """What `generate` writes, and the scores [N, V] that it chose by."""
    asked = request["asked"]
    processors = []
    if asked:
        names = {"mavis_top_k": "top_k", "mavis_min_p": "candidate_min_p",
                 "mavis_reference_temperature": "reference_temperature"}  # fmt: skip
        processors = [
            MavisLogitsProcessor.from_pretrained(
                values or str(setup.head), weights=parse_weights(asked["mavis_weights"]), beta=asked.get("mavis_beta"),
                model=setup.base, **({"normalize": "none"} if values else {}),
                **{names[key]: value for key, value in asked.items() if key in names},
            )
        ]  # fmt: skip
    new = request["params"]["max_tokens"]
    found = setup.base.generate(
        torch.tensor([request["prompt"]]), do_sample=False, max_new_tokens=new,
        logits_processor=processors, output_scores=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    return found.sequences[0, len(request["prompt"]) :].tolist(), torch.stack(found.scores)[:, 0]


def ties(setup: Setup, batch: list[dict[str, Any]], answers: Any, values: Any = None) -> int:
    """How many requests part from `generate` at a tie; any other difference is an error."""
    count = 0
    for request, tokens in zip(batch, answers["tokens"], strict=True):
        wanted, scores = greedy(setup, request, values)
        tokens = tokens[: len(wanted)]  # generate stops at the end of the text
        where = next((i for i, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]), None)
        if where is not None:
            gap = float(scores[where, wanted[where]] - scores[where, tokens[where]])
            assert gap < TIE, (request, tokens, wanted, gap)
            count += 1
    return count


def check_neighbours(batch: list[dict[str, Any]], steered: Any, unsteered: Any) -> None:
    """Requests that ask for nothing are answered as by an engine without us, bit for bit."""
    others = [number for number, request in enumerate(batch) if not request["asked"]]
    assert others
    for number in others:
        assert steered["tokens"][number] == unsteered["tokens"][number]
        assert steered["logprobs"][number] == unsteered["logprobs"][number]
    assert steered["tokens"] != unsteered["tokens"]


# More requests than slots, and prompts longer than a step: slots are used again and prompts are read in parts.
CROWDED = {"max_num_seqs": 16, "max_num_batched_tokens": 48, "max_model_len": 96, "disable_log_stats": False}


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_64_requests_are_answered_as_by_generate(tmp_path: Path, setup: Setup, v2: bool) -> None:
    batch = requests(64, 10)
    serve = {"values": str(setup.head)}
    answers = run(tmp_path, setup, [batch, batch], v2, serve, **CROWDED)["batches"]
    assert ties(setup, batch, answers[0]) <= 2
    assert answers[1]["tokens"] == answers[0]["tokens"]
    unsteered = run(tmp_path, setup, [plain(batch)], v2, None, **CROWDED)["batches"][0]
    check_neighbours(batch, answers[0], unsteered)


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_requests_that_are_preempted_go_on_as_before(tmp_path: Path, inner: Setup, v2: bool) -> None:
    batch = requests(24, 40, seed=5, longest=30)
    cramped = CROWDED | {"num_gpu_blocks_override": 6, "block_size": 32, "max_num_batched_tokens": 96}
    found = run(tmp_path, inner, [batch], v2, {"values": str(inner.head)}, **cramped)
    assert found["metrics"].get("vllm:num_preemptions", 1) > 0
    assert ties(inner, batch, found["batches"][0]) <= 2


def test_drafts_of_ngrams_are_verified_too(tmp_path: Path, inner: Setup) -> None:
    batch = requests(24, 12, seed=8)
    for request in batch:
        request["prompt"] = (request["prompt"] * 4)[:60]  # there is something to look up
    draft = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    engine = CROWDED | {"max_num_batched_tokens": 96, "speculative_config": draft}
    found = run(tmp_path, inner, [batch], True, {"values": str(inner.head)}, **engine)
    assert ties(inner, batch, found["batches"][0]) <= 2
    assert found["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0


def test_drafts_are_verified_against_the_tilted_distribution(tmp_path: Path, setup: Setup, drafter: Path) -> None:
    batch = requests(32, 12, seed=7)
    draft = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": 3}
    engine = CROWDED | {"max_num_batched_tokens": 96, "speculative_config": draft}
    found = run(tmp_path, setup, [batch], True, {"values": str(setup.head)}, **engine)
    assert ties(setup, batch, found["batches"][0]) <= 2
    accepted = found["metrics"].get("vllm:spec_decode_num_accepted_tokens")
    drafted = found["metrics"].get("vllm:spec_decode_num_draft_tokens")
    if accepted is not None:
        assert 0 < accepted < drafted  # else nothing was tried


@pytest.fixture(scope="module")
def drafters_head(tmp_path_factory: pytest.TempPathFactory, drafter: Path) -> Path:
    """What the served model's head says, for the drafter."""
    base = LlamaForCausalLM.from_pretrained(drafter)
    torch.manual_seed(3)
    head = ValueHead.for_model(base, ["kind", "short", "odd"], width=32, tilt_scale=[0.4, 0.5, 0.6])
    torch.nn.init.normal_(head.out.weight, std=0.4)  # the same draws as of `make_setup`
    folder = tmp_path_factory.mktemp("drafters-head")
    head.save_pretrained(folder)
    return folder


def test_more_of_tilted_drafts_is_accepted(tmp_path: Path, drafter: Path, drafters_head: Path) -> None:
    served = make_setup(tmp_path / "served", None)
    batch = requests(32, 12, seed=7)
    for request in batch:
        if request["asked"]:
            request["asked"]["mavis_beta"] = 6.0
    draft = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": 3}
    engine = CROWDED | {"max_num_batched_tokens": 96, "speculative_config": draft}
    accepted = []
    for more in ({}, {"draft_values": str(drafters_head)}):
        found = run(tmp_path, served, [batch], True, {"values": str(served.head), **more}, **engine)
        assert ties(served, batch, found["batches"][0]) <= 2
        metrics = found["metrics"]
        accepted.append(metrics["vllm:spec_decode_num_accepted_tokens"] / metrics["vllm:spec_decode_num_draft_tokens"])
    print(f"accepted: {accepted[0]:.2f} of the drafts as they are, {accepted[1]:.2f} of the tilted ones")
    assert accepted[1] > accepted[0] + 0.1


def test_draft_values_without_a_draft_model_are_refused(tmp_path: Path, inner: Setup, drafters_head: Path) -> None:
    serve = {"values": str(inner.head), "draft_values": str(drafters_head)}
    with pytest.raises(AssertionError, match="draft_values are for speculation by a draft model"):
        run(tmp_path, inner, [requests(1, 1)], False, serve)


@pytest.mark.parametrize("tilted", [False, True], ids=["drafts", "tilted drafts"])
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampling_with_drafts_is_exact(
    tmp_path: Path, inner: Setup, drafter: Path, drafters_head: Path, tilted: bool, method: str
) -> None:
    """Pairs of tokens follow the tilted distribution that is enumerated."""
    prompt, count = [5, 9, 23, 40], 600
    asked = {"mavis_weights": "kind=1,odd=-0.5", "mavis_beta": 1.0, "mavis_top_k": 4}
    batch = [
        {
            "prompt": prompt,
            "params": {"temperature": 1.0, "max_tokens": 2, "seed": i, "ignore_eos": True},
            "asked": asked,
        }
        for i in range(count)
    ]
    draft = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": 2, "draft_sample_method": method}
    engine = {"max_num_seqs": 64, "max_model_len": 64, "speculative_config": draft}
    serve = {"values": str(inner.head)} | ({"draft_values": str(drafters_head)} if tilted else {})
    answers = run(tmp_path, inner, [batch], True, serve, **engine)["batches"][0]
    truth = enumerated(inner, prompt, asked)
    counted = dict.fromkeys(truth, 0)
    for pair in answers["tokens"]:
        counted[tuple(pair)] += 1  # a pair without probability is a KeyError
    statistic = sum((counted[pair] - count * p) ** 2 / (count * p) for pair, p in truth.items() if count * p >= 5)
    degrees = sum(count * p >= 5 for p in truth.values())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5, (statistic, degrees)
    distance = sum(abs(counted[pair] / count - p) for pair, p in truth.items()) / 2
    assert distance < 0.09


def enumerated(setup: Setup, prompt: list[int], asked: dict[str, Any]) -> dict[tuple[int, ...], float]:
    mavis = MavisLogitsProcessor.from_pretrained(
        str(setup.head), weights=parse_weights(asked["mavis_weights"]), beta=asked["mavis_beta"],
        top_k=asked["mavis_top_k"], model=setup.base,
    )  # fmt: skip

    def following(tokens: list[int]) -> dict[int, float]:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            scores = mavis(ids, setup.base(ids).logits[:, -1])
        found = scores.softmax(dim=-1)[0]
        return {token: float(found[token]) for token in torch.nonzero(found > 1e-12)[:, 0].tolist()}

    first = following(prompt)
    return {(a, b): p * q for a, p in first.items() for b, q in following([*prompt, a]).items()}


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2 with drafts"])
def test_value_models_follow_requests_that_come_and_go(tmp_path: Path, inner: Setup, drafter: Path, v2: bool) -> None:
    """A value model, and a head beside it; room for some of the caches only."""
    torch.manual_seed(4)
    value_model = ValueModel.from_backbone(model(4), ["wide"], 2, reward_scale=[0.5])
    torch.nn.init.normal_(value_model.head.weight, std=0.5)
    value_model.save_pretrained(tmp_path / "value")
    values = {"kind": str(inner.head), "wide": str(tmp_path / "value")}
    batch = requests(24, 8, seed=9)
    for request in batch:
        if request["asked"]:
            request["asked"] = {"mavis_weights": "kind=0.5,wide=0.7", "mavis_beta": 2.0, "mavis_top_k": 8}
    serve = {"values": values, "max_value_tokens": 600, "normalize": "none"}
    engine: dict[str, Any] = CROWDED
    if v2:
        draft = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": 2}
        engine = CROWDED | {"max_num_batched_tokens": 96, "speculative_config": draft}
    answers = run(tmp_path, inner, [batch], v2, serve, **engine)["batches"][0]
    assert ties(inner, batch, answers, values) <= 2


def test_two_ranks_of_tensor_parallelism_come_to_the_same(tmp_path: Path, setup: Setup) -> None:
    """Every rank steers its own copy of the rows; what one of them samples is what all go on from."""
    batch = requests(24, 8, seed=11)
    engine = CROWDED | {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    answers = run(tmp_path, setup, [batch], False, {"values": str(setup.head)}, **engine)["batches"][0]
    assert ties(setup, batch, answers) <= 2


BAD = [{"mavis_weights": "kid=1"}, {"mavis_beta": "much"}, {"mavis_top_k": 100000}, {"mavis_strength": 1}]


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_a_bad_request_is_refused_and_the_engine_lives(tmp_path: Path, inner: Setup, v2: bool) -> None:
    good = requests(4, 4)
    bad = [[{**good[1], "asked": asked}] for asked in BAD]
    answers = run(tmp_path, inner, [*bad, good], v2, {"values": str(inner.head)}, max_num_seqs=8)["batches"]
    for one in answers[:-1]:
        assert one["refused"].startswith("VLLMValidationError")
    assert ties(inner, good, answers[-1]) == 0


def test_a_value_function_that_gives_nan_ends_only_its_own_rows(tmp_path: Path, inner: Setup) -> None:
    head = ValueHead.from_pretrained(inner.head)
    with torch.no_grad():
        head.out.bias[2] = torch.nan  # of "odd"
    head.save_pretrained(tmp_path / "damaged")
    batch = requests(8, 6)
    batch = [{**one, "params": one["params"] | {"ignore_eos": False}} for one in plain(batch)]
    batch[3]["asked"] = {"mavis_weights": "odd=1"}
    answers = run(tmp_path, inner, [batch], False, {"values": str(tmp_path / "damaged")}, max_num_seqs=8)["batches"][0]
    assert answers["tokens"][3] == [EOS]
    assert all(len(tokens) > 1 for number, tokens in enumerate(answers["tokens"]) if number != 3)


def test_a_head_of_another_model_is_refused_at_start(tmp_path: Path, inner: Setup) -> None:
    other = model(9)
    other.save_pretrained(tmp_path / "other")
    strange = Setup(tmp_path / "other", inner.head, other)
    with pytest.raises(AssertionError, match="the served model has other weights"):
        run(tmp_path, strange, [requests(1, 1)], False, {"values": str(inner.head)})


def test_states_of_inner_layers_are_there_in_compiled_code(tmp_path: Path, inner: Setup) -> None:
    batch = requests(12, 6)
    compiled = {"enforce_eager": False, "max_num_seqs": 8, "max_model_len": 96}
    answers = run(tmp_path, inner, [batch], False, {"values": str(inner.head)}, **compiled)["batches"][0]
    assert ties(inner, batch, answers) <= 1


@pytest.fixture(scope="module")
def smollm2() -> Setup:
    from mavis_logits.models import load_chat_model

    base, _ = load_chat_model("smollm2")
    return Setup(converted_folder(), ROOT / "model_cards" / "smollm2-135m-value-head", base)


def smollm2_requests(count: int, new: int) -> list[dict[str, Any]]:
    from mavis_logits.core.chat import encode_prompt
    from mavis_logits.models import load_tokenizer

    tokenizer, rng = load_tokenizer("smollm2"), random.Random(0)
    objectives = ["helpful", "harmless", "humour", "concise", "positive", "formal"]
    subjects = ["tea", "a picnic", "the sea", "cats and dogs", "bread", "a rainy day", "chess", "the moon"]
    made = []
    for number in range(count):
        subject, style = subjects[number % 8], ["Tell me about", "Write two lines on", "What is nice about"][number % 3]
        prompt = encode_prompt(f"{style} {subject}{' ' + 'please' * (number % 5)}.", tokenizer)
        asked: dict[str, Any] = {}
        if number % 4:
            one, two = rng.sample(objectives, 2)
            asked = {"mavis_weights": f"{one}={rng.random():.2f},{two}={rng.random():.2f}",
                     "mavis_beta": round(rng.uniform(2, 8), 2)}  # fmt: skip
        params = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True}
        made.append({"prompt": list(prompt), "params": params, "asked": asked})
    return made


def test_smollm2_with_the_shipped_head(tmp_path: Path, smollm2: Setup) -> None:
    batch = smollm2_requests(64, 12)
    engine = {"max_num_seqs": 64}
    steered = run(tmp_path, smollm2, [batch], False, {"values": str(smollm2.head)}, **engine)["batches"][0]
    unsteered = run(tmp_path, smollm2, [plain(batch)], False, None, **engine)["batches"][0]
    check_neighbours(batch, steered, unsteered)
    count = ties(smollm2, batch, steered)
    print(f"{count} of 64 part from generate at a tie")
    assert count <= 4


def test_smollm2_with_drafts(tmp_path: Path, smollm2: Setup) -> None:
    batch = smollm2_requests(8, 12)
    draft = {"method": "draft_model", "model": str(smollm2.folder), "num_speculative_tokens": 3}
    serve = {"values": str(smollm2.head)}
    answers = run(tmp_path, smollm2, [batch], True, serve, max_num_seqs=8, speculative_config=draft)["batches"][0]
    assert ties(smollm2, batch, answers) <= 1
