"""One processor, value function or model in several threads, with several models, and on both sides of a fork."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mavis_logits import MavisLogitsProcessor, MavisSampling
from mavis_logits.backbone.attention import IMPLEMENTATION, holding
from mavis_logits.core.holds import Holds
from tiny import EOS, PAD, make_base, make_head, make_value_model

SETTINGS: dict[str, Any] = {"top_k": 6, "pad_token_id": PAD, "eos_token_id": EOS}
PROMPTS = [torch.tensor([[5 + i, 6, 7 + 2 * i, 8]]) for i in range(4)]


@pytest.fixture(autouse=True)
def hasty() -> Iterator[None]:
    """Threads take turns after every 0.1 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def together(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    """What `work(i)` returns in a thread for each i, all begun at once; raises what one of them raised."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            start.wait()
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[i] for i in range(count)]


def functions(kind: str, base: Any) -> Any:
    if kind == "model":
        return make_value_model("a")
    return {"a": make_head(base, "a", layer=1), "b": make_value_model("b")}


def write(base: Any, ids: Tensor, *processors: Any, **arguments: Any) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": PAD, "attention_mask": torch.ones_like(ids)}
    return base.generate(ids, logits_processor=list(processors), **settings | arguments)


@pytest.mark.parametrize("kind", ["model", "mixed"])
def test_a_fresh_processor_in_four_threads(kind: str) -> None:
    base = make_base()
    given = functions(kind, base)
    wanted = MavisLogitsProcessor(given, beta=4.0, model=base, **SETTINGS)
    expected = [write(base, ids, wanted) for ids in PROMPTS]
    for _ in range(4):
        mavis = MavisLogitsProcessor(given, beta=4.0, model=base, **SETTINGS)
        found = together(lambda i, mavis=mavis: write(base, PROMPTS[i], mavis))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert (mavis.stats.steps, mavis.stats.passed_through) == (20, 0)
    for model in [f.backbone for f in mavis.functions.models]:
        assert model.config._attn_implementation == "sdpa"


def test_processors_and_strategies_on_one_value_model_and_base() -> None:
    """A value model that is read by a processor, and is the base of a strategy too: the switch has many users."""
    base = make_base()
    value_model = make_value_model("a")
    mavis = MavisLogitsProcessor(value_model, beta=4.0, **SETTINGS)
    strategy = MavisSampling(value_model, beta=4.0, **SETTINGS)
    expected = [write(base, ids, mavis) for ids in PROMPTS]

    def work(i: int) -> list[Tensor]:
        own = MavisLogitsProcessor(value_model, beta=4.0, **SETTINGS)
        return [
            write(
                base,
                PROMPTS[i],
                custom_generate=strategy if i % 2 else MavisSampling(value_model, beta=4.0, **SETTINGS),
            ),
            write(base, PROMPTS[i], own),
        ]

    for _ in range(3):
        for found, wanted in zip(together(work), expected, strict=True):
            assert all(torch.equal(one, wanted) for one in found)
    assert value_model.backbone.config._attn_implementation == "sdpa"
    assert base.config._attn_implementation == "sdpa"


def test_processors_that_come_and_go_beside_plain_decoding() -> None:
    """One per request, on a shared model: hooks appear and vanish while other threads are in its forward."""
    base = make_base()
    head = make_head(base, "a", layer=1)
    plain = write(base, PROMPTS[0])
    steered = write(base, PROMPTS[1], MavisLogitsProcessor(head, beta=4.0, model=base, **SETTINGS))

    def work(i: int) -> list[bool]:
        if i % 2 == 0:
            return [torch.equal(write(base, PROMPTS[0]), plain) for _ in range(8)]
        same = []
        for _ in range(8):
            mavis = MavisLogitsProcessor(head, beta=4.0, model=base, **SETTINGS)
            same.append(torch.equal(write(base, PROMPTS[1], mavis), steered) and not mavis.stats.passed_through)
        return same

    assert all(all(same) for same in together(work))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())


def test_a_value_function_in_training_mode_is_read_without_dropout_by_all_threads() -> None:
    base = make_base()
    value_model = make_value_model("a", architecture="gpt2")
    mavis = MavisLogitsProcessor(value_model.eval(), beta=4.0, **SETTINGS)
    expected = [write(base, ids, mavis) for ids in PROMPTS]
    value_model.train()
    found = together(lambda i: write(base, PROMPTS[i], mavis))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(module.training for module in value_model.modules())


@pytest.mark.parametrize("kind", [MavisLogitsProcessor, MavisSampling])
def test_a_trace_is_of_one_thread(kind: type) -> None:
    base, value_model = make_base(), make_value_model("a")

    def steered(ids: Tensor, mavis: Any) -> Tensor:
        return write(base, ids, mavis) if kind is MavisLogitsProcessor else write(base, ids, custom_generate=mavis)

    texts = [steered(ids, kind(value_model, beta=4.0, **SETTINGS)) for ids in PROMPTS]
    for _ in range(10):
        mavis = kind(value_model, beta=4.0, trace=True, **SETTINGS)
        together(lambda i, mavis=mavis: steered(PROMPTS[i], mavis))
        assert [step.length for step in mavis.trace.steps] == [4, 5, 6, 7, 8]
        taken = torch.stack([step.taken for step in mavis.trace.steps[:-1]])
        assert any(torch.equal(taken[:, 0], text[0, 4:-1]) for text in texts)


@pytest.mark.parametrize("kind", ["model", "mixed"])
def test_value_functions_are_refreshed_by_one_thread_while_others_read_them(kind: str) -> None:
    base = make_base()
    mavis = MavisLogitsProcessor(functions(kind, base), beta=4.0, model=base, **SETTINGS)
    expected = [write(base, ids, mavis) for ids in PROMPTS]
    working = [True] * 3

    def work(i: int) -> list[Tensor]:
        if i == 3:
            while any(working):
                mavis.functions.refresh()
            return []
        try:
            return [write(base, PROMPTS[i], mavis) for _ in range(5)]
        finally:
            working[i] = False

    for found, wanted in zip(together(work)[:3], expected[:3], strict=True):
        assert all(torch.equal(one, wanted) for one in found)


@pytest.mark.parametrize("kind", ["model", "mixed"])
def test_one_processor_between_models(kind: str) -> None:
    """Value models steer any model; a head's states are those of the model that it is attached to."""
    one, two = make_base(), make_base(seed=3)
    mavis = MavisLogitsProcessor(functions(kind, one), beta=4.0, model=one, **SETTINGS)
    fresh = lambda: MavisLogitsProcessor(mavis.functions.all, beta=4.0, model=one, **SETTINGS)  # noqa: E731
    expected = [write(one, PROMPTS[0], fresh()), write(two, PROMPTS[1], fresh()), write(one, PROMPTS[2], fresh())]
    if kind == "mixed":
        assert torch.equal(expected[1], write(two, PROMPTS[1]))  # no state of its own model: left alone
    found = [write(model, ids, mavis) for model, ids in ((one, PROMPTS[0]), (two, PROMPTS[1]), (one, PROMPTS[2]))]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    both = together(lambda i: write((one, two)[i], PROMPTS[i], mavis), count=2)
    assert all(torch.equal(a, b) for a, b in zip(both, expected[:2], strict=True))


def test_heads_on_two_models_at_once() -> None:
    bases = [make_base(), make_base(seed=3)]
    processors = [MavisLogitsProcessor(make_head(b, "a"), beta=4.0, model=b, **SETTINGS) for b in bases]
    expected = [write(b, PROMPTS[0], m) for b, m in zip(bases, processors, strict=True)]
    found = together(lambda i: [write(bases[i], PROMPTS[0], processors[i]) for _ in range(3)], count=2)
    assert all(torch.equal(one, wanted) for own, wanted in zip(found, expected, strict=True) for one in own)


# Holds


class Thing:
    on = 0


def test_a_change_is_made_once_and_undone_once() -> None:
    def change(thing: Thing) -> Callable[[], None]:
        thing.on += 1
        assert thing.on == 1

        def undo() -> None:
            thing.on -= 1

        return undo

    holds, thing = Holds(change), Thing()

    def work(i: int) -> None:
        for _ in range(300):
            with holds.hold(thing):
                assert thing.on == 1
            hold = holds.hold(thing)
            del hold

    together(work)
    assert thing.on == 0
    assert thing not in holds


def test_a_change_that_fails_is_not_held() -> None:
    holds: Holds[Thing] = Holds(lambda thing: 1 / 0)  # type: ignore[arg-type, return-value]
    thing = Thing()
    with pytest.raises(ZeroDivisionError):
        holds.hold(thing)
    assert thing not in holds


# Fork


def in_a_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a child forked from this process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # the parent's worker threads are not here
        sender.send(work())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this process has threads is the point
        child = context.Process(target=run)
        child.start()
    assert receiver.poll(60), "the child hangs"
    result = receiver.recv()
    child.join()
    return result


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
@pytest.mark.parametrize("used", [False, True])
def test_a_processor_made_before_a_fork_steers_in_the_child(used: bool) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = make_base()
        mavis = MavisLogitsProcessor(functions("mixed", base), beta=4.0, model=base, **SETTINGS)
        wanted = MavisLogitsProcessor(mavis.functions.all, beta=4.0, model=base, **SETTINGS)
        if used:
            write(base, PROMPTS[1], mavis)
        expected = write(base, PROMPTS[0], wanted).tolist()
        assert in_a_child(lambda: write(base, PROMPTS[0], mavis).tolist()) == expected
        assert write(base, PROMPTS[0], mavis).tolist() == expected
    finally:
        torch.set_num_threads(threads)


@needs_fork
def test_no_child_is_born_with_a_lock_that_nobody_will_open() -> None:
    base = make_base()
    stop = threading.Event()
    modules = [nn.Linear(1, 1) for _ in range(3)]

    def busy() -> None:
        from mavis_logits.backbone.hooks import before

        while not stop.is_set():
            holding(base).release()
            for module in modules:
                before(module, print).remove()

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):

            def work() -> str:
                with holding(base):
                    return str(base.config._attn_implementation)

            assert in_a_child(work) == IMPLEMENTATION
    finally:
        stop.set()
        for thread in threads:
            thread.join()
