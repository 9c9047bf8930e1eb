"""Reading weights: from a folder or the Hub, safetensors only, whole or not at all, with errors that say what to do."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from huggingface_hub import constants, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD_WEIGHTS = "head.safetensors"  # of a value model that is saved as an adapter
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
LOADING_ARGUMENTS = (*HUB_ARGUMENTS, "device_map", "attn_implementation", "quantization_config")
_RETRIES = (1, 4)  # seconds before a download is tried again
_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/")


@dataclass(frozen=True)
class Source:
    """Where a value function lies.

    Attributes:
        name: Hub id or folder.
        revision: branch, tag or commit; None for the default branch.
        subfolder: in which it lies, with `/`; None for the top.
    """

    name: str
    revision: str | None = None
    subfolder: str | None = None

    def arguments(self, loading: Mapping[str, Any]) -> dict[str, Any]:
        """`loading`, arguments of `from_pretrained`, with the revision and the subfolder of this source."""
        rest = {key: value for key, value in loading.items() if key not in ("revision", "subfolder")}
        own = {"revision": self.revision, "subfolder": self.subfolder}
        return rest | {key: value for key, value in own.items() if value is not None}


@contextmanager
def damage_is_os_error(name: str) -> Iterator[None]:
    """Turn safetensors' own error into an `OSError` that names the checkpoint."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"{name} has a corrupt or half-written safetensors file ({error}): download or save it again"
        ) from error


def load_complete(
    from_pretrained: Callable[..., Any],
    name: str,
    spare: Literal["all", "outside", "none"] = "all",
    replaced: Sequence[str] = (),
    **kwargs: Any,
) -> Any:
    """`from_pretrained(name)`, refusing pickles and checkpoints that do not fill the model.

    Args:
        from_pretrained: of a transformers class.
        name: Hub id or folder.
        spare: which weights that find no place in the model a checkpoint may have: all, as a causal model has an
            output layer that its decoder lacks; those outside of its parts; or none.
        replaced: weights that may be missing, since others will take their place.
        kwargs: of `from_pretrained`.

    Raises:
        OSError: nothing there, no safetensors file, a damaged one, or one without some of the weights or with some of
            another shape.
    """
    with damage_is_os_error(name):
        find_weights(name, WEIGHTS, hub_arguments(kwargs))  # so that they are checked on arrival
        settings = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, loading = from_pretrained(name, **kwargs | settings)
    wrong = sorted(item for item in loading["mismatched_keys"] if item[0] not in replaced)
    if wrong:
        key, found, expected = wrong[0]
        raise OSError(
            f"{name} has {len(wrong)} weights of another shape than its config says, {key} among them: "
            f"{list(found)}, expected {list(expected)}. Download or save it again"
        )
    missing = sorted(set(loading["missing_keys"]) - set(replaced))
    if missing:
        raise OSError(f"{name} lacks {len(missing)} weights, {missing[0]} among them: download or save it again")
    extra = sorted(k for k in loading["unexpected_keys"] if spare == "none" or (spare != "all" and _inside(model, k)))
    if extra:
        raise OSError(
            f"{name} has {len(extra)} weights that its config knows no place for, {extra[0]} among them: its values "
            "would be off without them. Download or save it again"
        )
    return model


