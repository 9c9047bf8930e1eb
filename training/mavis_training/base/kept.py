"""What kept work depends on: recorded with it, and compared before it is used again.

An origin is a mapping of everything that shapes a result: settings by name, and digests of what they point to (weights,
prompts, trees, the code of rewards). Places of files and devices do not belong in it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mavis_logits.hub.files import find_file
from mavis_logits.models import SHIPPED, full_name, shipped_version

_READ_WHOLE = 64 * 2**20  # bytes; of larger files of weights, pieces of every tensor
_PIECES, _PIECE = 16, 64  # of a tensor; bytes
_HEADER = struct.Struct("<Q")  # of a safetensors file: the length of its description
_CONTENT = frozenset({".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja", ".py"})
# What commands leave beside a model: it tells of the model, and is no part of it.
_ASIDE = frozenset(
    {"metrics.json", "agreement.json", "train_config.json", "sft_config.json", "training.json", "card.json"}
)
_ASIDE_FOLDERS = frozenset({"checkpoints", "states", "runs", "original"})
_CONFIGS = ("config.json", "adapter_config.json", "mavis_bundle.json")


def digest(content: Any) -> str:
    """16 hex digits of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def as_json(content: Any) -> Any:
    """`content` as it comes back from a file."""
    return json.loads(json.dumps(content))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `outer.inner`; an empty mapping stands for itself."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
        found |= inner
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In words, every entry of two origins that is not the same, both as they come back from a file."""
    before, now = flat(old), flat(new)
    return [
        f"{name} was {_told(before, name)}, is now {_told(now, name)}"
        for name in [*before, *(name for name in now if name not in before)]
        if _told(before, name) != _told(now, name)
    ]


def _told(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "not there"


def require_same(
    what: str, old: Mapping[str, Any] | None, new: Mapping[str, Any], place: str, fresh: bool = True
) -> None:
    """Refuse work of another origin.

    Args:
        what: is kept, for the message.
        old: its origin; None where an older version kept it without one.
        new: the origin of what this run would make.
        place: the setting that says where it is kept.
        fresh: whether the command has this setting.

    Raises:
        ValueError: they differ; the message says in what, and the ways out.
    """
    found = ["it does not say of which (an older version kept it)"] if old is None else differences(old, as_json(new))
    if found:
        anew = "give fresh: true (--fresh true) to put this run's in its place, " if fresh else ""
        raise ValueError(
            f"{what}: {'; '.join(found)}. Use the same settings, {anew}or give another folder for {place}."
        )


def model_origin(source: str) -> dict[str, Any]:
    """What a model or value function is made of, by Hub id or folder: digests of its files, or its commit.

    What is found where nothing of it can be read is its name only.
    """
    if full_name(source) in SHIPPED:
        return {"name": full_name(source), "package": shipped_version(source)}
    folder = Path(source)
    if not folder.is_dir():
        return _of_hub(source)
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in _CONTENT and path.name not in _ASIDE and not _is_aside(path.relative_to(folder))
    ]
    found: dict[str, Any] = {"files": digest([[str(path.relative_to(folder)), file_digest(path)] for path in files])}
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") if adapter.exists() else None
    return found | ({"base": model_origin(base)} if base and Path(base) != folder else {})


def _is_aside(path: Path) -> bool:
    return any(part in _ASIDE_FOLDERS or part.startswith(".") for part in path.parts)


def _of_hub(name: str) -> dict[str, Any]:
    """A model of the Hub by the commit in whose folder of the cache its config lies."""
    for file in _CONFIGS:
        try:
            path = find_file(name, file, {})
        except (OSError, ValueError):
            break  # loading it says what is wrong
        if path is not None:
            return {"name": name, "commit": path.parent.name}
    return {"name": name}


def function_origin(source: str | Mapping[str, str]) -> Any:
    """`model_origin` of one value function, or of each by objective."""
    return model_origin(source) if isinstance(source, str) else {name: model_origin(s) for name, s in source.items()}


def file_digest(path: Path) -> str:
    """16 hex digits of a file's content; of a large file of weights, of its description and pieces of every tensor."""
    size = path.stat().st_size
    if path.suffix == ".safetensors" and size > _READ_WHOLE:
        return _weights_digest(path, size)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def files_digest(paths: Iterable[Path]) -> str:
    """Of several files, by name and content."""
    return digest([[path.name, file_digest(path)] for path in paths])


def _weights_digest(path: Path, size: int) -> str:
    found = hashlib.sha256(_HEADER.pack(size))
    with path.open("rb") as file:
        (length,) = _HEADER.unpack(file.read(_HEADER.size))
        described = file.read(length)
        found.update(described)
        tensors = (entry["data_offsets"] for name, entry in json.loads(described).items() if name != "__metadata__")
        for begin, end in sorted(tensors):
            step = max(_PIECE, (end - begin) // _PIECES)
            for at in range(begin, end, step):
                file.seek(_HEADER.size + length + at)
                found.update(file.read(min(_PIECE, end - at)))
    return found.hexdigest()[:16]
