"""Files that appear whole or not at all: write beside the target, fsync, rename, fsync the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def replace_when_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success it takes the target's name in one step.

    A process killed at any instant leaves the old target (or none) and perhaps a `*.tmp` file, which readers ignore
    and the next writer of the same target overwrites.

    Args:
        path: the file to be written.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented UTF-8 JSON, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=False) + "\n"
    with replace_when_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: the file is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it and run the step that writes it again."
        ) from error


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file of objects, one a line (blank lines are skipped).

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: a line is not a JSON object; the message has its number.
    """
    rows: list[dict[str, Any]] = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
            rows.append(row)
    return rows


def _fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
