"""Copies of models, processors, strategies and heads: independent, attached to what is theirs, and plain."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from life_checks import IDS, KINDS, SETTINGS, functions, hooks, steer, write
from mavis_logits import MavisBeamSearch, MavisBestOfN, MavisLogitsProcessor, MavisSampling
from tiny import make_adapter, make_base, make_head


@pytest.mark.parametrize("kind", ["head", "inner"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_of_a_steered_model_is_plain(kind: str, way: str, tmp_path: Path) -> None:
    base = make_base()
    plain = write(base)
    mavis = steer(kind, base)
    steered = write(base, mavis)
    assert not torch.equal(plain, steered)
    if way == "deepcopy":
        twin = copy.deepcopy(base)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(base))
    else:
        torch.save(base, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(write(twin), plain)
    assert mavis._hidden.take(IDS) is None  # the copy's forward passes are not taken for the model's
    if way == "deepcopy":
        assert hooks(twin) == 0
    assert torch.equal(write(base, mavis), steered)
    mavis.attach(twin)
    assert torch.equal(write(twin, mavis), steered)


def test_a_pickled_model_needs_nothing_of_ours(tmp_path: Path) -> None:
    base = make_base()
    mavis = steer("inner", base)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(base))
    code = (
        "import pickle, sys, torch; model = pickle.load(open('model.pkl', 'rb'));"
        "model.generate(torch.tensor([[5, 6]]), max_new_tokens=2);"
        "sys.exit(any(name.startswith('mavis') for name in sys.modules))"
    )
    del mavis
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if "site-packages" in p or "tf-" in p),
    }
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_a_copy_of_a_model_in_a_strategys_hands_is_plain() -> None:
    base = make_base()
    copies = []
    strategy = MavisSampling(make_head(base, "a"), beta=4.0, **SETTINGS)
    stop = lambda ids, scores, **_: copies.append(copy.deepcopy(base)) or torch.zeros(len(ids), dtype=torch.bool)  # noqa: E731
    write(base, custom_generate=strategy, stopping_criteria=[stop], max_new_tokens=2)
    plain = write(base)
    assert torch.equal(write(copies[0]), plain)
    assert hooks(copies[0]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_a_copied_processor_is_attached_to_the_same_model_and_independent(kind: str, way: Any) -> None:
    base = make_base()
    mavis = steer(kind, base, trace=True)
    expected = write(base, mavis)
    twin = way(mavis)
    assert twin.base is base
    assert torch.equal(write(base, twin), expected)
    twin.beta, twin.weights = 0.0, [0.0] * len(twin.objectives)
    assert torch.equal(write(base, twin), write(base))
    assert torch.equal(write(base, mavis), expected)
    del twin
    assert torch.equal(write(base, mavis), expected)  # the copy took its own hooks along
    if way is copy.deepcopy:
        twin = way(mavis)
        steps = mavis.stats.steps
        write(base, twin)
        assert (mavis.stats.steps, len(mavis.trace)) == (steps, 6)
        assert [id(f) for f in twin.functions.all] == [id(f) for f in mavis.functions.all]  # shared: only read


def test_what_is_copied_together_stays_together() -> None:
    base = make_base()
    head = make_head(base, "a")
    mavis = MavisLogitsProcessor(head, beta=4.0, model=base, **SETTINGS)
    expected = write(base, mavis)
    base_2, head_2, mavis_2 = copy.deepcopy([base, head, mavis])
    assert mavis_2.base is base_2
    assert mavis_2.functions.heads == [head_2]
    with torch.no_grad():
        head.out.weight.zero_()
    del base, mavis
    assert torch.equal(write(base_2, mavis_2), expected)


def test_a_copy_of_an_unattached_processor_is_unattached() -> None:
    base = make_base()
    mavis = steer("head", base)
    mavis.detach()
    twin = copy.deepcopy(mavis)
    assert twin.base is None
    assert hooks(base) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_unpickled_processor_steers_once_it_is_attached(kind: str) -> None:
    base = make_base()
    mavis = steer(kind, base, trace=True)
    expected = write(base, mavis)
    data = pickle.dumps(mavis)
    if kind in ("head", "inner"):
        assert len(data) < 60_000  # the base model's embedding is not in it
    twin = pickle.loads(data)
    assert twin.base is None
    if kind == "model":
        assert torch.equal(write(base, twin), expected)
        return
    with pytest.raises(ValueError, match=r"need what the base model has computed: .* use mavis.attach"):
        write(base, twin)
    twin.attach(base)
    assert torch.equal(write(base, twin), expected)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("make", [MavisSampling, MavisBeamSearch, MavisBestOfN])
def test_strategies_are_copied_after_use(make: Any, way: Any) -> None:
    base = make_base()
    strategy = make(functions("mixed", base), beta=4.0, **SETTINGS)

    def sample(which: Any) -> Tensor:
        torch.manual_seed(0)
        return write(base, custom_generate=which, do_sample=True)

    expected = sample(strategy)
    assert torch.equal(sample(way(strategy)), expected)


def test_fused_adapters_are_copied_and_pickled() -> None:
    base = make_base()
    mavis = MavisLogitsProcessor([make_adapter("a", seed=2), make_adapter("b", seed=3)], beta=4.0, **SETTINGS)
    assert len(mavis.functions.models) == 1
    expected = write(base, mavis)
    for twin in (copy.deepcopy(mavis), pickle.loads(pickle.dumps(mavis))):
        assert torch.equal(write(base, twin), expected)


def test_a_copied_head_is_its_own_and_bound() -> None:
    base = make_base()
    head = make_head(base, "a")
    states, candidates = torch.randn(2, 32), torch.tensor([[3, 4], [5, 6]])
    expected = head(states, candidates)
    twin = copy.deepcopy(head)
    with torch.no_grad():
        head.action.weight.zero_()
    torch.testing.assert_close(twin(states, candidates), expected)
    assert twin._embedding[0].data_ptr() == base.lm_head.weight.data_ptr()
    assert not pickle.loads(pickle.dumps(head)).is_bound
