"""Likelihoods of given texts under the steered policy, beside a processor that is asked prefix by prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mavis_logits import MavisLogitsProcessor, MavisSampling
from mavis_logits.decoding.likelihoods import steered_log_probs
from tiny import PAD, functions, make_base

IDS = torch.tensor([[5, 6, 7, 8, 11], [9, 10, 11, 12, 3]])
SETTINGS: list[dict[str, Any]] = [
    {"top_k": 6},
    {"top_k": 6, "unscored": "expected", "normalize": "none"},
    {"top_k": 6, "candidate_min_p": 0.2, "unscored": "keep"},
    {"top_k": None, "normalize": "center", "reference_temperature": 0.7},
    {"top_k": 6, "kl_budget": 0.1},
]


def prefix_by_prefix(base: Any, mavis: MavisLogitsProcessor, ids: torch.Tensor) -> torch.Tensor:
    """[R, T, V] what the processor makes of the scores after every prefix, each read from scratch."""
    steps = []
    for length in range(1, ids.shape[1] + 1):
        own = ids[:, :length]
        with torch.no_grad():
            scores = base(own).logits[:, -1]
        steps.append(torch.log_softmax(mavis(own, scores), dim=-1))
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("which", ["head", "heads"])
def test_every_position_is_steered_as_while_decoding(which: str, settings: dict[str, Any]) -> None:
    base = make_base()
    given = functions(which, base), {"a": 0.7, "b": 0.3}
    beta = {} if "kl_budget" in settings else {"beta": 4.0}
    found = steered_log_probs(MavisSampling(*given, model=base, **beta, **settings), IDS)
    mavis = MavisLogitsProcessor(*given, model=base, pad_token_id=PAD, **beta, **settings)
    expected = prefix_by_prefix(base, mavis, IDS)
    torch.testing.assert_close(found.exp(), expected.exp(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found.exp(), torch.softmax(base(IDS).logits, dim=-1), atol=1e-2)


def test_rows_have_weights_of_their_own_and_padding_is_left_alone() -> None:
    base = make_base()
    head, weights = functions("head", base), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    settings: dict[str, Any] = {"top_k": 6, "normalize": "none", "model": base}
    both = steered_log_probs(MavisSampling(head, weights, 4.0, **settings), IDS)
    for row, own in enumerate(weights):
        alone = steered_log_probs(MavisSampling(head, own, 4.0, **settings), IDS[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    ids, mask = torch.cat([torch.full((2, 2), PAD), IDS], dim=1), torch.ones(2, 7, dtype=torch.long)
    mask[:, :2] = 0
    padded = steered_log_probs(MavisSampling(head, weights, 4.0, **settings), ids, mask)
    plain = torch.log_softmax(base(input_ids=ids, attention_mask=mask).logits, dim=-1)
    torch.testing.assert_close(padded[:, :2], plain[:, :2], atol=1e-5, rtol=1e-5)
    assert (padded[:, 2:] == -torch.inf).any()


def test_what_cannot_be_read_from_states_is_refused() -> None:
    base = make_base()
    for which in ("model", "mixed"):
        with pytest.raises(ValueError, match=r"steered by value heads alone, and .* are value models"):
            steered_log_probs(MavisSampling(functions(which, base), model=base, top_k=6), IDS)
    head = functions("head", base)
    with torch.no_grad():
        head.out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="gave nan"):
        steered_log_probs(MavisSampling(head, model=base, top_k=6), IDS)
