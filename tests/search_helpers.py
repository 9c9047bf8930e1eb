"""What the tests of the search strategies share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mavis_logits import MavisOutput, ValueHead, ValueModel
from mavis_logits.testing import recompute_head_values, recompute_values
from tiny import EOS, PAD


def run(base: PreTrainedModel, strategy, prompts: dict[str, Tensor], seed: int = 0, **options) -> MavisOutput:
    """`generate` with a strategy, after seeding."""
    torch.manual_seed(seed)
    options = {"do_sample": True, "max_new_tokens": 8} | options
    return base.generate(**prompts, custom_generate=strategy, return_dict_in_generate=True, **options)


def texts(sequences: Tensor, prompts: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every row, without padding; checks that prompts and padding are where they should be."""
    count = len(sequences) // len(prompts["input_ids"])
    width = prompts["input_ids"].shape[1]
    found = []
    for i, row in enumerate(sequences.tolist()):
        mask = prompts["attention_mask"][i // count].bool()
        assert row[:width] == prompts["input_ids"][i // count].tolist()
        new = row[width:]
        if EOS in new:
            end = new.index(EOS) + 1
            assert set(new[end:]) <= {PAD}
            new = new[:end]
        found.append((prompts["input_ids"][i // count][mask].tolist(), new))
    return found


def true_values(
    base: PreTrainedModel, functions: list[ValueModel | ValueHead], rows: list[tuple[list[int], list[int]]]
) -> Tensor:
    """[R, M] values of whole sequences, each computed from scratch."""
    return torch.stack([torch.cat(list(_values(base, functions, prompt + new))) for prompt, new in rows])


def _values(base: PreTrainedModel, functions: list[ValueModel | ValueHead], sequence: list[int]) -> Iterator[Tensor]:
    last = torch.tensor(sequence[-1:])
    for function in functions:
        if isinstance(function, ValueModel):
            yield recompute_values(function, sequence[:-1], last)[0]
        else:
            yield recompute_head_values(function, base, sequence[:-1], last)[0]


def row_of(prompts: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One prompt alone, without padding."""
    mask = prompts["attention_mask"][row].bool()
    return {name: x[row : row + 1, mask] for name, x in prompts.items()}
