"""What differs between the supported releases of transformers, each with the floor at which it goes."""

from __future__ import annotations

# What forwards call the cache that they are given: `cache` from 5.24 on, `past_key_values` before (goes with a floor of
# 5.24; the name stays an argument and an attribute of our own models, whose callers know no other); `cache_params` is
# Mamba's in all of them.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
