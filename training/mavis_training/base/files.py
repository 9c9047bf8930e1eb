"""Files that appear whole or not at all: write beside the target, fsync, rename, fsync the folder."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

TEMPORARY_SUFFIX = ".tmp"
# How files that are taken for text begin, and what to do with them.
_NOT_TEXT = {
    b"PAR1": "a Parquet file: name it .parquet",
    b"\x1f\x8b": "compressed by gzip: gunzip it, or give it to mavis prompts under a name that ends in .gz",
    b"PK\x03\x04": "a zip archive: unpack it",
    codecs.BOM_UTF16_LE: "UTF-16: save it as UTF-8, or run iconv -f utf-16 -t utf-8",
    codecs.BOM_UTF16_BE: "UTF-16: save it as UTF-8, or run iconv -f utf-16 -t utf-8",
}
# No space left, quota exceeded, larger than the file system or a limit allows.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def replace_when_whole(path: Path, size: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success it takes the target's name in one step.

    A process killed at any instant leaves the old target (or none) and perhaps a `*.tmp` file, which readers ignore
    and the next writer of the same target overwrites.

    Args:
        path: the file to be written.
        size: bytes it will have, if known: the error of a full disk says so.

    Raises:
        OSError: there is no room for it (`errno` says why), or it cannot be written; nothing is left of it then.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        code = _error_number(error)
        if code not in _NO_ROOM:
            raise
        raise no_room(path, code, size) from error


def no_room(path: Path, code: int, size: int | None = None) -> OSError:
    """The error of a file for which there is no room: names it, the space that is free and the bytes it needs."""
    needed = f"it needs {_megabytes(size)} and " if size is not None else ""
    free = _megabytes(shutil.disk_usage(path.parent).free)
    return OSError(
        code,
        f"{path} could not be written ({os.strerror(code)}): {needed}{free} are free there. Make room and run the same "
        "command again: what was written before is whole and is kept.",
    )


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file, whole or not at all. Raises as `replace_when_whole`."""
    with replace_when_whole(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented UTF-8 JSON, whole or not at all. Raises as `replace_when_whole`."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=False) + "\n"
    write_bytes(path, text.encode())


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write `rows` as UTF-8 JSON, one a line, whole or not at all. Raises as `replace_when_whole`."""
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


@contextmanager
def open_safetensors(path: Path, framework: str) -> Iterator[safe_open]:
    """A safetensors file to read from, with arrays of `framework`: "pt" or "numpy".

    Raises:
        OSError: the file is missing, truncated or corrupt.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise OSError(f"{path} is truncated or corrupt ({error}): delete this one file and run again.") from error


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
        ValueError: it is no UTF-8 text, or a line is not a JSON object; the message has its number.
    """
    return [row for _, row in numbered_json_lines(path)]


def numbered_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file, each with the number of its line. Raises as `read_json_lines`."""
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            hint = " JSON lines have no commas between them and no list around them." if line[0] == "[" else ""
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}).{hint}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
        yield number, row


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text that are not blank, without their ends, each with its number.

    A byte order mark is passed over, and lines may end as on Windows.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is no UTF-8 text; the message names the line and what the file seems to be.
    """
    content = Path(path).read_bytes()
    for magic, kind in _NOT_TEXT.items():
        if content.startswith(magic):
            raise ValueError(f"{path} is not UTF-8 text but {kind}.")
    # Not splitlines(), which also splits at characters that stand unescaped within JSON, such as U+2028.
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip("\r")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line, 0x"
                f"{line[error.start]:02x}). Save the file as UTF-8; if it is Latin-1, for example: "
                f"iconv -f latin1 -t utf-8 {path} > utf8-{Path(path).name}"
            ) from error
        if text.strip():
            yield number, text


def _fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _error_number(error: BaseException) -> int | None:
    """The system's number of an error; HDF5 and safetensors (written in Rust) tell it in the text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = re.search(r"(?:errno = |os error |\bcode: )(\d+)", str(error))
    return int(told[1]) if told else None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
