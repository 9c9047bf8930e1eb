"""Fingerprints: the same for the same thing however loaded, another for anything else."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mavis_logits.backbone.fingerprint import tokenizer_fingerprint, weights_fingerprint
from tiny import make_base


def tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))


def test_tokenizers_are_the_same_when_every_token_has_the_same_id() -> None:
    one = tokenizer_fingerprint(tokenizer("a", "b", "c"))
    assert one == tokenizer_fingerprint(tokenizer("a", "b", "c"))
    assert len(one) == 16
    assert int(one, 16) >= 0


@pytest.mark.parametrize("other", [("a", "c", "b"), ("a", "b"), ("a", "b", "c", "d"), ("a", "b", "C"), ("ab", "", "c")])
def test_another_vocabulary_has_another_fingerprint(other: tuple[str, ...]) -> None:
    assert tokenizer_fingerprint(tokenizer("a", "b", "c")) != tokenizer_fingerprint(tokenizer(*other))


def test_an_added_token_changes_the_fingerprint() -> None:
    plain = tokenizer("a", "b")
    before = tokenizer_fingerprint(plain)
    plain.add_tokens(["<new>"])
    assert tokenizer_fingerprint(plain) != before


def test_weights_are_the_same_in_float32_and_bfloat16() -> None:
    base = make_base()
    fingerprint = weights_fingerprint(base)
    assert fingerprint == weights_fingerprint(make_base())
    assert fingerprint == weights_fingerprint(base.to(torch.bfloat16))


def test_a_bfloat16_checkpoint_is_the_same_in_every_precision() -> None:
    base = make_base().to(torch.bfloat16)
    fingerprint = weights_fingerprint(base)
    for dtype in (torch.float32, torch.float16):
        assert weights_fingerprint(base.to(dtype)) == fingerprint


def test_other_weights_have_another_fingerprint() -> None:
    assert weights_fingerprint(make_base()) != weights_fingerprint(make_base(seed=1))
    tuned = make_base()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight *= 1.05
    assert weights_fingerprint(tuned) != weights_fingerprint(make_base())


def test_a_truncated_model_has_another_fingerprint() -> None:
    base = make_base()
    del base.model.layers[1]
    assert weights_fingerprint(base) != weights_fingerprint(make_base())


def test_compiled_layers_keep_their_fingerprint() -> None:
    class Compiled(torch.nn.Module):
        """Names its parameters as torch.compile does."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    base = make_base()
    base.model.layers[0] = Compiled(base.model.layers[0])
    assert weights_fingerprint(base) == weights_fingerprint(make_base())
