"""What the tests of strategies that go their own ways have in common."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from mavis_logits import MavisStrategy
from mavis_logits.testing import recompute_all
from tiny import EOS, PAD, VOCABULARY

WEIGHTS = {"a": 0.7, "b": 0.3}
ENDS = [EOS, *range(40, 50)]  # as eos_token_id, so that some texts of random models end early
FULL = {"top_k": 0, "return_dict_in_generate": True, "eos_token_id": ENDS}


def recompute(mavis: MavisStrategy, base: Any, sequence: list[int]) -> Tensor:
    """[M] values of a sequence, from scratch."""
    return recompute_all(mavis.functions, base, sequence[:-1], torch.tensor(sequence[-1:]))[0]


def written(sequence: Tensor, start: int) -> list[int]:
    """A row without padding, up to its end."""
    row = sequence.tolist()
    first = next(i for i, token in enumerate(row) if token != PAD)
    end = next((i + 1 for i, token in enumerate(row) if i >= start and token in ENDS), len(row))
    return row[first:end]


class StopAfter(StoppingCriteria):
    """Stops a row behind a token, and remembers the widths that it was shown."""

    def __init__(self, token: int) -> None:
        self.token, self.widths = token, set[int]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.widths.add(input_ids.shape[1])
        return input_ids[:, -1] == self.token


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value)

    def end(self) -> None:
        self.ended = True


class Damage(LogitsProcessor):
    """Makes the base model's scores NaN."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores * torch.nan


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One printable character a token."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(33 + i): 3 + i for i in range(VOCABULARY - 3)}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
