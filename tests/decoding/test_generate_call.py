"""What `generate` keeps from a strategy: streamers, assistants, ranks that wait for each other."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MaxLengthCriteria, PreTrainedModel, TextIteratorStreamer

from mavis_logits import MavisBestOfN, MavisBlockwise, MavisSampling
from mavis_logits.decoding.strategies.arguments import arguments_of_call
from strategy_checks import Collector, letter_tokenizer
from tiny import PAD, make_base, make_value_model

IDS = torch.tensor([[5, 6, 7, 8]])
CALL: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD}


def strategy(kind: type = MavisSampling, **settings: Any) -> Any:
    return kind(make_value_model("a"), **{"beta": 2.0, "top_k": 6} | settings)


@pytest.mark.parametrize("kind", [MavisSampling, MavisBlockwise])
def test_a_streamer_given_to_generate_gets_the_text_and_its_end(base: PreTrainedModel, kind: type) -> None:
    own, given = Collector(), Collector()
    first = base.generate(IDS, **CALL, custom_generate=strategy(kind, streamer=own))
    steer = strategy(kind, trace=True) if kind is MavisSampling else strategy(kind)
    second = base.generate(IDS, **CALL, streamer=given, custom_generate=steer)
    assert torch.equal(first, second)
    assert given.ended
    assert [part.tolist() for part in given.parts] == [part.tolist() for part in own.parts]
    assert steer.streamer is None
    if steer.trace is not None:
        assert len(steer.trace.steps) == 4
    again = Collector()
    base.generate(IDS, **CALL, streamer=again, custom_generate=steer)
    assert len(again.parts) == len(given.parts) == 5
    base.generate(IDS, **CALL, custom_generate=steer)
    assert len(again.parts) == 5


@pytest.mark.parametrize("how", ["own", "given"])
def test_settings_changed_by_a_streamer_count_from_the_next_token(base: PreTrainedModel, how: str) -> None:
    steer = strategy()

    class Turned(Collector):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.parts) == 3:  # the prompt and two tokens
                steer.weights = [-15.0]

    call = {**CALL, "max_new_tokens": 8}
    whole = base.generate(IDS, **call, custom_generate=strategy())
    if how == "own":
        steer.streamer = Turned()
        found = base.generate(IDS, **call, custom_generate=steer)
    else:
        found = base.generate(IDS, **call, streamer=Turned(), custom_generate=steer)
    expected = base.generate(whole[:, :6], **{**call, "max_new_tokens": 6}, custom_generate=strategy(weights=[-15.0]))
    assert torch.equal(found, expected)
    assert not torch.equal(found, whole)


def test_whoever_iterates_over_the_streamer_is_not_left_waiting(base: PreTrainedModel) -> None:
    streamer = TextIteratorStreamer(letter_tokenizer(), skip_prompt=True, timeout=30)
    steer = strategy()
    call = {**CALL, "streamer": streamer, "custom_generate": lambda model, ids, **kwargs: steer(model, ids, **kwargs)}
    thread = threading.Thread(target=base.generate, args=(IDS,), kwargs=call)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == letter_tokenizer().decode(base.generate(IDS, **CALL, custom_generate=strategy())[0, 4:])


def test_threads_with_streamers_of_their_own_share_a_strategy(base: PreTrainedModel) -> None:
    steer, streamers = strategy(), [Collector() for _ in range(3)]
    prompts = [torch.tensor([[5 + 7 * i, 6, 9]]) for i in range(3)]
    threads = [
        threading.Thread(
            target=base.generate, args=(prompt,), kwargs={**CALL, "streamer": streamer, "custom_generate": steer}
        )
        for prompt, streamer in zip(prompts, streamers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, streamer in zip(prompts, streamers, strict=True):
        expected = base.generate(prompt, **CALL, custom_generate=strategy())
        assert torch.cat([part.reshape(-1) for part in streamer.parts]).tolist() == expected[0].tolist()


def test_streamers_that_cannot_be_served_are_refused(base: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"MavisBestOfN knows the text only at its end .*leave streamer out"):
        base.generate(IDS, **CALL, streamer=Collector(), custom_generate=strategy(MavisBestOfN, num_samples=1))
    with pytest.raises(ValueError, match="generate was given a streamer and MavisSampling another"):
        base.generate(IDS, **CALL, streamer=Collector(), custom_generate=strategy(streamer=Collector()))


def test_an_assistant_and_waiting_ranks_are_refused(base: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"MavisSampling does not support assistant_model .*MavisLogitsProcessor"):
        base.generate(IDS, **CALL, assistant_model=make_base(seed=3), custom_generate=strategy())
    with pytest.raises(ValueError, match=r"does not support synced_gpus .*MavisLogitsProcessor"):
        base.generate(IDS, **CALL, synced_gpus=True, custom_generate=strategy())


def test_only_the_call_of_the_model_that_asks_counts(base: PreTrainedModel) -> None:
    other, outer, found = make_base(seed=4), Collector(), []

    def nested(model: Any, input_ids: Any, **kwargs: Any) -> Any:
        found.extend([arguments_of_call(model), arguments_of_call(other)])
        return base.generate(input_ids, **CALL, custom_generate=strategy())  # has no streamer of its own

    inner = base.generate(IDS, **CALL, streamer=outer, custom_generate=nested)
    assert found == [{"streamer": outer}, {}]
    assert len(outer.parts) == 1, "the prompts, put by generate itself"
    assert not outer.ended
    assert torch.equal(inner, base.generate(IDS, **CALL, custom_generate=strategy()))
    assert arguments_of_call(base) == {}


def test_a_strategy_called_by_hand_needs_no_generate(base: PreTrainedModel) -> None:
    expected = base.generate(IDS, **CALL, custom_generate=strategy())
    config = base.generation_config
    config.update(do_sample=False)
    assert torch.equal(strategy()(base, IDS, stopping_criteria=[MaxLengthCriteria(8)]), expected)


def test_a_cache_to_be_filled_is_refused(base: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"keeps caches of its own .*leave it out"):
        base.generate(IDS, **CALL, past_key_values=DynamicCache(), custom_generate=strategy())
