"""Language models by name: a Hub id, a folder, a LoRA adapter, or one that an installed package ships."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from .backbone import Backbone
from .demo.smollm2 import MODEL_ID, PACKAGE, converted_folder, load_smollm2
from .values.adapters import folded

DEFAULT_MODEL = "smollm2"  # the model that needs no network
SHIPPED = {MODEL_ID: PACKAGE}  # full names, and the packages that they come in
_SHORT = {DEFAULT_MODEL: MODEL_ID}


def full_name(model: str) -> str:
    """The Hub id that a short name stands for; any other name, or folder, as it is."""
    return _SHORT.get(model, model)


def folder_of(model: str) -> str:
    """Where the files of a model lie that a package ships; any other name, or folder, as it is."""
    return str(converted_folder()) if full_name(model) in SHIPPED else model


def shipped_version(model: str) -> str | None:
    """The version of the package that ships a model; None if none does, or it is not installed."""
    try:
        return version(SHIPPED[full_name(model)])
    except (KeyError, PackageNotFoundError):
        return None


def load_chat_model(
    model: str = DEFAULT_MODEL, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load ``"smollm2"`` (see `load_smollm2`) or any other causal language model by Hub id or folder.

    A LoRA adapter is merged into the model that it was trained on. A model without chat template reads prompts as raw
    text, and goes on with them.

    Raises:
        OSError: There is no such model on the Hub, in the cache or in that folder.
    """
    if full_name(model) in SHIPPED:
        return load_smollm2(dtype)
    adapter = find_adapter_config_file(model)
    if adapter is None:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    else:
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
        loaded, tokenizer = load_chat_model(base, dtype)
        try:
            adapted = PeftModel.from_pretrained(loaded, model)
            loaded = cast(PreTrainedModel, folded(adapted, Backbone.of(loaded).vocabulary))
        except ValueError as error:
            raise ValueError(f"{model}: {error}") from error
        loaded.name_or_path = loaded.config.name_or_path = model
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return loaded.eval(), tokenizer


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model by name."""
    return AutoTokenizer.from_pretrained(folder_of(model))
