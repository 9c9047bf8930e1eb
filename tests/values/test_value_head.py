"""Value heads: bound to one base model, the same for candidates and for the whole vocabulary, bit-exact when saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from mavis_logits import ValueHead, ValueHeadConfig
from mavis_logits.backbone import Backbone
from mavis_logits.backbone.fingerprint import weights_fingerprint
from mavis_logits.values import value_head
from tiny import ARCHITECTURES, VOCABULARY, make_base, make_head

WIDTH = 32  # of the tiny base models


def hidden(rows: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0))


def candidates(rows: int = 3, k: int = 5) -> Tensor:
    return torch.randint(VOCABULARY, (rows, k), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(head: ValueHead, base: Any, state: Tensor, token: int) -> Tensor:
    """Q(s, a) as the class's docstring has it."""
    norm, rank = torch.nn.functional.layer_norm, head.config.rank
    embedding = base.get_output_embeddings().weight[token]
    seen, action = head.state(norm(state, state.shape)), head.action(norm(embedding, embedding.shape))
    z = head.norm(seen if rank else seen + action)
    for layer in head.layers:
        z = z + torch.nn.functional.gelu(layer(z))
    said = head.out(z)
    if rank:
        said = said + torch.stack([part @ action for part in head.factors(z).split(rank)]) / rank**0.5
    mean, scale = torch.tensor(head.config.reward_mean), torch.tensor(head.config.reward_scale)
    return mean + scale * said


every_form = pytest.mark.parametrize("rank", [None, 4])


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_a_layer_that_the_model_has_not_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer}, but LlamaForCausalLM has 2 layers: name one of 1 to 2"):
        make_head(make_base(), "a", layer=layer)


@every_form
def test_the_value_is_the_formula(rank: int | None) -> None:
    base = make_base()
    head = ValueHead.for_model(
        base, ["a", "b"], width=16, num_layers=2, rank=rank, reward_mean=[1.0, -1.0], reward_scale=[2.0, 3.0]
    ).eval()
    if rank:
        torch.nn.init.normal_(head.factors.weight)
    values = head(hidden(), candidates())
    assert values.shape == (3, 5, 2)
    assert values.dtype == torch.float32
    for row in range(3):
        for i in range(5):
            expected = by_hand(head, base, hidden()[row], int(candidates()[row, i]))
            torch.testing.assert_close(values[row, i], expected, atol=1e-5, rtol=1e-5)


def test_a_head_of_no_factors_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, or None, got 0"):
        make_head(make_base(), "a", rank=0)


def test_a_new_head_of_factors_tilts_nothing() -> None:
    head = ValueHead.for_model(make_base(), ["a", "b"], width=16, rank=4).eval()
    values = head(hidden())
    torch.testing.assert_close(values, values[:, :1].expand_as(values))


@every_form
def test_the_whole_vocabulary_agrees_with_its_candidates(rank: int | None) -> None:
    head = make_head(make_base(), "a", "b", rank=rank)
    whole = head(hidden())
    assert whole.shape == (3, VOCABULARY, 2)
    some = head(hidden(), candidates())
    torch.testing.assert_close(whole.gather(1, candidates()[..., None].expand_as(some)), some, atol=1e-5, rtol=1e-5)


@every_form
@pytest.mark.parametrize("limit", [1, 16 * 3 * 2, 16 * 3 * 7])
def test_chunks_change_nothing(limit: int, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(make_base(), "a", "b", rank=rank)
    expected = head(hidden()), head(hidden(), candidates(k=20))
    monkeypatch.setattr(value_head, "_CHUNK_ELEMENTS", limit)
    torch.testing.assert_close((head(hidden()), head(hidden(), candidates(k=20))), expected, atol=1e-5, rtol=1e-5)


@every_form
def test_a_row_alone_gets_the_values_it_gets_in_a_batch(rank: int | None) -> None:
    head = make_head(make_base(), "a", rank=rank)
    together = head(hidden(), candidates())
    for row in range(3):
        alone = head(hidden()[row : row + 1], candidates()[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@every_form
def test_training_without_dropout_agrees_and_reaches_every_weight(rank: int | None) -> None:
    head = make_head(make_base(), "a", "b", rank=rank)
    evaluated = head(hidden(), candidates())
    head.train()
    trained = head(hidden(), candidates())
    torch.testing.assert_close(trained, evaluated, atol=1e-5, rtol=1e-5)
    trained.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_dropout_is_for_training_only() -> None:
    head = ValueHead.for_model(make_base(), ["a"], width=16, dropout=0.5).eval()
    assert torch.equal(head(hidden(), candidates()), head(hidden(), candidates()))
    head.train()
    assert not torch.equal(head(hidden(), candidates()), head(hidden(), candidates()))


@every_form
def test_the_table_follows_the_weights(rank: int | None) -> None:
    head = make_head(make_base(), "a", rank=rank)
    before = head(hidden(), candidates())
    head.train()
    optimizer = torch.optim.SGD([head.action.weight], lr=1.0)
    head(hidden(), candidates()).sum().backward()
    optimizer.step()
    expected = head(hidden(), candidates())
    after = head.eval()(hidden(), candidates())
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    other = make_head(make_base(), "a", seed=9, rank=rank)
    head.load_state_dict(other.state_dict())
    torch.testing.assert_close(head(hidden(), candidates()), other(hidden(), candidates()))


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"mamba"}))
def test_every_architecture_has_an_output_embedding(architecture: str) -> None:
    base = make_base(architecture)
    assert Backbone.of(base).output_embedding.shape == (VOCABULARY, WIDTH)
    assert torch.isfinite(make_head(base, "a")(hidden(), candidates())).all()


