"""Decoding strategies for `model.generate(custom_generate=...)`."""

from .base import MavisOutput, MavisStrategy
from .beam_search import MavisBeamSearch
from .best_of_n import MavisBestOfN
from .blockwise import MavisBlockwise
from .sampling import MavisSampling
from .tree_search import MavisTreeSearch

__all__ = [
    "MavisBeamSearch",
    "MavisBestOfN",
    "MavisBlockwise",
    "MavisOutput",
    "MavisSampling",
    "MavisStrategy",
    "MavisTreeSearch",
]
