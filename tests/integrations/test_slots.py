"""Rows of many requests steered in one batch: each as by itself, whatever the order, and nothing else touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits.core.config import MavisConfig
from mavis_logits.integrations.asked import Asked
from mavis_logits.integrations.slots import Rows, Slots, Wanted, head_values
from mavis_logits.steering.policy import Policy
from mavis_logits.steering.step import Choice
from mavis_logits.values.ensemble import ValueFunctions
from mavis_logits.values.value_head import ValueHead, ValueHeadConfig

V, D, EOS, S = 97, 8, 1, 8


class Settings:
    """What `Slots` needs of an offer."""

    scale = torch.tensor([2.0, 0.5])

    def policy(
        self, config: MavisConfig, weights: torch.Tensor, beta: torch.Tensor, log_prob_weight: torch.Tensor
    ) -> Policy:
        return Policy(config, weights, beta, self.scale, log_prob_weight)


def make_functions() -> ValueFunctions:
    torch.manual_seed(0)
    nat = {"0.5": [0.1, -0.05], "1": [0.2, -0.1]}
    head = ValueHead(ValueHeadConfig(D, D, V, 16, objectives=["kind", "short"], layer=1, log_prob_weight=nat)).eval()
    torch.nn.init.normal_(head.out.weight)
    return ValueFunctions(head.bind_embedding(torch.randn(V, D)))


FUNCTIONS = make_functions()
BUSY = [False] * len(FUNCTIONS.objectives)  # none is idle
CONFIGS = [
    MavisConfig(top_k=10),
    MavisConfig(top_k=5, normalize="standard"),
    MavisConfig(top_k=7, kl_budget=0.4, candidate_min_p=0.05),
    MavisConfig(top_k=None, normalize="none", reference_temperature=0.7),
    MavisConfig(top_k=6, unscored="keep", normalize="center"),
]


def make_slots() -> Slots:
    return Slots(S, FUNCTIONS, Settings(), [EOS])  # type: ignore[arg-type]


def request(number: int, seed: int = 0) -> Asked:
    weights = torch.rand(2, generator=torch.Generator().manual_seed(seed))
    return Asked(CONFIGS[number % len(CONFIGS)], weights, 1.0 + seed)


def steer(slots: Slots, logits: torch.Tensor, states: torch.Tensor, of: list[int], functions=FUNCTIONS) -> torch.Tensor:
    result = logits.clone()
    present = list(dict.fromkeys(of))
    rows = Rows(torch.tensor(of, dtype=torch.int32), present, one_each=len(of) == len(present))

    def read(wanted: Wanted) -> torch.Tensor:
        return head_values(functions, {1: states if wanted.rows is None else states[wanted.rows]}, wanted)

    slots.steer(result, rows, read)
    return result


def alone(asked: Asked | None, logits: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The slow twin: one row, by a policy of its own."""
    if asked is None:
        return logits
    nat = FUNCTIONS.log_prob_weights(asked.config.reference_temperature * asked.temperature)
    policy = Settings().policy(asked.config, asked.weights, torch.tensor(asked.beta), nat)

    def read(choice: Choice, _: torch.Tensor) -> torch.Tensor:
        return head_values(FUNCTIONS, {1: state[None]}, Wanted(None, choice, asked.config, BUSY))

    step = policy.step(logits[None], read)
    return step.log_probs(V)[0]


@given(st.data())
def test_every_row_is_steered_as_if_it_were_alone(data: st.DataObject) -> None:
    slots, asked = make_slots(), {}
    for slot in range(S):
        number = data.draw(st.integers(-1, 4))
        asked[slot] = None if number < 0 else request(number, data.draw(st.integers(0, 5)))
        slots.put(slot, asked[slot])
    of = data.draw(st.lists(st.integers(0, S - 1), min_size=1, max_size=12))  # slots again: rows of drafts
    torch.manual_seed(data.draw(st.integers(0, 99)))
    logits, states = 3 * torch.randn(len(of), V), torch.randn(len(of), D)
    logits[torch.rand(len(of), V) < 0.3] = -torch.inf  # a grammar
    logits[:, EOS] = 0.0
    result = steer(slots, logits, states, of)
    for row, slot in enumerate(of):
        expected = alone(asked[slot], logits[row], states[row])
        if asked[slot] is None:
            assert torch.equal(result[row], expected)
        else:
            # A budget near all that few candidates can spend leaves beta's last digits to rounding, and these are
            # multiplied by values: what is never drawn, at -131, then moves.
            drawn = [each.clamp(min=-40.0) for each in (result[row], expected)]
            assert torch.allclose(*drawn, rtol=1e-4, atol=1e-5)
            assert torch.equal(torch.isneginf(result[row]), torch.isneginf(expected))
        assert torch.isneginf(result[row][torch.isneginf(logits[row])]).all()  # no forbidden token is lifted


def test_a_slot_used_again_has_nothing_of_the_request_before() -> None:
    slots, logits, states = make_slots(), torch.randn(1, V), torch.randn(1, D)
    slots.put(3, request(0, 4))
    assert not torch.equal(steer(slots, logits, states, [3]), logits)
    slots.put(3, None)
    assert torch.equal(steer(slots, logits, states, [3]), logits)
    slots.put(3, request(1, 2))
    assert torch.allclose(steer(slots, logits, states, [3])[0], alone(request(1, 2), logits[0], states[0]), atol=1e-5)


