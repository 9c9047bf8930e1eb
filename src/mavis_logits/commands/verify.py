"""``mavis verify``: whether steering does what it should on one's own model, and what it costs; one block to paste."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.weights import parse_weights
from .checks import PROMPTS, Check, block
from .generate import quiet_transformers, steered_model, value_arguments
from .parser import Parser

if TYPE_CHECKING:
    from torch import Tensor

    from .. import MavisLogitsProcessor

_CLOSE = 1e-4  # differences of scores that count as equal: other shapes are computed in another order

_DROPPED = -1e4  # log-probabilities below are those of tokens that were cut off


def verify(model: Any, tokenizer: Any, mavis: MavisLogitsProcessor, tokens: int = 24, runs: int = 3) -> list[Check]:
    """Look at a processor on its model.

    Args:
        model, tokenizer: of the base model.
        mavis: what steers it; its weights, strength and trace are put back afterwards.
        tokens: of an answer.
        runs: of each side of the timing, in turns.

    Returns:
        the checks; the last one, of the time, always passes.
    """
    from ..core.chat import encode_prompt

    encoded = [encode_prompt(prompt, tokenizer) for prompt in PROMPTS]
    batch = tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt").to(model.device)
    before = mavis.config, mavis.weights, mavis.beta

    def scores(rows: slice, processors: list[Any], sample: bool = False) -> tuple[Tensor, Tensor]:
        """New tokens [R, N] and the log-probabilities [N, R, V] that they were chosen by."""
        import torch

        torch.manual_seed(0)
        own = {name: value[rows] for name, value in batch.items()}
        for one in processors:
            one.reset()
        found = model.generate(
            **own, logits_processor=list(processors), do_sample=sample, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=tokens, min_new_tokens=tokens, output_scores=True, return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        start = own["input_ids"].shape[1]
        return found.sequences[:, start:], torch.stack(found.scores).float().log_softmax(dim=-1)

    try:
        everyone = slice(0, len(PROMPTS))
        plain = scores(everyone, [])
        steered = scores(everyone, [mavis])
        checks = [_fires(plain, steered, mavis)]
        mavis.config = replace(mavis.config, kl_budget=None, reference_temperature=1.0)
        mavis.beta = 0.0  # type: ignore[assignment]
        checks.append(_zero(plain[1], scores(everyone, [mavis])[1]))
        checks.append(_neighbours(plain[1], before, mavis, lambda: scores(everyone, [mavis])[1]))
    finally:
        mavis.config, mavis.weights, mavis.beta = before  # type: ignore[assignment]
    checks.append(_cost(lambda processors: scores(slice(0, 1), processors), mavis, tokens, runs))
    return checks


def _fires(plain: tuple[Tensor, Tensor], steered: tuple[Tensor, Tensor], mavis: MavisLogitsProcessor) -> Check:
    changed = int((plain[0] != steered[0]).any(dim=1).sum())
    kl = mavis.stats.kl / max(1, mavis.stats.tokens)
    passed = mavis.stats.tokens > 0 and kl > 1e-3
    told = f"{mavis.stats.tokens} tokens steered, {kl:.3f} nats each; {changed} of {len(PROMPTS)} greedy answers differ"
    return Check("steering fires", passed, told)


def _zero(plain: Tensor, steered: Tensor) -> Check:
    """Of strength 0: what is left of the candidates has the probabilities that it had."""
    off = _difference(plain, steered)
    return Check("strength 0 is the model itself", off < _CLOSE, f"log-probabilities differ by {off:.1e} at most")


def _neighbours(plain: Tensor, before: Any, mavis: MavisLogitsProcessor, run: Callable[[], Tensor]) -> Check:
    """Of a batch whose second row alone is steered: the others are as they were."""
    import torch

    mavis.beta = torch.tensor([0.0, float(torch.as_tensor(before[2]).max()) or 1.0, 0.0])
    found = run()
    off = max(_difference(plain[:, row : row + 1], found[:, row : row + 1]) for row in (0, 2))
    steered = _difference(plain[:1, 1:2], found[:1, 1:2])
    told = f"rows beside a steered one differ by {off:.1e} at most, that one by {steered:.2f}"
    return Check("neighbours in a batch are untouched", off < _CLOSE and steered > _CLOSE, told)


def _difference(plain: Tensor, other: Tensor) -> float:
    """Largest difference of log-probabilities between tokens that are left, up to the cut's normalisation."""
    import torch

    left = (other > _DROPPED) & (plain > _DROPPED)
    kept = plain.masked_fill(~left, -torch.inf).log_softmax(dim=-1)
    return float((kept - other)[left].abs().max())


def _cost(run: Callable[[list[Any]], Any], mavis: MavisLogitsProcessor, tokens: int, runs: int) -> Check:
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * runs + 2):
        steered = turn % 2 == 1
        started = time.perf_counter()
        run([mavis] if steered else [])
        if turn > 1:  # the first of each warms up
            times[steered].append(time.perf_counter() - started)
    plain, ours = (statistics.median(times[side]) for side in (False, True))
    each = " and ".join(f"{1000 * side / tokens:.1f}" for side in (plain, ours))
    told = f"{ours / plain:.2f} times plain generate: {each} ms a token"
    return Check("time, batch 1", True, told)


def main(argv: list[str]) -> int:
    """Print the checks as a block; 1 if one failed."""
    arguments = parser().parse_args(argv)
    weights = parse_weights(arguments.weights) if arguments.weights else None
    if arguments.url is not None:
        from .verify_server import verify_server

        heading, checks = verify_server(arguments.url, weights, arguments.beta, arguments.max_new_tokens)
        print(block(heading, checks))
        return 0 if all(check.passed for check in checks) else 1
    with quiet_transformers():
        from .doctor import environment

        model, tokenizer, mavis, _ = steered_model(arguments, weights, trace=False)
        checks = verify(model, tokenizer, mavis, arguments.max_new_tokens)
        found = environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    heading = [
        f"mavis verify: {arguments.model} ({type(model).__name__}, {model.dtype}, {model.device}), {found['machine']}",
        versions,
        f"objectives: {', '.join(mavis.objectives)}; beta {float(mavis.beta):g}, top_k {mavis.config.top_k}, "
        f"{mavis.config.normalize}",
    ]
    print(block(heading, checks))
    return 0 if all(check.passed for check in checks) else 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mavis verify``."""
    result = Parser(
        prog="mavis verify",
        description="See whether steering fires, strength 0 is the model itself, neighbours in a batch are untouched, "
        "and what it costs. Exits with 1 if something is not as it should be.",
    )
    value_arguments(result)
    result.add_argument(
        "--url",
        metavar="URL",
        help="look at a server instead (`mavis serve`, or vLLM with the plug-in), e.g. http://localhost:8000; of the "
        "other options only --weights, --beta and --max-new-tokens count then",
    )
    result.add_argument("--max-new-tokens", type=int, default=24, help="length of an answer (default: %(default)s)")
    return result