def _inside(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight that was not used belongs inside one of the model's parts, as a further layer or an adapter."""
    parts = key.split(".")[:-1]
    modules = dict(model.named_modules())
    known = max((n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in modules), default=0)
    return known > 0 and modules[".".join(parts[:known])] is not model.base_model


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that say where on the Hub, and how, a file is found."""
    return {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}


def find_weights(name: str, file: str, hub: Mapping[str, Any], part: str = "") -> list[Path]:
    """The safetensors file `file`, or those of its shards that hold tensors with `part` in their names; [] for none."""
    index = find_file(name, f"{file}.index.json", hub)
    if index is None:
        shards = {file}
    else:
        shards = {shard for key, shard in read_json(index).get("weight_map", {}).items() if part in key}
    found = (find_file(name, shard, hub) for shard in sorted(shards))
    return [path for path in found if path is not None]


def find_file(name: str, file: str, hub: Mapping[str, Any]) -> Path | None:
    """The path of a file of a folder or Hub repository, downloaded if need be; None if there is no such file.

    A download of weights is compared with the sha256 that the Hub announces for it: `huggingface_hub` itself compares
    sizes only.

    Args:
        name: Hub id or folder.
        file: its path inside, with `/`.
        hub: any of `HUB_ARGUMENTS`.

    Raises:
        OSError: no such repository or revision, no permission, no connection, or a file that arrived damaged.
        ValueError: the path leads out of the repository.
    """
    subfolder = str(hub.get("subfolder") or "")
    check_inside(subfolder, file)
    if Path(name).is_dir():
        path = Path(name, subfolder, file)
        return path if path.is_file() else None
    arguments = {key: value for key, value in hub.items() if key != "subfolder"}
    inside = str(PurePosixPath(subfolder, file))
    with hub_errors(name, hub):
        before = try_to_load_from_cache(name, inside, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
        try:
            path = _download(name, inside, arguments)
        except LocalEntryNotFoundError:
            known_to_be_absent = before is not None and not isinstance(before, str)
            if known_to_be_absent or (_offline(hub) and _has_snapshot(name, hub)):
                return None
            raise
        except EntryNotFoundError:
            return None
    if hub.get("force_download") or not isinstance(before, str) or Path(before) != path:
        _check_download(name, inside, path)
    return path


def _download(name: str, file: str, arguments: Mapping[str, Any]) -> Path:
    """`hf_hub_download`, which asks again for a file's metadata when the Hub stumbles, but not for the file itself."""
    for seconds in _RETRIES:
        try:
            return Path(hf_hub_download(name, file, **arguments))
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            time.sleep(seconds)
    return Path(hf_hub_download(name, file, **arguments))


def check_inside(*parts: str) -> None:
    """Raise `ValueError` if a path of `parts`, with `/`, leads out of the folder that it starts in."""
    for part in parts:
        if PurePosixPath(part).is_absolute() or ".." in part.replace("\\", "/").split("/"):
            raise ValueError(f"{part!r} leads out of the repository: only files inside it are read")


def commit_of(path: Path | None) -> str | None:
    """The commit that a file in the Hub's cache belongs to; None for other files."""
    match = _COMMIT.search(path.as_posix()) if path is not None else None
    return match[1] if match else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: no valid JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is no valid JSON ({error}): download or save it again") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} holds {type(content).__name__}, expected a JSON object: download or save it again")
    return content


def one_line(error: BaseException) -> str:
    """What caused an error of the Hub's client, in one line."""
    return " ".join(str(error.__cause__ or error).split())


@contextmanager
def hub_errors(name: str, hub: Mapping[str, Any]) -> Iterator[None]:
    """The client's errors as `OSError`s that say what to do."""
    revision = hub.get("revision") or "main"
    try:
        yield
    except HFValidationError as error:
        raise OSError(f"{name} is no folder here, and no Hub id such as org/name: {error}") from error
    except GatedRepoError as error:
        raise OSError(f"{name} is gated: ask for access on its page, then log in (hf auth login)") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{name} is no folder here, and there is no such repository on {constants.ENDPOINT}, or it is private: "
            "check the name; for a private one log in (hf auth login) or pass token="
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"{name} has no revision {revision!r}: give a branch, a tag or a commit that it has") from error
    except LocalEntryNotFoundError as error:
        if _offline(hub):
            raise OSError(
                f"{name} is no folder here, and its revision {revision!r} is not in the cache, beyond which nothing is "
                "looked for offline: load it once with a connection"
            ) from error
        raise OSError(
            f"{name} could not be had from {constants.ENDPOINT}, and is not in the cache: {one_line(error)}. "
            "Check the connection and try again"
        ) from error
    except HTTPError as error:  # an answer with an error status, or no answer
        raise OSError(f"{name} could not be had from {constants.ENDPOINT}: {one_line(error)}. Try again") from error


def _offline(hub: Mapping[str, Any]) -> bool:
    return bool(hub.get("local_files_only")) or is_offline_mode()


def _has_snapshot(name: str, hub: Mapping[str, Any]) -> bool:
    """Whether some files of that revision are in the cache."""
    folder = Path(hub.get("cache_dir") or constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    revision = str(hub.get("revision") or "main")
    return (folder / "refs" / revision).is_file() or (folder / "snapshots" / revision).is_dir()


def _check_download(name: str, file: str, path: Path) -> None:
    """Compare a file in the Hub's cache with its sha256, which the cache names large files by; delete a wrong one."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != blob.name:
        path.unlink()
        blob.unlink()
        raise OSError(
            f"{file} of {name} arrived damaged (sha256 {found[:12]}..., expected {blob.name[:12]}...) and was deleted "
            "from the cache: download it again"
        )
