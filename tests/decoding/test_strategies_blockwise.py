"""`MavisBlockwise`: one block is plain sampling, several are what a slow search over blocks finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mavis_logits import MavisBlockwise, MavisSampling
from mavis_logits.decoding.strategies.session import Session
from mavis_logits.decoding.strategies.worst_case import worst_case_weights
from strategy_checks import ENDS, FULL, WEIGHTS, Collector, Damage, StopAfter, recompute, written
from tiny import PAD, functions, make_adapter, make_base, make_value_model

# ---- one block ----


@pytest.mark.parametrize("kind", ["model", "head", "heads", "mixed", "words and head"])
@pytest.mark.parametrize("length", [1, 3, 50])
def test_one_block_of_the_reference_is_plain_sampling(
    kind: str, length: int, base: Any, prompts: dict[str, Tensor]
) -> None:
    value = functions(kind, base)
    plain = MavisSampling(value, WEIGHTS, 0.0, top_k=5, unscored="keep")
    block = MavisBlockwise(value, WEIGHTS, num_blocks=1, block_length=length, top_k=5)
    outputs = []
    for mavis in (plain, block):
        torch.manual_seed(0)
        outputs.append(
            base.generate(
                **prompts,
                do_sample=True,
                max_new_tokens=20,
                temperature=0.8,
                top_p=0.95,
                eos_token_id=ENDS,
                custom_generate=mavis,
            )
        )
    assert (outputs[0][:, -1] == PAD).any()
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["model", "head"])
@pytest.mark.parametrize("settings", [{}, {"unscored": "keep"}, {"unscored": "expected"}, {"candidate_min_p": 0.3}])
@pytest.mark.parametrize("sample", [True, False])
def test_one_block_of_the_policy_is_mavis_sampling(
    sample: bool, settings: dict[str, Any], kind: str, base: Any, prompts: dict[str, Tensor]
) -> None:
    value = functions(kind, base)
    settings = {"top_k": 5, **settings}
    outputs = []
    for mavis in (
        MavisSampling(value, WEIGHTS, 3.0, **settings),
        MavisBlockwise(value, WEIGHTS, 3.0, num_blocks=1, block_length=4, sample_from="tilted", **settings),
    ):
        torch.manual_seed(0)
        outputs.append(
            base.generate(**prompts, do_sample=sample, max_new_tokens=15, eos_token_id=ENDS, custom_generate=mavis)
        )
    assert torch.equal(*outputs)


def test_one_block_without_sampling_is_greedy_decoding(base: Any, prompts: dict[str, Tensor]) -> None:
    block = MavisBlockwise(make_value_model("a"), num_blocks=1, block_length=4)
    settings = {"do_sample": False, "max_new_tokens": 15, "repetition_penalty": 1.3, "eos_token_id": ENDS}
    expected = base.generate(**prompts, **settings)
    assert torch.equal(base.generate(**prompts, **settings, custom_generate=block), expected)


# ---- several blocks ----


def slow_search(mavis: MavisBlockwise, base: Any, prompt: list[int], steps: int, mask: list[bool]) -> list[int]:
    """Without sampling: K blocks from the K likeliest tokens, written greedily; the best by value is kept."""
    sequence = list(prompt)
    mean, scale, _ = mavis.functions.units()
    while len(sequence) < len(prompt) + steps and sequence[-1] not in ENDS:
        first = base(torch.tensor([sequence])).logits[0, -1].topk(mavis.num_blocks).indices
        blocks = []
        for token in first.tolist():
            block = [*sequence, token]
            while len(block) < min(len(sequence) + mavis.block_length, len(prompt) + steps) and block[-1] not in ENDS:
                block.append(int(base(torch.tensor([block])).logits[0, -1].argmax()))
            blocks.append(block)
        values = torch.stack([recompute(mavis, base, block) for block in blocks])
        weights = mavis.weights
        if mavis.combination == "worst-case":
            values = (values - mean) / scale
            found = worst_case_weights(values[None].double().numpy(), float(mavis.beta), torch.tensor([mask]).numpy())
            weights = torch.from_numpy(found)[0].float()
        sequence = blocks[int((values @ weights).argmax())]
    return sequence


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("combination", ["weighted", "worst-case"])
@pytest.mark.parametrize("kind", ["model", "mixed"])
@torch.no_grad()
def test_without_sampling_the_best_block_is_kept(
    kind: str, combination: Any, length: int, base: Any, prompts: dict[str, Tensor]
) -> None:
    weights = WEIGHTS if combination == "weighted" else None
    mavis = MavisBlockwise(
        functions(kind, base), weights, 1.5, num_blocks=4, block_length=length, combination=combination
    )
    output = base.generate(**prompts, do_sample=False, max_new_tokens=10, custom_generate=mavis, **FULL)
    mean, scale, _ = mavis.functions.units()
    for row, (ids, mask) in enumerate(zip(prompts["input_ids"], prompts["attention_mask"], strict=True)):
        sequence = written(output.sequences[row], len(ids))
        assert sequence == slow_search(mavis, base, ids[mask.bool()].tolist(), 10, [True, True])
        values = recompute(mavis, base, sequence)
        torch.testing.assert_close(output.values[row], values, atol=1e-3, rtol=1e-3)
        score = values @ mavis.weights if combination == "weighted" else ((values - mean) / scale).min()
        torch.testing.assert_close(output.sequences_scores[row], score, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["model", "head", "heads", "mixed", "words and head"])
@pytest.mark.parametrize("source", ["reference", "tilted"])
@pytest.mark.parametrize("length", [1, 4])
@torch.no_grad()
def test_sampled_sequences_come_with_their_values(
    kind: str, source: Any, length: int, base: Any, prompts: dict[str, Tensor]
) -> None:
    mavis = MavisBlockwise(
        functions(kind, base), WEIGHTS, num_blocks=3, block_length=length, sample_from=source, top_k=5
    )
    torch.manual_seed(0)
    output = base.generate(
        **prompts, do_sample=True, max_new_tokens=14, num_return_sequences=2, custom_generate=mavis, **FULL
    )
    width = prompts["input_ids"].shape[1]
    assert len(output.sequences) == 6
    assert (output.sequences[:, -1] == PAD).any()
    for row in range(6):
        values = recompute(mavis, base, written(output.sequences[row], width))
        torch.testing.assert_close(output.values[row], values, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(output.sequences_scores[row], values @ mavis.weights, atol=1e-3, rtol=1e-3)
    torch.manual_seed(0)
    again = base.generate(
        **prompts, do_sample=True, max_new_tokens=14, num_return_sequences=2, custom_generate=mavis, **FULL
    )
    assert torch.equal(again.sequences, output.sequences)


def test_more_blocks_are_worth_more(base: Any, prompts: dict[str, Tensor]) -> None:
    ids, mask = (prompts[name].repeat(30, 1) for name in ("input_ids", "attention_mask"))
    worth = []
    for count in (1, 2, 6):
        mavis = MavisBlockwise(make_value_model("a"), num_blocks=count, block_length=4, keep="best")
        torch.manual_seed(0)
        output = base.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=8, custom_generate=mavis, **FULL
        )
        worth.append(float(output.sequences_scores.mean()))
    assert worth[0] + 0.2 < worth[1]
    assert worth[1] + 0.2 < worth[2]


def test_weights_of_requests_are_their_own(base: Any, prompts: dict[str, Tensor]) -> None:
    value = make_value_model("a", "b")
    weights, beta = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), torch.tensor([1.0, 2.0, 3.0])
    for combination in ("weighted", "worst-case"):
        settings: Any = {"num_blocks": 3, "block_length": 3, "combination": combination}
        together = base.generate(
            **prompts,
            do_sample=False,
            max_new_tokens=9,
            custom_generate=MavisBlockwise(value, weights, beta, **settings),
        )
        for row in range(3):
            alone = base.generate(
                input_ids=prompts["input_ids"][row : row + 1],
                attention_mask=prompts["attention_mask"][row : row + 1],
                do_sample=False,
                max_new_tokens=9,
                custom_generate=MavisBlockwise(value, weights[row], float(beta[row]), **settings),
            )
            assert written(together[row], 5) == written(alone[0], 5)


@pytest.mark.parametrize("combination", ["weighted", "worst-case"])
def test_fused_value_models(combination: Any, base: Any, prompts: dict[str, Tensor]) -> None:
    """Adapters of different reward units, run in one forward or each in its own."""
    outputs = []
    for fuse in (True, False):
        adapters = [make_adapter("a", seed=2), make_adapter("b", seed=3)]
        mavis = MavisBlockwise(adapters, fuse=fuse, num_blocks=3, block_length=3, combination=combination)
        outputs.append(base.generate(**prompts, do_sample=False, max_new_tokens=9, custom_generate=mavis, **FULL))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].values, outputs[1].values, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(outputs[0].sequences_scores, outputs[1].sequences_scores, atol=1e-3, rtol=1e-3)


# ---- the choice between blocks ----


def choose(mavis: MavisBlockwise, base: Any, values: Tensor) -> tuple[Tensor, Tensor]:
    """Ten thousand choices between blocks of the values [K, M]."""
    with Session(mavis, base, torch.full((10_000, 1), 5)) as session:
        torch.manual_seed(0)
        return mavis._choose(values.expand(10_000, -1, -1), session.of_requests, True)


def test_blocks_are_kept_in_proportion_to_the_exponential_of_their_value(base: Any) -> None:
    mavis = MavisBlockwise(make_value_model("a", "b"), WEIGHTS, 1.5, num_blocks=3)
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0], [1.0, 0.0]])
    combined = values @ mavis.weights
    policy = torch.softmax(1.5 * (combined - combined.min()) / (combined.max() - combined.min()), dim=0)
    places, scores = choose(mavis, base, values)
    torch.testing.assert_close(torch.bincount(places, minlength=3) / 10_000, policy, atol=0.02, rtol=0)
    assert torch.equal(scores, combined[places])
    mavis.keep = "best"
    assert (choose(mavis, base, values)[0] == 1).all()


def test_the_worst_case_policy_serves_both_objectives_alike(base: Any) -> None:
    """One block is good for a, one for b: the equilibrium keeps either as often as makes the expectations equal."""
    mavis = MavisBlockwise(make_value_model("a", "b"), beta=2.0, num_blocks=2, combination="worst-case")
    mean, scale, _ = mavis.functions.units()
    standard = torch.tensor([[1.0, -0.5], [-1.0, 0.7]])
    places, scores = choose(mavis, base, standard * scale + mean)
    expected = standard[places].mean(dim=0)
    assert float(expected[0]) == pytest.approx(float(expected[1]), abs=0.05)
    torch.testing.assert_close(scores, standard.amin(dim=1)[places])


def test_objectives_without_weight_take_no_part_in_the_worst_case(base: Any, prompts: dict[str, Tensor]) -> None:
    values = {"a": make_value_model("a"), "b": make_value_model("b", seed=7)}
    settings: Any = {"num_blocks": 3, "block_length": 3, "combination": "worst-case"}
    both = MavisBlockwise(values, {"a": 1.0}, **settings)
    alone = MavisBlockwise(values["a"], **settings)
    outputs = [
        base.generate(**prompts, do_sample=False, max_new_tokens=9, custom_generate=mavis, **FULL)
        for mavis in (both, alone)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert outputs[0].values[:, 1].isnan().all()
    torch.testing.assert_close(outputs[0].values[:, :1], outputs[1].values)


# ---- generate ----


def test_stopping_criteria_end_blocks(base: Any, prompts: dict[str, Tensor]) -> None:
    plain = base.generate(**prompts, do_sample=False, max_new_tokens=9)
    stop = StopAfter(int(plain[0, 6]))
    mavis = MavisBlockwise(make_value_model("a"), num_blocks=1, block_length=4)
    output = base.generate(
        **prompts, do_sample=False, max_new_tokens=9, stopping_criteria=[stop], custom_generate=mavis
    )
    expected = base.generate(**prompts, do_sample=False, max_new_tokens=9, stopping_criteria=[StopAfter(stop.token)])
    assert torch.equal(output, expected)
    assert stop.widths == set(range(6, expected.shape[1] + 1))


def test_tokens_are_streamed_once_their_block_is_kept(base: Any, prompts: dict[str, Tensor]) -> None:
    streamer = Collector()
    mavis = MavisBlockwise(make_value_model("a"), num_blocks=3, block_length=4, streamer=streamer)
    torch.manual_seed(0)
    output = base.generate(**prompts, do_sample=True, max_new_tokens=10, custom_generate=mavis)
    assert torch.equal(torch.cat([streamer.parts[0], torch.stack(streamer.parts[1:], dim=1)], dim=1), output)
    assert streamer.ended


def test_the_base_model_runs_once_a_token_and_value_models_at_the_ends_of_blocks(
    base: Any, prompts: dict[str, Tensor]
) -> None:
    value = make_value_model("a")
    calls = {"base": 0, "value": 0}
    base.model.register_forward_hook(lambda *_: calls.update(base=calls["base"] + 1))
    mavis = MavisBlockwise(value, num_blocks=3, block_length=4)
    base.generate(**prompts, do_sample=True, max_new_tokens=8, custom_generate=mavis)  # tries the models
    value.backbone.register_forward_hook(lambda *_: calls.update(value=calls["value"] + 1))
    calls["base"] = 0
    before = make_base().state_dict()
    base.generate(**prompts, do_sample=True, max_new_tokens=12, min_new_tokens=12, custom_generate=mavis)
    assert calls["base"] == 12
    # The value model is tried anew, in three calls; then it runs at the first token and the last of every block.
    assert 6 <= calls["value"] <= 6 + 5
    assert all(torch.equal(a, b) for a, b in zip(before.values(), base.state_dict().values(), strict=True))


@pytest.mark.parametrize("source", ["reference", "tilted"])
def test_damaged_models_are_told(source: Any, base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = MavisBlockwise(make_value_model("a"), num_blocks=2, sample_from=source)
    with pytest.raises(ValueError, match="the base model's scores hold NaN"):
        base.generate(**prompts, do_sample=True, max_new_tokens=5, logits_processor=[Damage()], custom_generate=mavis)
    value = make_value_model("a")
    with torch.no_grad():
        value.head.weight.fill_(torch.nan)
    mavis = MavisBlockwise(value, num_blocks=2, sample_from=source)
    with pytest.raises(ValueError, match="the value function for 'a' gave nan"):
        base.generate(**prompts, do_sample=True, max_new_tokens=5, custom_generate=mavis)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1, got 0"),
        ({"block_length": 0}, "block_length must be a whole number of at least 1, got 0"),
        ({"block_length": 2.5}, "block_length must be a whole number of at least 1, got 2.5"),
        ({"combination": "worst"}, "combination must be one of 'weighted', 'worst-case', got 'worst'"),
        ({"sample_from": "base"}, "sample_from must be one of 'reference', 'tilted', got 'base'"),
        ({"keep": "all"}, "keep must be one of 'sample', 'best', got 'all'"),
        ({"trace": True}, "which no trace can show"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MavisBlockwise(make_value_model("a"), **settings)


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({"num_blocks": 6, "sample_from": "tilted", "top_k": 5}, {}, "there are only 5 candidates"),
        ({"num_blocks": 98}, {}, "there are only 97 candidates"),
        ({"combination": "worst-case", "kl_budget": 0.5}, {}, "kl_budget=0.5 needs weights that are known"),
        ({"combination": "worst-case", "weights": WEIGHTS}, {}, r"finds the weights itself.*got \[0\.\d+, 0\.\d+\]"),
        ({"combination": "worst-case", "weights": [0.0, 0.0]}, {}, "finds the weights itself"),
        ({}, {"output_scores": True}, "returns no scores of single steps: leave output_scores out"),
    ],
)
def test_impossible_calls_are_refused(
    settings: dict[str, Any], call: dict[str, Any], message: str, base: Any, prompts: dict[str, Tensor]
) -> None:
    mavis = MavisBlockwise(make_value_model("a", "b"), **settings)
    with pytest.raises(ValueError, match=message):
        base.generate(**prompts, do_sample=False, max_new_tokens=4, custom_generate=mavis, **call)
