"""`MavisTreeSearch`: one simulation is sampling, many find the best text, and every one of them costs one forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mavis_logits import MavisSampling, MavisTreeSearch
from mavis_logits.decoding.strategies.tree import Tree
from mavis_logits.testing import recompute_values
from strategy_checks import ENDS, FULL, WEIGHTS, Collector, Damage, StopAfter, recompute, written
from tiny import PAD, functions, make_adapter, make_base, make_head, make_value_model


@pytest.mark.parametrize("kind", ["model", "head", "mixed", "words and head"])
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("length", [1, 3])
def test_one_simulation_is_sampling(
    length: int, sample: bool, kind: str, base: Any, prompts: dict[str, Tensor]
) -> None:
    value = functions(kind, base)
    outputs = []
    for mavis in (
        MavisSampling(value, WEIGHTS, 3.0, top_k=5),
        MavisTreeSearch(value, WEIGHTS, 3.0, top_k=5, num_simulations=1, block_length=length),
    ):
        torch.manual_seed(0)
        call = {"do_sample": sample, "max_new_tokens": 15, "temperature": 0.8, "repetition_penalty": 1.2}
        outputs.append(base.generate(**prompts, custom_generate=mavis, **call, **FULL))
    assert (outputs[0].sequences[:, -1] == PAD).any()
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].values, outputs[1].values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"candidate_min_p": 0.3}, {"kl_budget": 0.5}, {"normalize": "gap"}, {"top_k": None}, {"beta": torch.ones(3)}],
)
def test_one_simulation_is_sampling_under_every_setting(
    settings: dict[str, Any], base: Any, prompts: dict[str, Tensor]
) -> None:
    value = make_head(base, "a", "b")
    outputs = []
    for mavis in (
        MavisSampling(value, WEIGHTS, **{"top_k": 5, **settings}),
        MavisTreeSearch(value, WEIGHTS, num_simulations=1, **{"top_k": 5, **settings}),
    ):
        torch.manual_seed(0)
        outputs.append(base.generate(**prompts, custom_generate=mavis, do_sample=True, max_new_tokens=10, **FULL))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


@pytest.mark.parametrize("kind", ["model", "head", "mixed", "words and head"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("sample", [True, False])
@torch.no_grad()
def test_sequences_come_with_their_values(
    sample: bool, length: int, kind: str, base: Any, prompts: dict[str, Tensor]
) -> None:
    mavis = MavisTreeSearch(functions(kind, base), WEIGHTS, 1.0, num_simulations=4, block_length=length, top_k=4)
    returned = 2 if sample else 1
    call = {"do_sample": sample, "max_new_tokens": 9, "num_return_sequences": returned}
    torch.manual_seed(0)
    output = base.generate(**prompts, custom_generate=mavis, **call, **FULL)
    assert len(output.sequences) == 3 * returned
    assert (output.sequences[:, -1] == PAD).any()
    for row, sequence in enumerate(output.sequences):
        values = recompute(mavis, base, written(sequence, prompts["input_ids"].shape[1]))
        torch.testing.assert_close(output.values[row], values, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(output.sequences_scores[row], values @ mavis.weights, atol=1e-3, rtol=1e-3)
    torch.manual_seed(0)
    assert torch.equal(base.generate(**prompts, custom_generate=mavis, **call, **FULL).sequences, output.sequences)


def enumerate_best(base: Any, value: Any, prompt: list[int], k: int, length: int) -> list[int]:
    """The most valuable of all texts of `length` tokens made of candidates."""
    texts = [list(prompt)]
    for _ in range(length):
        texts = [
            [*text, token]
            for text in texts
            for token in base(torch.tensor([text])).logits[0, -1].topk(k).indices.tolist()
        ]
    return max(texts, key=lambda text: float(recompute_values(value, text[:-1], torch.tensor(text[-1:]))))


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_many_simulations_find_the_best_of_all_texts(seed: int, prompts: dict[str, Tensor]) -> None:
    base, value = make_base(seed=seed), make_value_model("a", seed=seed + 10)
    # Priors are nearly equal, so that the search gets everywhere soon.
    mavis = MavisTreeSearch(value, beta=0.5, reference_temperature=20.0, top_k=3, num_simulations=3000)
    output = base.generate(**prompts, do_sample=False, max_new_tokens=2, eos_token_id=96, custom_generate=mavis)
    for row, (ids, mask) in enumerate(zip(prompts["input_ids"], prompts["attention_mask"], strict=True)):
        prompt = ids[mask.bool()].tolist()
        best = enumerate_best(base, value, prompt, 3, 2)
        assert 96 not in best
        assert output[row, -2:].tolist() == best[-2:]


@pytest.mark.parametrize("kind", ["model", "head"])
@pytest.mark.parametrize("length", [1, 2])
def test_a_row_of_a_batch_searches_as_it_does_alone(
    length: int, kind: str, base: Any, prompts: dict[str, Tensor]
) -> None:
    value = functions(kind, base)
    weights, beta = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), torch.tensor([0.5, 1.0, 2.0])
    settings: Any = {"num_simulations": 6, "block_length": length, "top_k": 5}
    call: Any = {"do_sample": False, "max_new_tokens": 7, "min_new_tokens": 3, "no_repeat_ngram_size": 2}
    together = base.generate(
        **prompts, custom_generate=MavisTreeSearch(value, weights, beta, **settings), eos_token_id=ENDS, **call
    )
    for row in range(3):
        ids = prompts["input_ids"][row : row + 1, prompts["attention_mask"][row].bool()]
        mavis = MavisTreeSearch(value, weights[row], float(beta[row]), **settings)
        alone = base.generate(ids, custom_generate=mavis, eos_token_id=ENDS, **call)
        assert written(together[row], 5)[ids.shape[1] :] == alone[0, ids.shape[1] :].tolist()


def test_fused_value_models(base: Any, prompts: dict[str, Tensor]) -> None:
    outputs = []
    for fuse in (True, False):
        adapters = [make_adapter("a", seed=2), make_adapter("b", seed=3)]
        mavis = MavisTreeSearch(adapters, fuse=fuse, num_simulations=5, top_k=5)
        outputs.append(base.generate(**prompts, do_sample=False, max_new_tokens=6, custom_generate=mavis, **FULL))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].values, outputs[1].values, atol=1e-3, rtol=1e-3)


class Watched(MavisTreeSearch):
    """Counts the base model's forward passes in every simulation, and keeps the trees."""

    def decode(self, session: Any, *args: Any) -> Any:
        self.forwards: list[int] = []
        hook = session.model.model.register_forward_hook(lambda *_: self.count())
        try:
            return super().decode(session, *args)
        finally:
            hook.remove()

    def count(self) -> None:
        self.forwards[-1] += 1

    def _simulate(self, session: Any, trees: list[Tree], *args: Any) -> None:
        self.trees = trees
        self.forwards.append(0)
        super()._simulate(session, trees, *args)


