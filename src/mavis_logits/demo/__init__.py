"""A small real language model to try the library on, without a network."""

from .smollm2 import load_smollm2

__all__ = ["load_smollm2"]