@pytest.mark.parametrize("swap", [True, False])
def test_requests_that_move_take_their_settings_along(swap: bool) -> None:
    slots, logits, states = make_slots(), torch.randn(2, V), torch.randn(2, D)
    slots.put(0, request(0, 1))
    slots.put(5, request(2, 3))
    slots.move(0, 5, swap=swap)
    result = steer(slots, logits, states, [5, 0])
    assert torch.allclose(result[0], alone(request(0, 1), logits[0], states[0]), atol=1e-5)
    assert torch.allclose(result[1], alone(request(2, 3) if swap else None, logits[1], states[1]), atol=1e-5)


def test_values_that_are_no_numbers_end_only_the_rows_they_steer() -> None:
    slots, logits, states = make_slots(), torch.randn(3, V), torch.randn(3, D)
    for slot in range(2):
        slots.put(slot, request(0, slot))
    states[1] = torch.nan
    result = steer(slots, logits, states, [0, 1, 2])
    assert torch.allclose(result[0], alone(request(0, 0), logits[0], states[0]), atol=1e-5)
    assert torch.isfinite(result[1]).nonzero().flatten().tolist() == [EOS]
    assert torch.equal(result[2], logits[2])
    assert slots.counters.ended == 1
    assert slots.counters.kl == pytest.approx(slots.counters.kl)  # no NaN among the totals


def test_values_that_a_row_does_not_weigh_cannot_harm_it() -> None:
    slots, logits, states = make_slots(), torch.randn(2, V), torch.randn(2, D)
    head = make_functions().heads[0]
    with torch.no_grad():
        head.out.bias[1] = torch.nan  # of "short"
    kind = Asked(CONFIGS[0], torch.tensor([1.0, 0.0]), 2.0)
    slots.put(0, kind)
    slots.put(1, request(0))
    result = steer(slots, logits, states, [0, 1], ValueFunctions(head))
    assert torch.allclose(result[0], alone(kind, logits[0], states[0]), atol=1e-5)
    assert torch.isfinite(result[1]).nonzero().flatten().tolist() == [EOS]


def test_a_row_that_may_not_end_is_left_as_it_is() -> None:
    slots, logits = make_slots(), torch.randn(1, V)
    slots.put(0, request(0))
    logits[0, EOS] = -torch.inf
    assert torch.equal(steer(slots, logits, torch.full((1, D), torch.nan), [0]), logits)


def test_scores_that_are_no_numbers_are_the_engines_concern() -> None:
    slots, logits = make_slots(), torch.randn(2, V)
    logits[0, 5] = torch.nan
    logits[1] = -torch.inf
    for slot in range(2):
        slots.put(slot, request(0))
    result = steer(slots, logits, torch.randn(2, D), [0, 1])
    assert torch.equal(result.isnan(), logits.isnan())
    assert torch.isneginf(result[1]).all()
    assert slots.counters.ended == 0


def test_a_refused_request_ends() -> None:
    slots, logits = make_slots(), torch.randn(2, V)
    slots.refuse(1)
    result = steer(slots, logits, torch.randn(2, D), [0, 1])
    assert torch.equal(result[0], logits[0])
    assert torch.isfinite(result[1]).nonzero().flatten().tolist() == [EOS]


def test_requests_that_differ_in_the_temperature_they_are_sampled_at_are_not_mixed_up() -> None:
    slots, logits, states = make_slots(), torch.randn(2, V), torch.randn(2, D)
    asked = [replace(request(3), temperature=temperature) for temperature in (1.0, 0.5)]
    for slot, one in enumerate(asked):
        slots.put(slot, one)
    result = steer(slots, logits, states, [0, 1])
    for row, one in enumerate(asked):
        assert torch.allclose(result[row], alone(one, logits[row], states[row]), atol=1e-5)
    assert not torch.allclose(result[1], alone(asked[0], logits[1], states[1]), atol=1e-3)


def test_settings_that_nobody_has_any_more_are_forgotten() -> None:
    slots = make_slots()
    for number in range(1000):
        slots.put(number % S, replace(request(0), config=MavisConfig(top_k=1 + number)))
    assert len(slots._configs) <= S
    logits, states = torch.randn(S, V), torch.randn(S, D)
    result = steer(slots, logits, states, list(range(S)))
    for row in range(S):
        own = replace(request(0), config=MavisConfig(top_k=1 + 1000 - S + row))
        assert torch.allclose(result[row], alone(own, logits[row], states[row]), atol=1e-5)


def test_what_only_a_device_knows_is_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the rows of drafts are not counted on the host: all rows are computed, and masked."""
    slots, logits, states = make_slots(), torch.randn(5, V), torch.randn(5, D)
    for slot, number in ((0, 0), (2, 1)):
        slots.put(slot, request(number, slot))
    of = [2, 2, 0, 1, 1]
    expected = steer(slots, logits, states, of)
    rows_of = Slots._rows_of

    def as_on_a_gpu(self, group, rows, device):
        chosen, mask = rows_of(self, group, rows, device)
        if chosen is None or rows.one_each:
            return chosen, mask
        return None, torch.zeros(len(rows.slots), dtype=torch.bool).index_fill(0, chosen, True)

    monkeypatch.setattr(Slots, "_rows_of", as_on_a_gpu)
    assert torch.allclose(steer(slots, logits, states, of), expected, atol=1e-6)


def test_totals_are_counted() -> None:
    slots, logits, states = make_slots(), torch.randn(2, V), torch.randn(2, D)
    steer(slots, logits, states, [0, 1])
    slots.put(1, request(0))
    steer(slots, logits, states, [0, 1])
    counted = slots.counters
    assert (counted.steps, counted.skipped, counted.rows, counted.ended) == (1, 1, 1, 0)
    assert counted.kl > 0
    assert counted.seconds > 0
