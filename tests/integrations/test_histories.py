"""Value models in a server: whatever becomes of requests, values are those of reading each text anew."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mavis_logits.integrations.histories import Histories
from mavis_logits.scoring.reader import ValueReader
from mavis_logits.values.ensemble import ValueFunctions
from tiny import VOCABULARY, make_base, make_head, make_value_model

K = 5


@pytest.fixture(scope="module")
def functions() -> ValueFunctions:
    return ValueFunctions([make_value_model("a", "b"), make_value_model("c", seed=4, architecture="gpt2")])


def anew(functions: ValueFunctions, texts, candidates) -> torch.Tensor:
    """The slow twin: every text by itself, read from its beginning."""
    rows = []
    for text, own in zip(texts, candidates, strict=True):
        reader = ValueReader(functions)
        reader.begin(1)
        rows.append(reader.values(torch.tensor(text)[None], [len(text)], {}, own[None]))
    return torch.cat(rows)


def life(rng: random.Random, steps: int):
    """The texts that have rows, step by step: requests come, go, are put aside, resumed, reordered and draft ahead."""
    texts: dict[int, list[int]] = {}
    number = 0
    for _ in range(steps):
        while len(texts) < 2 or rng.random() < 0.4:
            texts[number] = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 9))]
            number += 1
        if len(texts) > 2 and rng.random() < 0.3:
            del texts[rng.choice(list(texts))]
        present = [one for one in texts if rng.random() < 0.8] or list(texts)  # the others wait
        rng.shuffle(present)
        rows = []
        for one in present:
            texts[one].append(rng.randrange(3, VOCABULARY))
            drafts = [rng.randrange(3, VOCABULARY) for _ in range(rng.choice([0, 0, 2]))]
            rows += [np.array(texts[one] + drafts[:end]) for end in range(len(drafts) + 1)]
        yield rows


@pytest.mark.parametrize("room", [1 << 16, 60, 1], ids=["room for all", "room for some", "no room"])
@torch.no_grad()
def test_values_are_those_of_texts_read_anew(functions: ValueFunctions, room: int) -> None:
    histories, rng = Histories(functions, room), random.Random(0)
    for texts in life(rng, 12):
        candidates = torch.stack([torch.randperm(VOCABULARY)[:K] for _ in texts])
        found = histories.values("all", texts, {}, candidates)
        assert torch.allclose(found, anew(functions, texts, candidates), atol=1e-4)


@torch.no_grad()
def test_caches_stay_within_their_room_and_the_oldest_goes_first(functions: ValueFunctions) -> None:
    histories = Histories(functions, 100)
    texts, candidates = [np.arange(3, 23)], torch.arange(K)[None]
    for key in "abcd":
        histories.values(key, texts, {}, candidates)
        assert histories.tokens <= 100
    assert list(histories._kept) == ["b", "c", "d"]
    histories.values("b", texts, {}, candidates)
    histories.values("e", texts, {}, candidates)
    assert list(histories._kept) == ["d", "b", "e"]


@torch.no_grad()
def test_the_cache_is_used(functions: ValueFunctions, monkeypatch: pytest.MonkeyPatch) -> None:
    histories, fed = Histories(functions, 1 << 16), []
    values = ValueReader.values

    def watch(self, *given, **named):
        fed.append(sum(given[1]) - sum(scorer.lengths[0] for scorer in list(self._scorers.values())[:1]))
        return values(self, *given, **named)

    monkeypatch.setattr(ValueReader, "values", watch)
    text = list(range(3, 40))
    for _ in range(4):
        histories.values("all", [np.array(text)], {}, torch.arange(3, 3 + K)[None])
        text.append(4)  # one of the candidates
    assert fed[0] == 37
    assert fed[1:] == [0, 0, 0]


@torch.no_grad()
def test_a_text_too_long_for_a_value_model_has_no_values() -> None:
    model = make_value_model("a", architecture="gpt2")
    histories = Histories(ValueFunctions(model), 1 << 20)
    limit = model.backbone.config.n_positions
    texts = [np.full(limit, 5), np.arange(3, 9)]
    candidates = torch.arange(K).expand(2, -1)
    found = histories.values("all", texts, {}, candidates)
    assert found[0].isnan().all()
    assert torch.allclose(found[1:], anew(ValueFunctions(model), texts[1:], candidates[1:]), atol=1e-4)


@torch.no_grad()
def test_heads_and_value_models_together() -> None:
    base = make_base()
    head = make_head(base, "kind")
    functions = ValueFunctions([make_value_model("a"), head])
    states, candidates = {None: torch.randn(2, 32)}, torch.arange(K).expand(2, -1)
    texts = [np.arange(3, 9), np.arange(3, 5)]
    found = Histories(functions, 40).values("all", texts, states, candidates)
    assert torch.allclose(found[..., 1:], head(states[None], candidates), atol=1e-5)
    assert torch.allclose(found[..., :1], anew(ValueFunctions(functions.models), texts, candidates), atol=1e-4)