# ---- round trips ----


def test_a_head_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = make_base()
    head = ValueHead.for_model(
        base, ["a", "b"], width=16, reward_mean=[1.0, 2.0], base_model="org/base", recipe={"epochs": 3}, iteration=1
    ).eval()
    head.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    again = ValueHead.from_pretrained(tmp_path)
    assert not again.is_bound
    assert again.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in head.state_dict().items())
    again.bind(base)
    torch.testing.assert_close(again(hidden(), candidates()), head(hidden(), candidates()), atol=1e-5, rtol=1e-5)
    for name in ("objectives", "reward_mean", "base_fingerprint", "base_model", "recipe", "iteration", "width"):
        assert getattr(again.config, name) == getattr(head.config, name)


def test_auto_classes_know_value_heads(tmp_path: Path) -> None:
    head = make_head(make_base(), "a")
    head.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ValueHeadConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), ValueHead)


def test_bfloat16_agrees_to_its_own_precision() -> None:
    head = make_head(make_base(), "a")
    exact = head(hidden(), candidates())
    rounded = head.to(torch.bfloat16)(hidden(), candidates())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_file_is_an_os_error_that_says_so(damage: str, tmp_path: Path) -> None:
    make_head(make_base(), "a").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\xff" * 64)
    with pytest.raises(OSError, match=r"corrupt or half-written safetensors file .*: download or save it again"):
        ValueHead.from_pretrained(tmp_path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    head = make_head(make_base(), "a")
    head.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(head.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        ValueHead.from_pretrained(tmp_path)


# ---- binding ----


def test_a_head_for_other_weights_is_refused() -> None:
    base, other = make_base(), make_base(seed=5)
    head = make_head(base, "a")
    found = weights_fingerprint(other)
    with pytest.raises(
        ValueError, match=rf"weights {head.config.base_fingerprint}\), but .* weights {found}: load that model"
    ):
        head.bind(other)
    assert head.bind(other, check=False).is_bound


def test_a_head_for_another_vocabulary_is_refused() -> None:
    base = make_base()
    head = make_head(base, "a")
    base.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(ValueError, match=r"of 97 x 32, but LlamaForCausalLM has 100 x 32: use the head's own base"):
        head.bind(base, check=False)


def test_a_head_on_another_device_is_refused() -> None:
    base = make_base()
    head = make_head(base, "a").to("meta")
    with pytest.raises(ValueError, match="the value head is on meta, the base model on cpu: move one of them"):
        head.bind(base)


def test_an_unbound_head_is_refused() -> None:
    head = ValueHead(make_head(make_base(), "a").config)
    with pytest.raises(ValueError, match=r"bound to no base model: call head\.bind\(model\) first"):
        head(hidden(), candidates())


@pytest.mark.parametrize("shape", [(3, WIDTH + 1), (WIDTH,), (3, 1, WIDTH)])
def test_hidden_states_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hidden must be \[rows, 32\], got \["):
        make_head(make_base(), "a")(torch.zeros(shape), candidates())


def test_a_model_without_output_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaModel has no output embedding; .* needs a causal language model"):
        make_head(make_base(), "a").bind(make_base().model)


def test_objectives_that_are_no_list_are_refused() -> None:
    with pytest.raises(ValueError, match="objectives must be a list of distinct names"):
        ValueHead.for_model(make_base(), "helpful")
