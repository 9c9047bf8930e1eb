"""Decoding strategies for `model.generate(custom_generate=...)`."""

from .base import MavisOutput, MavisStrategy
from .sampling import MavisSampling

__all__ = ["MavisOutput", "MavisSampling", "MavisStrategy"]
