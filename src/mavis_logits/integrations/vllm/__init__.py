"""Steering inside vLLM: every request of a batch with its own weights, exact under speculative decoding.

    export MAVIS_SERVE=org/value-head
    vllm serve org/chat-model --logits-processors mavis_logits.integrations.vllm:MavisProcessor

A request is steered by `mavis_...` arguments beside its sampling parameters: `vllm_xargs` of a chat completion,
`SamplingParams(extra_args=...)` in Python. One without them is not touched. See docs/serving.md.

Importing this module imports no vLLM; `MavisProcessor` is made when it is asked for.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "MavisProcessor":
        from .processor import MavisProcessor

        return MavisProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["MavisProcessor"]
