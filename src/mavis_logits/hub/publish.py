"""Publishing on the Hub: a folder is checked first, and then appears in the repository in one commit, or not at all."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import CommitInfo, CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_token, validate_repo_id
from safetensors import SafetensorError, safe_open

from .bundle import BUNDLE_FILE, Bundle, load_bundle, read_bundle
from .cards import CARD, CARD_DETAILS, KINDS, METRICS, CardDetails, render_bundle_card, render_folder
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD_WEIGHTS, WEIGHTS, one_line, read_json
from .generated import GENERATE_FILE, REQUIREMENTS_FILE, generate_source, requirements
from .quality import require_foresight

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy")
_PUBLISHED = (
    "config.json", BUNDLE_FILE, ADAPTER_CONFIG, "*.md", "*.png", "*.jpg",
    "*.svg", CARD_DETAILS, METRICS, "agreement.json", "train_config.json", "LICENSE*", "NOTICE*", ".gitattributes",
)  # fmt: skip
_IGNORED = (".git", ".cache", "__pycache__", ".DS_Store")
# Of an earlier push these would be read, or run, beside or in place of the new ones.
_REPLACED = ("config.json", BUNDLE_FILE, ADAPTER_CONFIG, CARD_DETAILS, METRICS)
_CODE = (GENERATE_FILE, REQUIREMENTS_FILE)


class Saved(Protocol):
    """A value function in memory."""

    def save_pretrained(self, save_directory: Path, **kwargs: Any) -> None:
        """Write it into a folder."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    custom_generate: bool = False,
    allow_weak: bool = False,
) -> CommitInfo:
    """Publish a saved value function or a bundle.

    The card (README.md) is rendered anew with the repository's id in its examples; one that was written or changed by
    hand goes as it is. Files of an earlier push that would be read beside the new ones are deleted in the same commit.

    Args:
        folder: what `save_pretrained`, training or `mavis bundle` wrote.
        repo_id: `org/name`; made if it does not exist.
        private: whether a new repository is private.
        token: with permission to write; by default that of `hf auth login` or `HF_TOKEN`.
        revision: branch to push to; made if it does not exist.
        create_pr: open a pull request in place of committing.
        commit_message, commit_description: of the commit.
        custom_generate: for a bundle: also write `custom_generate/generate.py`, so that
            `model.generate(custom_generate=repo_id, trust_remote_code=True)` steers.
        allow_weak: publish also what foresees nothing, as its metrics say.

    Raises:
        ValueError: no value function and no bundle, one that foresees nothing, a bundle with a mistake, a pickle, or a
            link out of the folder.
        OSError: no such folder, a damaged or missing file, no permission, or no connection. Nothing was changed then.
    """
    folder = Path(folder)
    files = checked_files(folder)
    for path in files.values() if not allow_weak else ():
        if path.name == METRICS:
            require_foresight(path.parent)
    generated = _generated_files(folder, repo_id, custom_generate)
    kind = "bundle" if BUNDLE_FILE in files else KINDS[read_json(folder / "config.json")["model_type"]]
    operations: list[CommitOperation] = [
        CommitOperationAdd(name, path) for name, path in files.items() if name not in generated
    ]
    operations += [CommitOperationAdd(name, text.encode()) for name, text in generated.items()]
    api = HfApi(token=token, library_name="mavis-logits")
    with push_errors(repo_id):
        validate_repo_id(repo_id)
        if token is False or (token in (None, True) and get_token() is None):
            raise LocalTokenNotFoundError("no token")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        new = {*files, *generated}
        operations += [
            CommitOperationDelete(name)
            for name in api.list_repo_files(repo_id, revision=revision)
            if name not in new and _is_replaced(name)
        ]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload {kind}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def push_function(
    function: Saved,
    repo_id: str,
    *,
    details: CardDetails | None = None,
    metrics: Mapping[str, Any] | None = None,
    tags: list[str] | None = None,
    max_shard_size: int | str | None = None,
    **push: Any,
) -> CommitInfo:
    """Publish a value function that is in memory: `push_to_hub` of `ValueModel` and `ValueHead`.

    Args:
        function: the value model or value head; one with a LoRA adapter becomes an adapter repository.
        repo_id: `org/name`; made if it does not exist.
        details: words and evaluation for the card.
        metrics: `metrics.json`, as training writes it; without them the card says that nothing was measured.
        tags: further tags of the card.
        max_shard_size: of the weights' files.
        push: further arguments of `push_folder`.

    Raises:
        ValueError, OSError: as for `push_folder`.
    """
    details = details or CardDetails()
    details = replace(details, tags=[*details.tags, *(tags or [])])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        function.save_pretrained(folder, **shards)
        (folder / CARD_DETAILS).write_text(details.to_json(), encoding="utf-8")
        if metrics is not None:
            (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        return push_folder(folder, repo_id, **push)


def checked_files(folder: Path, goes_out: bool = True) -> dict[str, Path]:
    """The files of a value function or a bundle that are published, by their path in the repository, after a look.

    Those are what it takes to use it, its card with pictures, how it was trained and measured, and a licence. What else
    lies there, such as hidden states of the training prompts or a trainer's checkpoints, stays here.

    Args:
        folder: of one or the other.
        goes_out: to others, who need the base model of a policy from somewhere else than a folder.

    Raises:
        ValueError: neither of the two, a mistake in a bundle, a pickle, or a link that leads out of the folder.
        OSError: no such folder, or files that are missing or damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give one that a value function or a bundle was saved in")
    functions = {"": folder}
    if (folder / BUNDLE_FILE).is_file():
        bundle, _ = read_bundle(folder) or (None, None)
        load_bundle(folder)
        assert bundle is not None
        own = {str(entry.subfolder) for entry in bundle.value_functions.values() if entry.repo is None}
        functions = {f"{name}/": folder / name for name in sorted(own)}
    weights = {start + name for start, function in functions.items() for name in _checked_weights(function, goes_out)}
    walked = _walk(folder, (*functions, *(f"{name.split('/')[0]}/" for name in _CODE)))
    return {name: path for name, path in walked if name in weights | set(_CODE) or _belongs(name, functions)}


def left_out(folder: Path) -> dict[str, int]:
    """What of a folder is not published: bytes by name of the file, or of the first folder that holds several."""
    published, sizes = set(checked_files(folder).values()), dict[str, int]()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and path not in published and not any(part in _IGNORED for part in inside.parts):
            name = inside.as_posix() if len(inside.parts) == 1 else f"{inside.parts[0]}/"
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return sizes


def _belongs(name: str, functions: Iterable[str]) -> bool:
    """Whether a file, no weights, is part of what is published: a value function's, or beside those of a bundle."""
    inside = next((name.removeprefix(start) for start in functions if name.startswith(start)), name)
    return "/" not in inside and any(fnmatch(inside, pattern) for pattern in _PUBLISHED)


def _walk(folder: Path, starts: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """The files in `folder`, and in those of its folders whose paths begin with one of `starts`."""
    root, kept = folder.resolve(), [start for start in starts if start]
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        elsewhere = len(inside.parts) > 1 and not any(inside.as_posix().startswith(start) for start in kept)
        if elsewhere or any(part in _IGNORED for part in inside.parts):
            continue
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path} is a link out of the folder: put the file itself there, or remove the link")
        if path.is_file():
            if path.suffix in _PICKLES:
                raise ValueError(f"{path} may be a pickle, which is not published: remove it (safetensors only)")
            yield inside.as_posix(), path


def _checked_weights(folder: Path, goes_out: bool = True) -> set[str]:
    """Names of the files that hold the weights of the value function in `folder`; raises unless it is whole."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no value function (no config.json) and no bundle (no {BUNDLE_FILE}): save_pretrained of a "
            "ValueModel or ValueHead, or mavis tune, writes the one, mavis bundle the other"
        )
    config = read_json(folder / "config.json")
    kind, index = config.get("model_type"), folder / f"{WEIGHTS}.index.json"
    is_policy = kind == "mavis_value_policy"  # which is an adapter and no more
    place = "base_model" if is_policy else "backbone"  # of the Hub id of the model that an adapter lies on
    backbone = config.get(place)
    if kind not in KINDS:
        raise ValueError(f"{folder} holds a model of type {kind!r}, expected a value function ({' or '.join(KINDS)})")
    if is_policy or (folder / ADAPTER_CONFIG).is_file():
        needed = goes_out or not is_policy  # whoever steers by a policy has the model that it lies on
        if needed and backbone is not None and (Path(backbone).is_dir() or Path(backbone).is_absolute()):
            raise ValueError(
                f"{folder} is an adapter on layers of {backbone}, a folder that nobody else has: publish that model, "
                f"too, and write its Hub id into config.json as {place}"
            )
        wanted = {ADAPTER_WEIGHTS} if is_policy else {ADAPTER_WEIGHTS, HEAD_WEIGHTS}
    elif index.is_file():
        wanted = set(read_json(index).get("weight_map", {}).values())
    else:
        wanted = {WEIGHTS}
    for name in sorted(wanted):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {name}: save the value function again")
        try:
            with safe_open(path, framework="pt") as opened:
                opened.keys()
        except SafetensorError as error:
            raise OSError(f"{path} is corrupt or half-written ({error}): save the value function again") from error
    return wanted | ({index.name} if index.is_file() else set())


def _generated_files(folder: Path, repo_id: str, custom_generate: bool) -> dict[str, str]:
    """The text of the files that are written for the repository: cards, and code for `custom_generate=`."""
    read = read_bundle(folder)
    if read is None:
        if custom_generate:
            raise ValueError(f"custom_generate is for bundles, and {folder} is none: make one with mavis bundle")
        return _anew(folder, CARD, repo_id, lambda name: render_folder(folder, name))
    bundle, _ = read
    details = bundle_details(folder, bundle)
    before, now = (folder / GENERATE_FILE).is_file(), custom_generate or (folder / GENERATE_FILE).is_file()
    texts = {GENERATE_FILE: generate_source(repo_id), REQUIREMENTS_FILE: requirements()} if now else {}
    for subfolder in sorted({str(e.subfolder) for e in bundle.value_functions.values() if e.repo is None}):
        title, render = f"{repo_id}: {subfolder}", partial(render_folder, folder / subfolder)
        texts |= _anew(folder, f"{subfolder}/{CARD}", title, render)
    if _anew(folder, CARD, repo_id, lambda name: render_bundle_card(name, bundle, details, before)):
        texts[CARD] = render_bundle_card(repo_id, bundle, details, now)
    return texts


def _anew(folder: Path, card: str, title: str, render: Callable[[str], str]) -> dict[str, str]:
    """The card under a new title, by its path; {} for one that was written or changed by hand."""
    path = folder / card
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        found = re.search("^# (.+)$", text, re.MULTILINE)
        if found is None or text != render(found[1]):
            return {}
    return {card: render(title)}


def bundle_details(folder: Path, bundle: Bundle) -> CardDetails:
    """What the card of one of a bundle's own value functions says; it is said of the bundle, too."""
    for entry in bundle.value_functions.values():
        path = folder / str(entry.subfolder) / CARD_DETAILS
        if entry.repo is None and path.is_file():
            return CardDetails.read(path)
    return CardDetails()


def _is_replaced(name: str) -> bool:
    weights = name.endswith((".safetensors", ".safetensors.index.json", *_PICKLES))
    return weights or name in _CODE or name.split("/")[-1] in _REPLACED


@contextmanager
def push_errors(repo_id: str) -> Iterator[None]:
    """The client's errors as `OSError`s that say what happened and what to do."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id such as org/name: {error}") from error
    except LocalTokenNotFoundError as error:
        raise OSError(f"pushing to {repo_id} needs a token that may write: hf auth login, or token=") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
            raise OSError(
                f"the token has no permission to write to {repo_id} on {constants.ENDPOINT}, or is not valid "
                f"({status}): check the name, and log in with a token that may write (hf auth login)"
            ) from error
        raise OSError(f"{repo_id} was left as it was; the Hub says {status}: {one_line(error)}. Try again") from error
    except (RuntimeError, OSError, HTTPError) as error:  # the client's words for an upload that was cut off
        raise OSError(
            f"{repo_id} was left as it was; the upload did not get through ({one_line(error)}). Push again: "
            "what has arrived is not sent twice"
        ) from error
