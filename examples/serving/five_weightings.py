"""One question at five weightings, all of them at once. Needs `pip install openai`, and a server (`mavis serve`)."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any


async def main() -> None:
    """Ask, and print the answers beside their weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--objectives", nargs=2, default=["helpful", "humour"])
    parser.add_argument("--question", default="How do I make good tea?")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()

    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=options.url, api_key="none")
    model = (await client.models.list()).data[0].id
    first, second = options.objectives
    weights = [f"{first}={1 - step / 4:g},{second}={step / 4:g}" for step in range(5)]

    async def ask(own: str) -> str:
        answer: Any = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": options.question}],
            max_tokens=options.max_tokens,
            temperature=0.7,
            seed=0,
            extra_body={"vllm_xargs": {"mavis_weights": own}},
        )
        return answer.choices[0].message.content

    for own, answer in zip(weights, await asyncio.gather(*map(ask, weights)), strict=True):
        print(f"--- {own}\n{answer}\n")


if __name__ == "__main__":
    asyncio.run(main())
