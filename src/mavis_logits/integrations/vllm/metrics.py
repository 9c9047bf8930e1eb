"""Counters in vLLM's Prometheus endpoint."""

from __future__ import annotations

import os
import time
from typing import Any

from ..slots import Slots

_EVERY = 5.0  # seconds between two looks at counters that lie on the device


class Metrics:
    """Hands the totals of `Slots.counters` on to Prometheus, where vLLM's processes share one set of metrics.

    The endpoint is another process's. What is counted here reaches it only through the folder
    `PROMETHEUS_MULTIPROC_DIR`, which `mavis serve` sets; without it the totals are in the log alone.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots, self._sent, self._next = slots, dict[str, float](), 0.0
        self._counters: dict[str, Any] = {}
        if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            return
        from prometheus_client import CollectorRegistry, Counter

        registry = CollectorRegistry()  # in multi-process mode all write to the folder, whatever their registry
        self._counters = {
            name: Counter(f"mavis:{name}", text, registry=registry)
            for name, text in (
                ("rows_steered", "Rows of logits that were steered."),
                ("rows_ended", "Rows that could not be steered (values that are not finite) and were ended."),
                ("steps_steered", "Steps with at least one steered row."),
                ("steps_skipped", "Steps in which there was nothing to steer."),
                ("seconds", "Time spent on steering, on the host."),
                ("kl_nats", "Divergence from the served model so far, summed over steered rows."),
            )
        }

    def update(self, now: float | None = None) -> None:
        """Send what has been added since the last time, at most once in some seconds."""
        now = time.monotonic() if now is None else now
        if not self._counters or now < self._next:
            return
        self._next = now + _EVERY
        counted = self._slots.counters
        totals = {
            "rows_steered": counted.rows,
            "rows_ended": counted.ended,
            "steps_steered": counted.steps,
            "steps_skipped": counted.skipped,
            "seconds": counted.seconds,
            "kl_nats": counted.kl,
        }
        for name, total in totals.items():
            self._counters[name].inc(max(0.0, total - self._sent.get(name, 0.0)))
            self._sent[name] = total
