"""Nothing of ours changes a model, its config or the process for longer than the object that needs it."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from life_checks import IDS, KINDS, SETTINGS, functions, hooks, steer, write
from mavis_logits import MavisBeamSearch, MavisLogitsProcessor, MavisSampling, ValueHead, ValueModel, cli
from mavis_logits.backbone.attention import IMPLEMENTATION, holding
from mavis_logits.backbone.hidden import HiddenStates
from mavis_logits.values.ensemble import ValueFunctions
from tiny import make_adapter, make_base, make_head, make_value_model

# Hooks


@pytest.mark.parametrize("kind", ["head", "inner", "mixed"])
def test_hooks_and_states_go_with_the_processor(kind: str) -> None:
    base = make_base()
    for _ in range(3):
        mavis = steer(kind, base)
        write(base, mavis)
    caught = weakref.ref(mavis._hidden)
    del mavis
    assert caught() is None  # at once: no circle keeps it until the garbage collector comes
    assert hooks(base) == 0


def test_a_processor_does_not_keep_its_model_alive() -> None:
    base = make_base()
    mavis = steer("model", base)
    gone = weakref.ref(base)
    del base
    gc.collect()
    assert gone() is None
    assert mavis.base is None


def test_a_processor_in_a_circle_lets_go_when_it_is_collected() -> None:
    base = make_base()
    mavis = steer("inner", base)
    mavis.itself = mavis
    del mavis
    gc.collect()
    assert hooks(base) == 0


def test_attaching_that_fails_changes_nothing() -> None:
    base, other = make_base(), make_base(seed=3)
    mavis = steer("head", base)
    expected, before = write(base, mavis), hooks(base)
    with pytest.raises(ValueError, match="trained on the hidden states of"):
        mavis.attach(other)
    assert (hooks(base), hooks(other)) == (before, 0)
    assert torch.equal(write(base, mavis), expected)
    with pytest.raises(ValueError, match="has 2 layers"):
        HiddenStates(other, [1, 7])
    assert hooks(other) == 0


@pytest.mark.parametrize("kind", ["head", "inner"])
def test_a_strategy_leaves_no_hook_whether_it_ends_or_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base()
    strategy = MavisSampling(functions(kind, base), beta=4.0, **SETTINGS)
    write(base, custom_generate=strategy)
    assert hooks(base) == 0
    monkeypatch.setattr(ValueFunctions, "refresh", lambda _: 1 / 0)  # while the session is being set up
    with pytest.raises(ZeroDivisionError):
        write(base, custom_generate=strategy)
    assert hooks(base) == 0
    assert base.config._attn_implementation == "sdpa"


# Compiled code


class Counting:
    """A backend that counts what it compiles, and runs it as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def test_attaching_leaves_a_users_compiled_functions_alone() -> None:
    base, counting = make_base(), Counting()
    double = torch.compile(lambda x: 2 * x + 1, backend=counting)
    double(torch.ones(3))
    flag = torch._dynamo.config.skip_nnmodule_hook_guards
    for _ in range(3):
        mavis = steer("inner", base)
        write(base, mavis)
        double(torch.ones(3))
        mavis.detach()
    write(base, custom_generate=MavisSampling(make_head(base, "a"), **SETTINGS))
    double(torch.ones(3))
    assert counting.graphs == 1
    assert torch._dynamo.config.skip_nnmodule_hook_guards == flag
    torch._dynamo.reset()


def compile_whole(base: Any, backend: Any) -> None:
    base.compile(backend=backend)


def compile_forward(base: Any, backend: Any) -> None:
    base.forward = torch.compile(base.forward, backend=backend)


def compile_layers(base: Any, backend: Any) -> None:
    for layer in base.model.layers:
        layer.compile(backend=backend)


@torch.no_grad()
def step(base: Any, mavis: MavisLogitsProcessor | None = None) -> Tensor:
    """Next-token scores by one forward pass, steered if a processor is given."""
    scores = base(input_ids=IDS, use_cache=False).logits[:, -1]
    return scores if mavis is None else mavis(IDS, scores)


@pytest.mark.parametrize("way", [compile_whole, compile_forward, compile_layers])
def test_a_model_compiled_in_any_way_is_steered_and_plain_again(way: Any) -> None:
    base, counting = make_base(), Counting()
    head = make_head(base, "a", layer=1)
    plain = step(base)
    with MavisLogitsProcessor(head, beta=4.0, model=base, **SETTINGS) as mavis:
        expected = step(base, mavis)
    way(base, counting)
    assert torch.equal(step(base), plain)
    assert counting.graphs
    mavis = MavisLogitsProcessor(head, beta=4.0, model=base, **SETTINGS)
    torch.testing.assert_close(step(base, mavis), expected)
    mavis.detach()
    assert torch.equal(step(base), plain)
    mavis.attach(base)
    torch.testing.assert_close(step(base, mavis), expected)
    torch._dynamo.reset()


def static() -> dict[str, Any]:
    """Arguments by which generate compiles its steps."""
    compiled = CompileConfig(backend="eager", fullgraph=True)
    compiled._compile_all_devices = True  # else on GPUs only
    return {"cache_implementation": "static", "compile_config": compiled, "max_new_tokens": 3}


