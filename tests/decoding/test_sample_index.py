"""Drawing an index by inverting the cumulative distribution, against the sum over all of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits.decoding.strategies.sampling import _first_above, sample_index


@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_it_draws_what_one_running_sum_would(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.log_softmax(4 * torch.randn(8, count, generator=generator, dtype=torch.float64), dim=1)
    log_probs[torch.rand(8, count, generator=generator) < 0.5] = -torch.inf
    log_probs[:, 0] = -1.0
    drawn = sample_index(log_probs, torch.Generator().manual_seed(seed))
    uniform = torch.rand(8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cumulative = log_probs.exp().cumsum(dim=1)
    expected = (cumulative <= uniform * cumulative[:, -1:]).sum(dim=1)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rounding_draws_what_has_no_probability(share: float, dtype: torch.dtype) -> None:
    probability = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1e-30, 0.0, 0.0]], dtype=dtype)
    index, _ = _first_above(probability.cumsum(dim=1), torch.full((2, 1), share, dtype=dtype))
    assert probability.gather(1, index[:, None]).gt(0).all()


@pytest.mark.parametrize("count", [40, 1111])
def test_frequencies_are_the_probabilities(count: int) -> None:
    torch.manual_seed(0)
    probability = torch.softmax(torch.randn(count), dim=0)
    drawn = sample_index(probability.log().expand(20000, -1), dtype=torch.float32)
    observed, expected = torch.bincount(drawn, minlength=count), 20000 * probability
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < count - 1 + 4 * (2 * (count - 1)) ** 0.5
