"""Short hashes that tell whether a value function belongs to a tokenizer and a base model."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLES_PER_PARAMETER = 64


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that two tokenizers share exactly when every token has the same id in both."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{index}\0{token}\0".encode())
    return digest.hexdigest()[:16]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits of a model's weights: a strided sample of every parameter, rounded to bfloat16.

    The rounding makes the fingerprint the same for a checkpoint loaded in float32 or bfloat16, and for one stored in
    bfloat16 also when loaded in float16 (up to its range); fine-tuning or quantising the weights changes it.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLES_PER_PARAMETER)][:_SAMPLES_PER_PARAMETER]
        digest.update(name.replace("_orig_mod.", "").encode())
        digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