def test_what_was_compiled_for_another_model_of_the_class_does_not_run_for_this_one() -> None:
    base, other = make_base(), make_base()
    plain, mavis = write(base, max_new_tokens=3), steer("inner", base)
    expected = write(base, mavis, max_new_tokens=3)
    write(other, **static())  # the compiler shares code among models
    assert torch.equal(write(base, mavis, **static()), expected)
    assert torch.equal(write(other, **static()), plain)
    assert torch.equal(write(base, mavis, **static()), expected)
    states = weakref.ref(mavis._hidden)
    del mavis
    gc.collect()
    assert states() is None  # no compiled code holds it
    assert torch._dynamo.config.skip_nnmodule_hook_guards
    assert torch.equal(write(base, **static()), plain)
    torch._dynamo.reset()


def test_a_model_compiled_after_attaching_is_steered_or_refused() -> None:
    base, other = make_base(), make_base()
    mavis = steer("inner", base)
    expected = step(base, mavis)
    other.compile(backend="eager")
    step(other)  # what is compiled here would run for `base` too
    base.compile(backend="eager")
    with pytest.raises(ValueError, match=r"has been compiled since .* call mavis.attach\(model\) again"):
        step(base, mavis)
    mavis.attach(base)
    torch.testing.assert_close(step(base, mavis), expected)
    torch._dynamo.reset()


# Configs and modes


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_as_it_was_between_and_after_calls(implementation: str) -> None:
    base, value_model = make_base(), make_value_model("a")
    for model in (base, value_model.backbone):
        model.set_attn_implementation(implementation)
    before = copy.deepcopy(base.config.to_dict()), value_model.config.to_dict()
    mavis = MavisLogitsProcessor(value_model, beta=4.0, **SETTINGS)
    write(base, mavis)
    write(base, custom_generate=MavisSampling(value_model, beta=4.0, **SETTINGS))
    assert value_model.backbone.config._attn_implementation == implementation
    assert base.config._attn_implementation == implementation
    assert (base.config.to_dict(), value_model.config.to_dict()) == before
    assert copy.deepcopy(value_model).backbone.config._attn_implementation == implementation


def test_attention_is_held_for_as_long_as_anybody_holds_it() -> None:
    base = make_base()
    one, two = holding(base), holding(base.model)  # one config, two modules
    assert base.config._attn_implementation == IMPLEMENTATION
    one.release()
    one.release()
    assert base.config._attn_implementation == IMPLEMENTATION
    del two
    assert base.config._attn_implementation == "sdpa"
    with holding(base):
        base.set_attn_implementation("eager")  # the user's word is the last
    assert base.config._attn_implementation == "eager"


def test_a_reused_id_is_not_taken_for_what_is_gone() -> None:
    hold, seen = None, set()
    for _ in range(50):
        decoder = make_base().model
        seen.add(id(decoder.config))
        hold = holding(decoder)
        hold.release()
        del decoder, hold
    assert len(seen) < 50  # ids do come again
    decoder = make_base().model
    with holding(decoder):
        assert decoder.config._attn_implementation == IMPLEMENTATION
    assert decoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", KINDS)
def test_modes_of_users_models_stay_as_they_were(kind: str) -> None:
    base = make_base()
    given = functions(kind, base)
    models = list(given.values()) if isinstance(given, dict) else [given]
    for model in models:
        model.train()
    modes = [[module.training for module in model.modules()] for model in models]
    gradients = [[p.requires_grad for p in model.parameters()] for model in (*models, base)]
    mavis = MavisLogitsProcessor(given, beta=4.0, model=base, **SETTINGS)
    write(base, mavis)
    write(base, custom_generate=MavisSampling(given, beta=4.0, **SETTINGS))
    assert [[module.training for module in model.modules()] for model in models] == modes
    assert [[p.requires_grad for p in model.parameters()] for model in (*models, base)] == gradients
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("make", [MavisLogitsProcessor, MavisSampling])
def test_values_are_without_dropout_in_training_mode_too(make: Any) -> None:
    base = make_base()
    head = ValueHead.for_model(base, ["b"], width=16, dropout=0.5)
    value_model = make_value_model("a", architecture="gpt2")  # which has dropout of 0.1
    strategy = make({"a": value_model, "b": head}, beta=4.0, model=base, **SETTINGS)

    def steered() -> Tensor:
        return write(base, custom_generate=strategy) if make is MavisSampling else write(base, strategy)

    for model in (head, value_model):
        model.eval()
    expected = steered()
    head.train()
    assert torch.equal(steered(), expected)
    value_model.backbone.train()
    assert torch.equal(steered(), expected)


@pytest.mark.parametrize("kind", [*KINDS, "adapters"])
def test_making_processors_draws_no_random_numbers(kind: str) -> None:
    base = make_base()
    adapters = [make_adapter("a", seed=2), make_adapter("b", seed=3)]
    given = adapters if kind == "adapters" else functions(kind, base)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    mavis = MavisLogitsProcessor(given, beta=4.0, model=base, **SETTINGS)
    strategy = MavisBeamSearch(given, beta=4.0, model=base, **SETTINGS)
    write(base, mavis)
    write(base, custom_generate=strategy)
    copy.deepcopy(mavis)
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_and_copying_draw_no_random_numbers(tmp_path: Path) -> None:
    base = make_base()
    make_value_model("a").save_pretrained(tmp_path / "model")
    make_head(base, "a").save_pretrained(tmp_path / "head")
    state = torch.get_rng_state()
    ValueModel.from_backbone(base, ["a"], num_layers=1)
    ValueModel.from_pretrained(tmp_path / "model")
    ValueHead.from_pretrained(tmp_path / "head").bind(base)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_command_leaves_the_processes_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(warnings.filters)
    assert cli.main(["generate", "--prompt", "x", "--weights", "nonsense"]) == 2
    assert warnings.filters == before
