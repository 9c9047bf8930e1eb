"""Reading weights: safetensors only, whole or not at all, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel


@contextmanager
def damage_is_os_error(name: str) -> Iterator[None]:
    """Turn safetensors' own error into an `OSError` that names the checkpoint."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"{name} has a corrupt or half-written safetensors file ({error}): download or save it again"
        ) from error


def load_complete(from_pretrained: Callable[..., Any], name: str, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained(name)`, refusing pickles and checkpoints that would leave weights at random.

    Raises:
        OSError: nothing there, no safetensors file, a damaged one, or one without some of the weights.
    """
    with damage_is_os_error(name):
        model, loading = from_pretrained(name, **kwargs | {"use_safetensors": True, "output_loading_info": True})
    missing = sorted(loading["missing_keys"])
    if missing:
        raise OSError(f"{name} lacks {len(missing)} weights, {missing[0]} among them: download or save it again")
    return model
