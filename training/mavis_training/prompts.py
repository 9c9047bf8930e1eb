"""The JSON-lines file of prompts, and what a model reads of it."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mavis_logits.demo.chat import ChatTemplate, encode_prompt


def read_prompts(source: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file with a unique `id` and a non-empty `prompt` each.

    Args:
        source: the file, such as `make_prompts` writes.
        limit: at most this many rows, from the top of the file; None for all.

    Raises:
        OSError: there is no such file.
        ValueError: a line is no JSON object, lacks a field, is empty or repeats an id; the message names the line.
    """
    rows: dict[str, dict[str, Any]] = {}
    # Not splitlines(), which also splits at characters that stand unescaped within JSON, such as U+2028.
    for number, line in enumerate(StringIO(Path(source).read_text(encoding="utf-8")), start=1):
        if limit is not None and len(rows) >= limit:
            break
        try:
            row = json.loads(line)
            identifier, prompt = row["id"], row["prompt"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{source}, line {number}: expected an object with 'id' and 'prompt' ({error!r})"
            ) from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{source}, line {number}: the prompt of {identifier!r} is empty; remove the line")
        if identifier in rows:
            raise ValueError(f"{source}, line {number}: the id {identifier!r} occurs twice; ids must be unique")
        rows[identifier] = row
    if not rows:
        raise ValueError(f"{source} has no prompts")
    return list(rows.values())


def encode_prompts(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    chat_template: ChatTemplate = "auto",
) -> list[list[int]]:
    """Token ids of the prompt of every row (its `conversation`, if it has one); see `encode_prompt`.

    Raises:
        ValueError: prompts longer than `max_tokens`; the message names the first ones.
    """
    encoded = [encode_prompt(row.get("conversation") or row["prompt"], tokenizer, chat_template) for row in rows]
    long = [f"{row['id']} ({len(ids)})" for row, ids in zip(rows, encoded, strict=True) if len(ids) > max_tokens]
    if long:
        raise ValueError(
            f"{len(long)} prompts have more than {max_tokens} tokens: {', '.join(long[:5])}. Drop them or "
            "raise max_prompt_tokens."
        )
    return encoded