def test_every_simulation_is_one_forward_of_the_batch(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = Watched(make_value_model("a"), num_simulations=7, top_k=5)
    call: Any = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    base.generate(**prompts, custom_generate=mavis, **call)
    assert len(mavis.forwards) == 7 * 12
    assert mavis.forwards[:12] == [1] * 12  # no tree is deeper than it has had simulations: no end is in reach
    assert sum(mavis.forwards) < 7 * 12


def test_blocks_are_written_in_as_many_forwards_as_they_have_tokens(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = Watched(make_value_model("a"), num_simulations=4, block_length=3, top_k=5)
    base.generate(**prompts, custom_generate=mavis, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    assert mavis.forwards[:4] == [1, 3, 3, 3]  # the prompt, and three blocks


def test_texts_that_end_cost_no_forward(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = Watched(make_value_model("a"), num_simulations=7, top_k=5)
    base.generate(**prompts, custom_generate=mavis, do_sample=False, max_new_tokens=1)
    assert mavis.forwards == [1, 0, 0, 0, 0, 0, 0]


def test_stopping_criteria_end_texts(base: Any, prompts: dict[str, Tensor]) -> None:
    """They see texts as `generate` has them, and end what is looked at as well as what is written."""
    value = make_value_model("a")
    plain = base.generate(**prompts, custom_generate=MavisSampling(value, top_k=5), do_sample=False, max_new_tokens=9)
    stop = StopAfter(int(plain[0, 6]))
    call: Any = {"do_sample": False, "max_new_tokens": 9, "stopping_criteria": [stop]}
    expected = base.generate(**prompts, custom_generate=MavisSampling(value, top_k=5), **call)
    assert (expected[0, 7:] == PAD).all()
    one = MavisTreeSearch(value, top_k=5, num_simulations=1)
    assert torch.equal(base.generate(**prompts, custom_generate=one, **call), expected)
    stop.widths.clear()
    base.generate(**prompts, custom_generate=MavisTreeSearch(value, top_k=5, num_simulations=20), **call)
    assert stop.widths == set(range(6, 15))


@pytest.mark.parametrize("length", [1, 3])
def test_tokens_are_streamed_once_all_rows_have_decided(length: int, base: Any, prompts: dict[str, Tensor]) -> None:
    streamer = Collector()
    mavis = MavisTreeSearch(
        make_value_model("a"), beta=1.0, num_simulations=4, block_length=length, top_k=5, streamer=streamer
    )
    torch.manual_seed(0)
    output = base.generate(**prompts, custom_generate=mavis, do_sample=True, max_new_tokens=12, eos_token_id=ENDS)
    assert (output[:, -1] == PAD).any()
    assert torch.equal(torch.cat([streamer.parts[0], torch.stack(streamer.parts[1:], dim=1)], dim=1), output)
    assert streamer.ended


def test_damaged_models_are_told(base: Any, prompts: dict[str, Tensor]) -> None:
    value = make_value_model("a")
    call: Any = {"max_new_tokens": 4, "custom_generate": MavisTreeSearch(value, num_simulations=2, top_k=5)}
    with pytest.raises(ValueError, match="the base model's scores hold NaN"):
        base.generate(**prompts, logits_processor=[Damage()], **call)
    with torch.no_grad():
        value.head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the value function for 'a' gave nan"):
        base.generate(**prompts, **call)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_simulations": 0}, "num_simulations must be a whole number of at least 1, got 0"),
        ({"block_length": -1}, "block_length must be a whole number of at least 1, got -1"),
        ({"c_puct": -0.1}, "c_puct must be a finite number of at least 0, got -0.1"),
        ({"c_puct": float("nan")}, "c_puct must be a finite number of at least 0, got nan"),
        ({"trace": True}, "which no trace can show"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MavisTreeSearch(make_value_model("a"), **settings)


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({"unscored": "keep"}, {}, 'unscored="keep" also samples tokens that have no value'),
        ({}, {"output_logits": True}, "returns no scores of single steps: leave output_logits out"),
    ],
)
def test_impossible_calls_are_refused(
    settings: dict[str, Any], call: dict[str, Any], message: str, base: Any, prompts: dict[str, Tensor]
) -> None:
    mavis = MavisTreeSearch(make_value_model("a"), **settings)
    with pytest.raises(ValueError, match=message):
        base.generate(**prompts, max_new_tokens=4, custom_generate=mavis, **call)
