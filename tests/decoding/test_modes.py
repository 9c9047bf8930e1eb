"""Values are those of the value function as it now is, whatever the modes in which it was made, cached and called."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mavis_logits import (
    MavisBeamSearch,
    MavisBestOfN,
    MavisBlockwise,
    MavisLogitsProcessor,
    MavisSampling,
    ValueHead,
    ValueModel,
)
from mavis_logits.backbone.watch import Watch
from tiny import EOS, PAD, make_adapter, make_base, make_head, make_value_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
SETTINGS: dict[str, Any] = {"top_k": 6, "pad_token_id": PAD, "eos_token_id": EOS}
Context = Callable[[], AbstractContextManager[Any]]
MODES: dict[str, Context] = {
    "plain": nullcontext,
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
}


def write(base: Any, *processors: Any, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD, "attention_mask": torch.ones_like(ids)}
    return base.generate(ids, logits_processor=list(processors), **settings | arguments).clone()


def functions(kind: str, base: Any) -> Any:
    if kind == "model":
        return make_value_model("a")
    if kind == "head":
        return make_head(base, "a")
    if kind == "whole head":
        return make_head(base, "a", layer=1)
    return [make_adapter("a", seed=2), make_adapter("b", seed=3)]


KINDS = ["model", "head", "whole head", "adapters"]


def steer(given: Any, base: Any, kind: str = "") -> MavisLogitsProcessor:
    return MavisLogitsProcessor(
        given, beta=6.0, model=base, **SETTINGS | ({"top_k": None} if kind == "whole head" else {})
    )


# Modes of calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("then", ["plain", "inference"])
def test_a_text_begun_in_one_mode_goes_on_in_another(kind: str, first: str, then: str) -> None:
    base = make_base()
    given = functions(kind, base)
    mavis = steer(given, base, kind)
    with MODES[first]():
        once = write(base, mavis)
    with MODES[then]():
        again = write(base, mavis, ids=once)
    assert torch.equal(again, write(base, steer(given, base, kind), ids=once))


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "then"), [(autocast, nullcontext), (nullcontext, autocast), (autocast, autocast)])
def test_autocast_comes_and_goes(kind: str, first: Context, then: Context) -> None:
    base = make_base()
    given = functions(kind, base)
    mavis = steer(given, base, kind)
    with first():
        once = write(base, mavis)
    with then():
        again = write(base, mavis, ids=once)
        fresh = write(base, steer(given, base, kind), ids=once)
    assert torch.equal(again, fresh)


def test_a_heads_table_is_of_its_own_dtype_whatever_the_mode() -> None:
    base = make_base()
    head = make_head(base, "a")
    states, candidates = torch.randn(2, 32), torch.tensor([[3, 4], [5, 6]])
    expected = make_head(base, "a")(states, candidates)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        head(states, candidates)
    torch.testing.assert_close(head(states, candidates), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["model", "head"])
def test_what_was_cached_under_inference_mode_does_not_hinder_training(kind: str) -> None:
    base = make_base()
    function = functions(kind, base)
    with torch.inference_mode():
        write(base, steer(function, base))
        if kind == "head":
            function(torch.randn(2, 32))
    function.train()
    values = function(IDS).values if kind == "model" else function(torch.randn(2, 32), IDS)
    values.sum().backward()
    if kind == "head":
        function.zero_grad()
        function(torch.randn(2, 32)).sum().backward()
    assert any(p.grad is not None for p in function.parameters())


# Changes of value functions between calls


def follow(given: Any, base: Any, change: Callable[[Any], object], kind: str = "") -> None:
    """After `change`, a text is gone on with as a fresh processor would, and not as before."""
    mavis = steer(given, base, kind)
    once = write(base, mavis)
    before = write(base, steer(given, base, kind), ids=once, max_new_tokens=12)
    change(given)
    again = write(base, mavis, ids=once, max_new_tokens=12)
    assert torch.equal(again, write(base, steer(given, base, kind), ids=once, max_new_tokens=12))
    assert not torch.equal(again, before), "the change makes no difference"


@torch.no_grad()
def in_place(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.roll(1, 0))


def by_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data.copy_(parameter.roll(1, 0))


def new_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.roll(1, 0)


@torch.no_grad()
def load(module: nn.Module) -> None:
    module.load_state_dict({name: -tensor for name, tensor in module.state_dict().items()})


def replaced(model: ValueModel) -> None:
    model.backbone = make_value_model("a", seed=7).backbone


def an_optimizer_step(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=5.0)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    module.zero_grad()


@pytest.mark.parametrize("change", [in_place, by_data, new_data, load, replaced, an_optimizer_step])
def test_changed_weights_of_a_value_model_are_followed(change: Callable[[Any], object]) -> None:
    follow(make_value_model("a"), make_base(), change)


@pytest.mark.parametrize("change", [in_place, by_data, new_data, load, an_optimizer_step])
@pytest.mark.parametrize("kind", ["head", "whole head"])
def test_changed_weights_of_a_head_are_followed(kind: str, change: Callable[[Any], object]) -> None:
    base = make_base()
    follow(functions(kind, base), base, change, kind)


@pytest.mark.parametrize("change", [in_place, by_data])
def test_changed_weights_are_followed_in_the_midst_of_a_text(change: Callable[[Any], object]) -> None:
    """A call a token, each of which looks like the next step of the same call."""
    base, model = make_base(), make_value_model("a")
    mavis = steer(model, base)
    ids = IDS
    for step in range(6):
        if step == 3:
            change(model)
        expected = write(base, steer(model, base), ids=ids, max_new_tokens=1)
        ids = write(base, mavis, ids=ids, max_new_tokens=1)
        assert torch.equal(ids, expected)


def test_a_value_model_made_under_inference_mode_is_watched_too() -> None:
    base = make_base()
    with torch.inference_mode():
        model = make_value_model("a")
    assert model.head.weight.is_inference()

    @torch.inference_mode()
    def change(model: ValueModel) -> None:
        for parameter in model.parameters():
            parameter.neg_()

    follow(model, base, change)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["inference", "no gradients"])
def test_value_functions_made_in_any_mode_steer_alike(kind: str, mode: str, tmp_path: Path) -> None:
    base = make_base()
    expected = write(base, steer(functions(kind, base), base, kind))
    with MODES[mode]():
        given = functions(kind, base)
        mavis = steer(given, base, kind)
    assert torch.equal(write(base, mavis), expected)
    if kind != "adapters":
        given.save_pretrained(tmp_path)
        with MODES[mode]():
            loaded = type(given).from_pretrained(tmp_path)
        assert torch.equal(write(base, steer(loaded, base, kind)), expected)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_base_model_made_under_inference_mode(kind: str) -> None:
    expected = write(base := make_base(), steer(functions(kind, base), base))
    with torch.inference_mode():
        base = make_base()
    assert torch.equal(write(base, steer(functions(kind, base), base)), expected)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["model", "head"])
def test_a_value_function_cast_between_calls_is_followed(kind: str, cast: torch.dtype) -> None:
    base = make_base()
    given = functions(kind, base)
    mavis = steer(given, base)
    once = write(base, mavis)
    given.to(cast)
    again = write(base, mavis, ids=once)
    assert torch.equal(again, write(base, steer(given, base), ids=once))


def test_a_value_function_that_has_been_moved_is_refused_with_the_way_out() -> None:
    base, model = make_base(), make_value_model("a")
    mavis = steer(model, base)
    once = write(base, mavis)
    model.to("meta")
    with pytest.raises(ValueError, match=r"the scores are on cpu, the value function for \['a'\] on meta: .*\.to\(\)"):
        write(base, mavis, ids=once)


def test_adapters_switched_on_and_off_are_followed() -> None:
    base, model = make_base(), make_adapter("a", seed=2)
    mavis = steer(model, base)
    once = write(base, mavis)
    assert model.lora is not None
    with model.lora.disable_adapter():
        without = write(base, mavis, ids=once, max_new_tokens=12)
        assert torch.equal(without, write(base, steer(model, base), ids=once, max_new_tokens=12))
    again = write(base, mavis, ids=once, max_new_tokens=12)
    assert torch.equal(again, write(base, steer(model, base), ids=once, max_new_tokens=12))
    assert not torch.equal(again, without)
    model.merge_lora()
    torch.testing.assert_close(write(base, mavis, ids=once, max_new_tokens=12), again)


@pytest.mark.parametrize("make", [MavisLogitsProcessor, MavisSampling])
@pytest.mark.parametrize("change", [in_place, by_data, nn.Module.double])
def test_fused_value_models_that_change_are_refused_with_a_way_out(make: Any, change: Callable[[Any], object]) -> None:
    base = make_base()
    adapters = functions("adapters", base)
    strategy = make(adapters, beta=6.0, **SETTINGS)

    def steered(which: Any) -> Tensor:
        return write(base, custom_generate=which) if make is MavisSampling else write(base, which)

    steered(strategy)
    for adapter in adapters:
        change(adapter)
    with pytest.raises(ValueError, match=r"\['a'\] was trained, loaded, cast or moved .* or use fuse=False"):
        steered(strategy)
    fresh = steered(make(adapters, beta=6.0, **SETTINGS))
    assert torch.equal(steered(make(adapters, beta=6.0, fuse=False, **SETTINGS)), fresh)


def test_fused_value_models_whose_sources_are_gone_go_on() -> None:
    base = make_base()
    mavis = steer(functions("adapters", base), base)
    assert all(source() is None for source, _ in mavis.functions.models[0]._sources)
    assert torch.equal(write(base, mavis), write(base, steer(functions("adapters", base), base)))


def test_a_text_that_nothing_happens_to_keeps_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = make_base(), make_value_model("a")
    mavis = steer(model, base)
    once = write(base, mavis)
    scorer = mavis._local.reader[0]._scorers[model]
    monkeypatch.setattr(type(scorer), "begin", lambda *_: pytest.fail("it begins anew"))
    with torch.inference_mode():
        write(base, mavis, ids=torch.cat([once, once[:, :2]], dim=1))
    assert mavis._local.reader[0]._scorers[model] is scorer


def test_a_watch_keeps_nothing_alive() -> None:
    model = nn.Linear(3, 3)
    watch = Watch(model)
    assert not watch.changed()
    del model
    assert watch.changed()


# Settings of the process


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [MavisLogitsProcessor, MavisSampling, MavisBeamSearch, MavisBestOfN, MavisBlockwise])
def test_the_default_dtype_is_no_matter(make: Any, dtype: torch.dtype) -> None:
    base = make_base()
    given = {"a": make_head(base, "a"), "b": make_value_model("b"), "c": make_value_model("c", seed=5)}

    def steered() -> Tensor:
        strategy = make(given, beta=6.0, model=base, **SETTINGS)
        torch.manual_seed(0)
        if make is MavisLogitsProcessor:
            return write(base, strategy)
        return write(base, custom_generate=strategy, do_sample=True)

    expected = steered()
    torch.set_default_dtype(dtype)
    try:
        found = steered()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_heads_trained_and_loaded_under_another_default_dtype(tmp_path: Path) -> None:
    base = make_base()
    make_head(base, "a").save_pretrained(tmp_path)
    expected = write(base, steer(ValueHead.from_pretrained(tmp_path), base))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(write(base, steer(ValueHead.from_pretrained(tmp_path), base)), expected)
    finally:
        torch.set_default_dtype(torch.float32)
