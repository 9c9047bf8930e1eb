"""The file of prompts, and what a model reads of it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mavis_logits.core.chat import ChatTemplate, encode_prompt

from .files import numbered_json_lines, numbered_lines
from .formats import Columns, Dropped, Limits, column_prompt


def read_prompts(source: str, limit: int | None = None, skip: int = 0) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file with a unique `id` (a text) and a non-empty `prompt` each, or the lines of a .txt file.

    A row without an id gets one made from its prompt, and is left out, with a warning, if that is there already. A
    prompt that is a list of messages, as TRL has them, becomes the row's `conversation`, and its last user turn the
    prompt. A .txt file has one prompt a line.

    Args:
        source: the file, such as `make_prompts` writes.
        limit: at most this many rows; None for all.
        skip: rows to leave out at the top of the file.

    Raises:
        OSError: there is no such file.
        ValueError: it is no UTF-8 text, or a line is no JSON object, has no prompt, an empty one or one that is no
            text, or repeats an id; the message names the line.
    """
    rows: dict[str, dict[str, Any]] = {}
    repeated = 0
    for number, given in numbered_rows(source):
        try:
            row = _normalised(given)
        except (ValueError, Dropped) as error:
            raise ValueError(f"{source}, line {number}: {error}") from error
        identifier = row["id"]
        if identifier in rows:
            if given.get("id") is None:
                repeated += 1
                continue
            raise ValueError(f"{source}, line {number}: the id {identifier!r} occurs twice; ids must be unique")
        rows[identifier] = row
        if limit is not None and len(rows) == skip + limit:
            break
    kept = list(rows.values())[skip:]
    if not kept:
        raise ValueError(f"{source} has no prompts" + (f" after the first {len(rows)}" if rows else ""))
    if repeated:
        warnings.warn(
            f"{source}: {repeated} lines repeat a prompt that stands before them and are left out", stacklevel=2
        )
    return kept


def numbered_rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a JSON-lines file, or of a .txt file with one `prompt` a line, each with its line's number."""
    if Path(source).suffix == ".txt":
        return ((number, {"prompt": line}) for number, line in numbered_lines(source))
    return numbered_json_lines(source)


def prompt_key(prompt: str, conversation: Any = None) -> str:
    """What makes a prompt the same as another: its text and, if it has several turns, those."""
    return json.dumps([prompt, conversation], ensure_ascii=False)


def same_prompt_key(prompt: str, conversation: Any = None) -> str:
    """What makes a prompt the same as another for learning: its text (and turns, if it has several) without regard to
    case and spaces."""
    return prompt_key(" ".join(prompt.split()), conversation).casefold()


def prompt_id(prompt: str, conversation: Any = None) -> str:
    """An id made from the prompt."""
    return hashlib.sha256(prompt_key(prompt, conversation).encode()).hexdigest()[:16]


def _normalised(row: dict[str, Any]) -> dict[str, Any]:
    """The row with an id and a prompt that are texts; raises `ValueError` or `Dropped` with what is wrong with it."""
    if "prompt" not in row:
        raise ValueError(
            f"expected an object with 'prompt', it has {', '.join(sorted(row)) or 'nothing'}: rename the field, or let "
            "mavis prompts --prompt_column NAME make the file"
        )
    prompt, identifier, conversation = row["prompt"], row.get("id"), row.get("conversation")
    if isinstance(prompt, list):
        example = column_prompt(row, Columns(), Limits())
        prompt, conversation = example.prompt, example.conversation
    if not isinstance(prompt, str) or not prompt.strip():
        kind = "empty" if prompt is None or isinstance(prompt, str) else f"of type {type(prompt).__name__}, not text"
        raise ValueError(f"the prompt of {identifier!r} is {kind}; remove the line")
    if identifier is None:
        identifier = prompt_id(prompt, conversation)
    elif isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise ValueError(f"the id {identifier!r} is {type(identifier).__name__}, expected a text or a whole number")
    row = row | {"id": str(identifier), "prompt": prompt}
    return row if conversation is None else row | {"conversation": conversation}


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
