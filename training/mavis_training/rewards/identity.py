"""What a reward is, as 16 hex digits: rewards that are kept say by it which text or weights gave them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from torch import nn

from mavis_logits.backbone.fingerprint import parameters_fingerprint

_OF_A_MODEL = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}
_IMMUTABLE = (str, bytes, int, float, complex, bool, type(None))


def sources_digest(module: ModuleType) -> str | None:
    """Of a module's text, comments and layout aside, and of the modules beside it that it imports; None if unknown."""
    files = user_files(module)
    return _hexadecimal(_parsed(path) for path in files) if files else None


def folder_digest(folder: Path) -> str:
    """Of the files of a saved model: a file of the Hub's cache is known by its name there, any other by its content."""
    parts = []
    for path in sorted(folder.iterdir()):
        if path.suffix in _OF_A_MODEL and path.is_file():
            real = path.resolve()
            content = real.name if real.parent.name == "blobs" else _file_digest(real)
            parts.append(f"{path.name} {content}")
    return _hexadecimal(parts)


def object_digest(reward: Any) -> str:
    """Of a reward given as an object: a function's code with the constants that it uses, or a model's weights."""
    return _hexadecimal(_parts(reward, set()))


def user_files(module: ModuleType) -> list[Path]:
    """The module's file, and those of its package or folder that it imports, directly or not; [] if it has none."""
    if not getattr(module, "__file__", None) or not str(module.__file__).endswith(".py"):
        return []
    first = Path(str(module.__file__)).resolve()
    package = module.__name__.partition(".")[0]
    found, todo = [], [(module.__name__, first)]
    while todo:
        name, path = todo.pop()
        if path in found:
            continue
        found.append(path)
        for imported in _imports(name, path):
            other = sys.modules.get(imported)
            file = getattr(other, "__file__", None)
            if not file or not str(file).endswith(".py"):
                continue
            beside = Path(file).resolve().is_relative_to(first.parent) and not _is_installed(first)
            if beside or imported.partition(".")[0] == package:
                todo.append((imported, Path(file).resolve()))
    return sorted(found)


def _imports(name: str, path: Path) -> Iterator[str]:
    """Names of what a file imports, its own package's too; some of them name no module but something in one."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            given = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(given, package or None) if node.level and package else given
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _parsed(path: Path) -> str:
    return ast.unparse(ast.parse(path.read_bytes()))


def _is_installed(path: Path) -> bool:
    paths = sysconfig.get_paths()
    return any(path.is_relative_to(paths[key]) for key in ("stdlib", "purelib", "platlib"))


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    """What a function computes with: its code, and what it refers to as far as that is code or does not change.

    Lists and dictionaries are left out: a function may count or cache in them.
    """
    if isinstance(value, _IMMUTABLE):
        yield repr(value)
    elif id(value) in seen:
        return
    elif isinstance(value, tuple | frozenset):
        for item in value if isinstance(value, tuple) else sorted(value, key=repr):
            yield from _parts(item, seen)
    elif isinstance(value, nn.Module):
        yield parameters_fingerprint(value)
    elif isinstance(value, partial):
        seen.add(id(value))
        yield from _parts((value.func, value.args, *value.keywords.values()), seen)
    elif hasattr(value, "__func__"):  # a method: the object, too
        seen.add(id(value))
        yield from _parts((value.__func__, value.__self__), seen)
    elif hasattr(value, "__code__"):
        seen.add(id(value))
        yield from _of_function(value, seen)
    elif isinstance(value, type | ModuleType):
        yield value.__name__
    else:
        seen.add(id(value))
        yield from _of_object(value, seen)


def _of_function(function: Any, seen: set[int]) -> Iterator[str]:
    code: CodeType = function.__code__
    yield from _of_code(code)
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    globals_ = [function.__globals__[name] for name in sorted(_names(code)) if name in function.__globals__]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for value in [*cells, *globals_, *defaults]:
        ours = getattr(value, "__module__", None) == function.__module__
        if isinstance(value, (*_IMMUTABLE, tuple, frozenset, nn.Module)) or ours:
            yield from _parts(value, seen)


def _of_object(value: Any, seen: set[int]) -> Iterator[str]:
    """A callable object: the code of its class, and the attributes that do not change or are models."""
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(kind.__dict__.get("__call__"), type(_is_filled)):
        yield from _parts(kind.__dict__["__call__"], seen)
    for name, held in sorted(vars(value).items() if hasattr(value, "__dict__") else ()):
        if isinstance(held, (*_IMMUTABLE, nn.Module)):
            yield name
            yield from _parts(held, seen)
        elif hasattr(held, "__dataclass_fields__"):
            yield f"{name} {held!r}"


def _of_code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield json.dumps([code.co_names, code.co_varnames])
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        else:
            yield repr(constant)


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hexadecimal(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} {part}\n".encode())
    return digest.hexdigest()[:16]
