"""Decoding strategies for `model.generate(custom_generate=...)`."""

from .base import MavisOutput, MavisStrategy
from .beam_search import MavisBeamSearch
from .best_of_n import MavisBestOfN
from .sampling import MavisSampling

__all__ = ["MavisBeamSearch", "MavisBestOfN", "MavisOutput", "MavisSampling", "MavisStrategy"]
