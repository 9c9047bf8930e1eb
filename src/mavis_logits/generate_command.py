"""``mavis generate``: one's own prompt, answered by a language model under the guidance of value functions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mavis_logits import MavisLogitsProcessor

DEFAULT_VALUES = "model_cards/smollm2-135m-value-head"
EXAMPLES = """examples:
  mavis generate --prompt "How do I make good tea?" --weights helpful=1 --unsteered
  mavis generate --prompt "How do I make good tea?" --weights helpful=0.3,humour=0.7 --beta 8
  mavis generate --prompt "..." --model org/chat-model --values kind=org/value-kind short=./my-value-short \\
      --weights kind=0.5,short=0.5
"""


def main(argv: list[str]) -> int:
    """Answer a prompt as the arguments say, on standard output; figures go to standard error."""
    arguments = parser().parse_args(argv)
    weights = parse_weights(arguments.weights)

    # Imported only here, so that `--help` and a mistyped option answer at once.
    import torch
    import transformers

    from mavis_logits import MavisLogitsProcessor
    from mavis_logits.demo.chat import chat_inputs
    from mavis_logits.demo.checkout import checkout_path
    from mavis_logits.demo.smollm2 import load_chat_model

    transformers.utils.logging.disable_progress_bar()
    values = parse_values(arguments.values) if arguments.values else str(checkout_path(DEFAULT_VALUES))
    model, tokenizer = load_chat_model(arguments.model)
    inputs = chat_inputs(tokenizer, [arguments.prompt])
    mavis = MavisLogitsProcessor.from_pretrained(
        values,
        weights=weights,
        beta=arguments.beta,
        top_k=arguments.top_k,
        model=model,
        tokenizer=tokenizer,
    )

    def answer(processor: MavisLogitsProcessor | None) -> None:
        torch.manual_seed(arguments.seed)
        with processor.attach(model) if processor else nullcontext():
            model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=arguments.max_new_tokens,
                logits_processor=[processor] if processor else [],
                pad_token_id=tokenizer.pad_token_id,
                streamer=transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )

    if arguments.unsteered:
        print("--- unsteered", file=sys.stderr)
        answer(None)
        print("--- steered", file=sys.stderr)
    answer(mavis)
    stats = mavis.stats
    print(f"--- {stats.tokens} tokens, KL from the unsteered model {float(stats.kl):.1f} nats", file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mavis generate``."""
    result = argparse.ArgumentParser(
        prog="mavis generate",
        description="Answer a prompt with a language model whose next-token choices are tilted towards objectives.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what to ask")
    add(
        "--weights",
        default="helpful=1",
        metavar="NAME=NUMBER,...",
        help="weight of each objective, e.g. helpful=0.7,humour=0.3; those left out get 0 (default: %(default)s)",
    )
    add("--beta", type=float, default=5.0, help="strength: 0 is no steering, 1 to 8 is usual (default: %(default)s)")
    add("--top-k", type=int, default=15, help="how many of the likeliest tokens to choose among (default: %(default)s)")
    add(
        "--values",
        nargs="+",
        metavar="[NAME=]FOLDER_OR_ID",
        help="value functions, each a folder or Hub id; with several, give each a name "
        f"(default: the value head for SmolLM2 in {DEFAULT_VALUES})",
    )
    add(
        "--model",
        default="smollm2",
        metavar="FOLDER_OR_ID",
        help="the language model to steer: a folder or Hub id; smollm2 needs no network (default: %(default)s)",
    )
    add("--max-new-tokens", type=int, default=48, help="length of the answer (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    add("--unsteered", action="store_true", help="first print what the model says by itself, with the same seed")
    return result


def parse_weights(text: str) -> dict[str, float]:
    """Parse ``"helpful=0.7,humour=0.3"``.

    Raises:
        ValueError: A part is not ``NAME=NUMBER``, or a name occurs twice.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, sign, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            sign = ""
        if not (name and sign):
            raise ValueError(f"--weights got {part!r}; expected NAME=NUMBER, e.g. --weights helpful=0.7,humour=0.3")
        if name in weights:
            raise ValueError(f"--weights names {name!r} twice; give each objective one weight")
        weights[name] = weight
    return weights


def parse_values(parts: Sequence[str]) -> str | dict[str, str]:
    """Parse ``["a=org/value-a", "b=folder"]`` into a mapping, or one unnamed folder or id into itself.

    Raises:
        ValueError: Several value functions are given and one has no name, or a name occurs twice.
    """
    if len(parts) == 1 and "=" not in parts[0]:
        return parts[0]
    values: dict[str, str] = {}
    for part in parts:
        name, sign, source = part.partition("=")
        if not (name and sign and source):
            raise ValueError(f"--values got {part!r} among several; expected NAME=FOLDER_OR_ID for each")
        if name in values:
            raise ValueError(f"--values names {name!r} twice; give each value function a name of its own")
        values[name] = source
    return values
