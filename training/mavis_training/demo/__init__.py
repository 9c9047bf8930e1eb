"""`mavis demo`: a real language model steered between two objectives."""

from .demo import main

__all__ = ["main"]
