"""Columns of numbers as one compressed, checksummed HDF5 file, which appears whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..base.files import write_bytes

FORMAT_VERSION = 1


def write_columns(path: Path, columns: dict[str, NDArray[Any]], attributes: dict[str, str]) -> None:
    """Write columns as one compressed HDF5 file, whole or not at all."""
    if path.exists():
        raise FileExistsError(
            f"{path} exists already; shards and rewards are never changed. Delete it to make it anew."
        )
    # Made in memory (a shard is small): HDF5 itself does not recover from a full disk.
    with h5py.File(path, "w", driver="core", backing_store=False) as file:
        file.attrs.update({"format_version": FORMAT_VERSION, "digest": _digest(columns)} | attributes)
        for name, column in columns.items():
            filters = {"compression": "gzip", "compression_opts": 9, "shuffle": True} if column.size else {}
            file.create_dataset(name, data=column, **filters)
        file.flush()
        content = file.id.get_file_image()
    write_bytes(path, content)


def read_columns(path: Path) -> dict[str, NDArray[Any]]:
    """Read all columns that `_write` wrote.

    Raises:
        OSError: the file is truncated, or differs from what was written.
        ValueError: it is of a newer format.
    """
    digest = attributes_of(path)["digest"]
    try:
        with h5py.File(path, "r") as file:
            columns = {name: dataset[()] for name, dataset in file.items()}
            found = _digest(columns)
    except Exception as error:  # on damaged bytes h5py raises anything from OSError to SystemError
        raise _corrupt(path, repr(error)) from error
    if found != digest:
        raise _corrupt(path, "its checksum does not match")
    return columns


def attributes_of(path: Path) -> dict[str, str]:
    """The attributes that `_write` wrote. Raises as `_read`."""
    try:
        with h5py.File(path, "r") as file:
            attributes = {name: str(value) for name, value in file.attrs.items()}
            version = int(attributes["format_version"])
            attributes["digest"]
    except Exception as error:
        raise _corrupt(path, repr(error)) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, this mavis-logits reads up to {FORMAT_VERSION}: upgrade it."
        )
    return attributes


def _corrupt(path: Path, why: str) -> OSError:
    return OSError(f"{path} is truncated or corrupt ({why}): delete this one file and rerun the step that wrote it.")


def _digest(columns: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(f"{name} {columns[name].dtype.str} {columns[name].shape}".encode())
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()
