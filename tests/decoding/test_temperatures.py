"""What log pi_ref counts for beside the values follows the temperature that `generate` samples at, whoever tells it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from mavis_logits import MavisBestOfN, MavisLogitsProcessor, MavisSampling
from tiny import PAD, make_base, make_head, make_value_model

TABLE = {"0.5": [0.0, 0.8], "1": [4.0, 2.0]}
AT = {1.0: [4.0, 2.0], 0.75: [2.0, 1.4], 0.5: [0.0, 0.8]}
SETTINGS: dict[str, Any] = {"top_k": 12, "normalize": "none", "unscored": "expected", "beta": 1.0}
WEIGHTS = {"a": 0.7, "b": 0.3}


@pytest.fixture
def base() -> Any:
    return make_base()


@pytest.fixture
def prompts() -> dict[str, Tensor]:
    ids = torch.tensor([[PAD, 5, 6, 7], [8, 9, 10, 11]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def head(base: Any, weight: Any) -> Any:
    found = make_head(base, "a", "b")
    found.config.log_prob_weight = weight
    return found


def written(
    kind: type, base: Any, prompts: dict[str, Tensor], weight: Any, options: dict[str, Any], **more: Any
) -> Tensor:
    """[R, T] what a head with a `log_prob_weight` has written."""
    mavis = kind(head(base, weight), WEIGHTS, model=base, **SETTINGS, **more)
    how = {"custom_generate": mavis} if kind is not MavisLogitsProcessor else {"logits_processor": [mavis]}
    given = options.pop("before", None)
    if given is not None:
        how["logits_processor"] = LogitsProcessorList([*given, *how.get("logits_processor", [])])
    torch.manual_seed(0)
    output: Tensor = base.generate(**prompts, max_new_tokens=12, pad_token_id=PAD, **options, **how)
    return output


CASES: list[tuple[type, dict[str, Any], dict[str, Any], float]] = [
    (kind, {"do_sample": True, "temperature": 0.75, "top_k": 0}, {}, 0.75)
    for kind in (MavisLogitsProcessor, MavisSampling, MavisBestOfN)
]
CASES += [(kind, {"do_sample": False}, {}, 1.0) for kind in (MavisLogitsProcessor, MavisSampling)]  # nothing is sampled
CASES += [
    (MavisLogitsProcessor, {"do_sample": True, "top_k": 0}, {"reference_temperature": 0.75}, 0.75),
    (MavisSampling, {"do_sample": True, "top_k": 0, "temperature": 0.5}, {"reference_temperature": 1.5}, 0.75),
    (MavisLogitsProcessor, {"do_sample": True, "top_k": 0, "before": [TemperatureLogitsWarper(0.5)]}, {}, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_table_is_read_at_the_temperature_of_the_call(base: Any, prompts: dict[str, Tensor], case: int) -> None:
    kind, options, more, temperature = CASES[case]
    own = written(kind, base, prompts, TABLE, dict(options), **more)
    assert torch.equal(own, written(kind, base, prompts, AT[temperature], dict(options), **more))
    others = [at for at in AT if at != temperature]
    assert any(not torch.equal(own, written(kind, base, prompts, AT[at], dict(options), **more)) for at in others)


def test_the_default_temperature_of_the_model_counts(base: Any, prompts: dict[str, Tensor]) -> None:
    base.generation_config.temperature, base.generation_config.do_sample = 0.75, True
    own = written(MavisLogitsProcessor, base, prompts, TABLE, {"top_k": 0})
    assert torch.equal(own, written(MavisLogitsProcessor, base, prompts, AT[0.75], {"top_k": 0}))


def test_one_strategy_follows_call_by_call_and_what_is_set_between(base: Any) -> None:
    mavis = MavisSampling(head(base, TABLE), WEIGHTS, model=base, **SETTINGS)
    for temperature in (1.0, 0.75, 0.5, 0.75):
        expected = torch.tensor(AT[temperature])
        torch.testing.assert_close(mavis.policy_at(temperature).log_prob_weight, expected)
    mavis.weights = {"a": 0.0, "b": 1.0}
    assert mavis.policy_at(0.75).weights.tolist() == [0.0, 1.0]
    mavis.beta = 3.0
    assert float(mavis.policy_at(0.75).beta) == 3.0
    mavis.config = type(mavis.config)(**{**vars(mavis.config), "reference_temperature": 0.75})
    torch.testing.assert_close(mavis.policy.log_prob_weight, torch.tensor(AT[0.75]))


def test_fused_value_models_keep_their_tables() -> None:
    from mavis_logits.values.fused import FusedValueModel
    from tiny import make_adapter

    models = [make_adapter("a", seed=2), make_adapter("b", "c", seed=3), make_adapter("d", seed=4)]
    assert FusedValueModel(models).config.log_prob_weight is None
    models[0].config.log_prob_weight, models[1].config.log_prob_weight = {"0.5": [0.0], "1": [1.0]}, [2.0, 3.0]
    fused = FusedValueModel(models).config
    assert fused.log_prob_weight_at(0.75) == [0.5, 2.0, 3.0, 0.0]


def test_a_value_model_without_weights_asks_for_no_temperature() -> None:
    mavis = MavisLogitsProcessor(make_value_model("a", "b"), pad_token_id=PAD)
    assert not mavis.functions.heed_temperature
    assert mavis._temperature() == 1.0
