"""What a step of steering adds to the base model's own, piece by piece, against the plain way to write each piece.

- *arithmetic*: Algorithm 2 from scores and values to log-probabilities of all tokens, where those that are no
  candidates are kept; plainly, over the whole vocabulary.
- *arithmetic, KL budget*: the same with the strength solved for.
- *reading a head*: values of the candidates by a head of factors; plainly, by one that reads state and candidate
  together.

Both sides of a piece take turns in one process. Prints a table, and writes it to docs/results/step.{json,md}:

    python benchmarks/step.py [--rows 8 64] [--rounds 30]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis_logits.core.config import MavisConfig
from mavis_logits.core.tilting import expectation, kl_divergence, solve_beta, tilt
from mavis_logits.steering.policy import Policy
from mavis_logits.values.value_head import ValueHead, ValueHeadConfig
from mavis_training.base.files import write_json
from mavis_training.base.made import made_here, made_in_words

VOCABULARY, WIDTH, OBJECTIVES = 49_152, 576, 2  # of SmolLM2-135M; helpful and humour, say
Pair = tuple[str, int, int, Callable[[], Any], Callable[[], Any]]  # name, rows, candidates, ours, plainly


def over_the_vocabulary(config: MavisConfig, beta: float, weights: Tensor, scores: Tensor, values: Tensor) -> Tensor:
    """Log-probabilities [R, V] as Algorithm 2 reads, every token with a value of its own; and KL [R] beside them."""
    reference = torch.log_softmax(scores, dim=-1)
    top = reference.topk(values.shape[1], dim=-1)
    combined = (values * weights).sum(dim=-1)
    combined = combined - expectation(combined, top.values)
    every = torch.zeros_like(reference).scatter(1, top.indices, combined)
    strength = beta if config.kl_budget is None else solve_beta(reference, every, config.kl_budget)
    tilted = torch.log_softmax(tilt(reference, every, strength), dim=-1)
    kl_divergence(tilted, reference, normalized=True)
    return tilted


def pairs(rows: int) -> Iterator[Pair]:
    """The pieces for a batch of `rows`."""
    generator = torch.Generator().manual_seed(rows)
    scores = 3 * torch.randn(rows, VOCABULARY, generator=generator)
    weights = torch.full((OBJECTIVES,), 1 / OBJECTIVES)
    values = torch.randn(rows, 200, OBJECTIVES, generator=generator)
    for name, budget in (("arithmetic", None), ("arithmetic, KL budget", 0.1)):
        config = MavisConfig(top_k=200, unscored="expected", normalize="none", kl_budget=budget)
        policy = Policy(config, weights, torch.tensor(4.0))

        def ours(policy: Policy = policy) -> Tensor | None:
            return policy.step(scores, lambda *_: values).everything

        def plain(config: MavisConfig = config) -> Tensor:
            return over_the_vocabulary(config, 4.0, weights, scores, values)

        found = ours()
        assert found is not None
        torch.testing.assert_close(found, plain(), atol=1e-3, rtol=1e-3)
        yield name, rows, 200, ours, plain
    embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
    hidden = torch.randn(rows, WIDTH, generator=generator)
    heads = []
    for rank in (256, None):
        torch.manual_seed(0)
        config_of_head = ValueHeadConfig(WIDTH, WIDTH, VOCABULARY, rank=rank, objectives=["helpful", "humour"])
        heads.append(ValueHead(config_of_head).eval().bind_embedding(embedding))
    for k in (15, 200):
        candidates = torch.randint(VOCABULARY, (rows, k), generator=generator)
        factors, together = (partial(head, hidden, candidates) for head in heads)
        yield "reading a head", rows, k, factors, together


@torch.inference_mode()
def seconds(pair: Pair, rounds: int) -> tuple[list[float], list[float]]:
    """Of both sides of a piece, in turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for side in (*pair[3:], *pair[3:]):
        side()
    for _ in range(rounds):
        for times, side in zip(taken, pair[3:], strict=True):
            started = time.perf_counter()
            side()
            times.append(time.perf_counter() - started)
    return taken


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| piece | rows | candidates | ms | ms, plainly | ratio |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {x['piece']} | {x['rows']} | {x['candidates']} | {x['ms']:.2f} | {x['plain_ms']:.2f} | {x['ratio']:.3f} |"
        for x in results["pieces"]
    ]
    note = (
        f"A vocabulary of {VOCABULARY:,}, states of {WIDTH}, {OBJECTIVES} objectives, float32; medians of "
        f"{results['rounds']} rounds, both sides in turns; the ratio is the median of the rounds' own. "
        f"{made_in_words(results)}"
    )
    return "\n".join([*lines, "", note, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all pieces and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", default=str(Path(__file__).resolve().parents[1] / "docs" / "results" / "step"))
    options = parser.parse_args(argv)
    pieces = []
    for rows in options.rows:
        for pair in pairs(rows):
            ours, plain = seconds(pair, options.rounds)
            ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
            pieces.append({
                "piece": pair[0], "rows": rows, "candidates": pair[2], "ms": 1e3 * statistics.median(ours),
                "plain_ms": 1e3 * statistics.median(plain), "ratio": ratio,
            })  # fmt: skip
    results = {
        **made_here(),
        "rounds": options.rounds,
        "pieces": pieces,
    }
    print(table(results))
    output = Path(options.out)
    write_json(output.with_suffix(".json"), results)
    output.with_suffix(".md").write_text(table(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
