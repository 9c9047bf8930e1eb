"""Algorithm 2 as one step: settings and weights, value functions, and what came of every step."""

from .steering import Steering

__all__ = ["Steering"]
