"""Load for a server: steered and unsteered requests by turns, with throughput and percentiles of latency for both.

Needs `pip install openai` and a server (`mavis serve`). It ends by itself when its requests are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Any

SUBJECTS = ["tea", "a picnic", "the sea", "cats and dogs", "bread", "a rainy day", "chess", "the moon"]


@dataclass
class Request:
    """Seconds until the first token and the last, and how many tokens there were."""

    first: float
    last: float
    tokens: int


async def one(client: Any, model: str, number: int, asked: dict[str, Any], tokens: int) -> Request:
    """A streamed request."""
    started = time.perf_counter()
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"Tell me about {SUBJECTS[number % len(SUBJECTS)]}. ({number})"}],
        max_tokens=tokens,
        temperature=0.7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True} | ({"vllm_xargs": asked} if asked else {}),
    )
    first, count = 0.0, 0
    async for part in stream:
        if part.choices and not first:
            first = time.perf_counter() - started
        if part.usage:
            count = part.usage.completion_tokens
    return Request(first, time.perf_counter() - started, count)


async def volley(
    client: Any, model: str, options: argparse.Namespace, asked: dict[str, Any]
) -> tuple[float, list[Request]]:
    """All requests, so many of them at once: seconds in all, and each."""
    room = asyncio.Semaphore(options.at_once)

    async def wait(number: int) -> Request:
        async with room:
            return await one(client, model, number, asked, options.max_tokens)

    started = time.perf_counter()
    found = await asyncio.gather(*(wait(number) for number in range(options.requests)))
    return time.perf_counter() - started, list(found)


def told(name: str, seconds: float, requests: list[Request]) -> str:
    """A line of the table."""
    tokens = sum(request.tokens for request in requests)
    rows = [f"{name:>10}", f"{tokens / seconds:8.1f}"]
    for values in ([r.first for r in requests], [r.last for r in requests]):
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        rows += [f"{cuts[place - 1]:7.2f}" for place in (50, 95, 99)]
    return " ".join(rows)


async def main() -> None:
    """Two volleys of each kind by turns; the first of each warms up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--weights", default="helpful=1")
    options = parser.parse_args()

    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=options.url, api_key="none", timeout=3600)
    model = (await client.models.list()).data[0].id
    print(f"{'':>10} {'tokens/s':>8} {'first token, s: 50, 95, 99 %':>23} {'whole, s: 50, 95, 99 %':>23}")
    speeds: dict[str, list[float]] = {"unsteered": [], "steered": []}
    for turn in range(options.rounds + 1):
        for name, asked in (("unsteered", {}), ("steered", {"mavis_weights": options.weights})):
            seconds, requests = await volley(client, model, options, asked)
            if turn:
                speeds[name].append(sum(request.tokens for request in requests) / seconds)
                print(told(name, seconds, requests))
    ratio = statistics.median(speeds["steered"]) / statistics.median(speeds["unsteered"])
    print(f"steered at {ratio:.2f} of the throughput of unsteered")


if __name__ == "__main__":
    asyncio.run(main())
