"""``mavis doctor``: what the library sees in a model, how it would read it, and why not faster."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parser import Parser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..backbone import Backbone

NEEDED = ("mavis-logits", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface-hub")
OPTIONAL = {
    "training": ("datasets", "h5py", "trl", "jsonargparse", "tqdm"),
    "ui": ("gradio", "gguf"),
    "demo": ("rich", "matplotlib", "gguf"),
    "pareto": ("moocore",),
    "vllm": ("vllm",),
}
MEANING = {
    "packed": "one forward over a ragged cache, void queries left out: the fastest way",
    "masked": "one forward over a ragged cache",
    "repeated": "the state after the text, repeated for every candidate",
    "plain": "every candidate from scratch: slow",
}


def main(argv: list[str]) -> int:
    """Print what `Backbone` answers about a model."""
    arguments = parser().parse_args(argv)
    if arguments.model is None:
        found = environment()
        print(json.dumps(found, indent=1) if arguments.json else "\n".join(described(found)))
        return 0

    # Imported only here, so that `--help` answers at once.
    import transformers

    from ..backbone import Backbone
    from ..hub.files import find_file
    from ..models import load_chat_model

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.model != "smollm2" and find_file(arguments.model, "tokenizer_config.json", {}) is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model)  # it need not be a chat model
    else:
        model, _ = load_chat_model(arguments.model)
    lines = report(Backbone.of(model))
    if arguments.json:
        print(json.dumps(as_fields(lines), indent=1))
    else:
        print("\n".join(lines))
    return 0


def environment() -> dict[str, Any]:
    """Versions, devices, what is optional and missing, and value functions in the Hub's cache."""
    import torch

    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {name: _version(name) for name in NEEDED},
        "devices": _devices(),
        "optional": {extra: {name: _version(name) for name in names} for extra, names in OPTIONAL.items()},
        "value_functions": cached_value_functions(),
    }


def described(found: dict[str, Any]) -> list[str]:
    """What `environment` found, in words."""
    lines = [f"python            {found['python']}, {found['machine']}"]
    lines += [f"{name:<17} {version or 'missing'}" for name, version in found["versions"].items()]
    lines.append(f"devices           {', '.join(found['devices'])}")
    for extra, names in found["optional"].items():
        missing = [name for name, version in names.items() if version is None]
        told = f'not there: {", ".join(missing)}; pip install "mavis-logits[{extra}]"' if missing else "there"
        lines.append(f"extra {extra:<11} {told}")
    lines.append(f"value functions   {', '.join(found['value_functions']) or 'none in the cache of the Hub'}")
    return lines


def as_fields(lines: list[str]) -> dict[str, str]:
    """The lines of `report` by their names; one without a name goes on with the one before."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        name = line[:18].strip() or name
        fields[name] = f"{fields[name]}; {line[18:]}" if name in fields else line[18:]
    return fields


def cached_value_functions() -> list[str]:
    """Repositories in the Hub's cache whose config is a value function's or a bundle's."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from ..hub.bundle import BUNDLE_FILE

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    found = []
    for repository in repositories:
        files = {file.file_name: file.file_path for revision in repository.revisions for file in revision.files}
        if BUNDLE_FILE in files or _is_value_function(files.get("config.json")):
            found.append(repository.repo_id)
    return sorted(found)


def _is_value_function(config: Path | None) -> bool:
    try:
        return config is not None and str(json.loads(config.read_text()).get("model_type", "")).startswith(
            "mavis_value"
        )
    except (OSError, ValueError):
        return False


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def report(backbone: Backbone) -> list[str]:
    """The answers, a line each."""
    lines = [
        f"model             {backbone.name}",
        f"decoder           {type(backbone.decoder).__name__}, states of width {backbone.width}",
        f"layers            {_layers(backbone)}",
        f"tokens            {backbone.vocabulary} ids, {backbone.scores} scores, context {backbone.longest or 'open'}",
        f"attention         {_windows(backbone)}",
        f"value model       {backbone.reading.kind}: {MEANING[backbone.reading.kind]}",
    ]
    if backbone.reading.reason:
        lines.append(f"                  not faster, since {backbone.reading.reason}")
    lines.append(f"strategies        {_strategies(backbone)}")
    trees = backbone.trees
    lines.append(f"packed training   {'yes' if trees.kind == 'packed' else 'no: ' + trees.reason}")
    return lines


def _layers(backbone: Backbone) -> str:
    from ..backbone import UnsupportedModel

    try:
        return f"{len(backbone.layers)} of {type(backbone.layers[0]).__name__}; value heads may read after each"
    except UnsupportedModel as error:
        return str(error)


def _windows(backbone: Backbone) -> str:
    kinds = [f"{kind} ({window} tokens)" if window else kind for kind, window in backbone.windows.items()]
    changes = backbone.stable_length
    return ", ".join(kinds) + (f"; rotary frequencies change at {changes} tokens" if changes else "")


def _strategies(backbone: Backbone) -> str:
    model: PreTrainedModel = backbone.model
    why = None if backbone.reading.ragged else backbone.reading.reason
    why = why or backbone.why_not_handed_on(model.device)
    return "over a ragged cache" if why is None else f"in the way of generate itself, since {why}"


def parser() -> argparse.ArgumentParser:
    """The options of `mavis doctor`."""
    found = Parser(prog="mavis doctor", description="Tell how a language model would be steered.")
    found.add_argument(
        "model",
        nargs="?",
        help="Hub id or folder of a causal language model, or smollm2; left out: what is installed, and which "
        "devices and value functions are there",
    )
    found.add_argument("--json", action="store_true", help="for programs: the same as one JSON object")
    return found
