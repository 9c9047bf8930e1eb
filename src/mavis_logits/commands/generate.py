"""``mavis generate``: one's own prompt, answered by a language model under the guidance of value functions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.weights import parse_weights
from .parser import Parser

if TYPE_CHECKING:
    from torch import Tensor

    from .. import MavisLogitsProcessor

DEFAULT_VALUES = "model_cards"  # a bundle
DEFAULT_TEMPERATURE = 0.7
EXAMPLES = """examples:
  mavis generate --prompt "How do I make good tea?" --weights helpful=1 --unsteered
  mavis generate --prompt "How do I make good tea?" --weights helpful=0.3,humour=0.7 --beta 8
  mavis generate --prompt "How do I make good tea?" --weights humour=1 --trace tea.html
  mavis generate --prompt "Tell me about the moon." --words joke="Answer with a joke."
  mavis generate --prompt "..." --model org/chat-model --values kind=org/value-kind short=./my-value-short \\
      --weights kind=0.5,short=0.5
"""


def main(argv: list[str]) -> int:
    """Answer a prompt as the arguments say, on standard output; headings and figures go to standard error."""
    arguments = parser().parse_args(argv)
    weights = parse_weights(arguments.weights) if arguments.weights else None
    if arguments.trace is not None and (arguments.trace.is_dir() or not arguments.trace.parent.is_dir()):
        raise OSError(f"--trace got {arguments.trace}; expected the name of a file in a folder that exists")
    with quiet_transformers():
        return _answer(arguments, weights)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While it is open, transformers says nothing but errors; then what it said before."""
    import transformers

    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def steered_model(
    arguments: argparse.Namespace, weights: dict[str, float] | None, trace: bool
) -> tuple[Any, Any, MavisLogitsProcessor, float]:
    """Model, tokenizer, what steers it and the temperature, as the arguments of `value_arguments` say.

    Raises:
        ValueError: value functions or words that cannot be read, or do not fit the model.
        OSError: a model or value function that cannot be found.
    """
    check_strength(arguments)
    check_names(arguments)

    # Imported only here, so that `--help` and a mistyped option answer at once.
    from ..models import load_chat_model

    model, tokenizer = load_chat_model(arguments.model)
    mavis = steering(arguments, model, tokenizer, weights, trace)
    temperature = arguments.temperature
    return model, tokenizer, mavis, recommended_temperature(mavis) if temperature is None else temperature


def steering(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, weights: dict[str, float] | None, trace: bool
) -> MavisLogitsProcessor:
    """What steers a model that has been loaded, as the arguments of `value_arguments` say; errors as above."""
    from .. import MavisLogitsProcessor
    from ..demo.checkout import checkout_path

    sources = value_sources(arguments.values) if arguments.values else None
    words = parse_words(arguments.words) if arguments.words else None
    if sources is None and words is None:
        sources = str(checkout_path(DEFAULT_VALUES))
    settings: dict[str, Any] = {} if arguments.top_k is None else {"top_k": arguments.top_k}
    if arguments.kl is not None:
        settings["kl_budget"] = arguments.kl / arguments.max_new_tokens
    return MavisLogitsProcessor.from_pretrained(
        sources,
        weights=weights,
        beta=arguments.beta,
        model=model,
        tokenizer=tokenizer,
        trace=trace,
        objectives=words,
        **settings,
    )


def recommended_temperature(mavis: MavisLogitsProcessor) -> float:
    """Of the base model, as the value functions recommend it, else `DEFAULT_TEMPERATURE`."""
    recommended = [function.config.settings.get("temperature") for function in mavis.functions.all]
    return next((found for found in recommended if found is not None), DEFAULT_TEMPERATURE)


def check_names(arguments: argparse.Namespace) -> None:
    """Raise `ValueError` for value functions or words that cannot be read: before anything is loaded."""
    for given, parse in ((arguments.values, parse_values), (arguments.words, parse_words)):
        if given:
            parse(given)


def check_strength(arguments: argparse.Namespace) -> None:
    """Raise `ValueError` if a strength and a budget are both given, or the budget or length is none."""
    if arguments.kl is None:
        return
    if arguments.beta is not None:
        raise ValueError("--beta and --kl were both given: a strength, or a budget that decides it; give one of them")
    if not 0 < arguments.kl < float("inf"):
        raise ValueError(f"--kl must be a number of nats above 0, got {arguments.kl}; --beta 0 is no steering")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")


def _answer(arguments: argparse.Namespace, weights: dict[str, float] | None) -> int:
    import torch
    import transformers

    from ..core.chat import chat_inputs

    model, tokenizer, mavis, temperature = steered_model(arguments, weights, arguments.trace is not None)
    inputs = chat_inputs(tokenizer, [arguments.prompt])
    mavis.config = replace(mavis.config, reference_temperature=temperature)

    def answer(processors: list[MavisLogitsProcessor]) -> Tensor:
        torch.manual_seed(arguments.seed)
        sequences: Tensor = model.generate(  # type: ignore[operator]
            **inputs,
            do_sample=True,
            temperature=1.0 if processors else temperature,  # a processor applies it before the tilt
            top_k=0,
            top_p=1.0,
            max_new_tokens=arguments.max_new_tokens,
            logits_processor=processors,
            pad_token_id=tokenizer.pad_token_id,
            streamer=transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        return sequences

    if arguments.unsteered:
        print("--- unsteered", file=sys.stderr)
        answer([])
    shown = ", ".join(
        f"{name} {weight:g}" for name, weight in zip(mavis.objectives, mavis.weights.tolist(), strict=True)
    )
    strength = f"beta {float(mavis.beta):g}" if arguments.kl is None else f"at most {arguments.kl:g} nats"
    print(f"--- steered: {shown}, {strength}", file=sys.stderr)
    sequences = answer([mavis])
    print(f"--- {mavis.stats.tokens} tokens, {mavis.stats.kl:.1f} nats from the unsteered model", file=sys.stderr)
    if mavis.trace is not None:
        mavis.trace.to_html(tokenizer, arguments.trace, sequences=sequences)
        print(f"--- what each token was chosen from: {arguments.trace}", file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mavis generate``."""
    result = Parser(
        prog="mavis generate",
        description="Answer a prompt with a language model whose next-token choices are tilted towards objectives.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    value_arguments(result)
    add = result.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what to ask")
    add("--max-new-tokens", type=int, default=48, help="length of the answer (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    add("--unsteered", action="store_true", help="first print what the model says by itself, with the same seed")
    add("--trace", type=Path, metavar="FILE.html", help="write a page that shows how each token was steered")
    return result


def value_arguments(result: argparse.ArgumentParser) -> None:
    """Add what says which model is steered by what, how strongly, and where to."""
    add = result.add_argument
    add(
        "--weights",
        metavar="NAME=NUMBER,...",
        help="weight of each objective, e.g. helpful=0.7,humour=0.3; those left out get 0 (default: equal weights)",
    )
    add(
        "--beta",
        type=float,
        help="strength: 0 is no steering, 1 to 8 is usual (default: what the value functions recommend, else 5)",
    )
    add(
        "--kl",
        type=float,
        metavar="NATS",
        help="in place of --beta: how far an answer of full length may go from the model, in nats; 4 to 20 is usual",
    )
    model_arguments(result)


def model_arguments(result: argparse.ArgumentParser) -> None:
    """Add what says which model is steered by what."""
    add = result.add_argument
    add(
        "--words",
        nargs="+",
        metavar="NAME=INSTRUCTION",
        help="objectives in words, for any model and without training: what each instruction would make likelier",
    )
    add(
        "--top-k",
        type=int,
        help="how many of the likeliest tokens to choose among (default: as recommended, else 15)",
    )
    add(
        "--values",
        nargs="+",
        metavar="[NAME=]FOLDER_OR_ID",
        help="a bundle, or value functions under their own objectives' names or those given; each a folder or Hub id "
        f"(default: the value heads for SmolLM2, the bundle in {DEFAULT_VALUES}; with --words none)",
    )
    add(
        "--model",
        default="smollm2",
        metavar="FOLDER_OR_ID",
        help="the language model to steer: a folder or Hub id; smollm2 needs no network (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        help="of the language model, which is sharpened by it before it is steered (default: as recommended, else "
        f"{DEFAULT_TEMPERATURE})",
    )


def parse_words(parts: Sequence[str]) -> dict[str, str]:
    """Parse ``["joke=Answer with a joke."]``.

    Raises:
        ValueError: A part is not ``NAME=INSTRUCTION``, or a name occurs twice.
    """
    words: dict[str, str] = {}
    for part in parts:
        name, _, text = (piece.strip() for piece in part.partition("="))
        if not (name and text):
            raise ValueError(
                f'--words got {part!r}; expected NAME=INSTRUCTION, e.g. --words joke="Answer with a joke."'
            )
        if name in words:
            raise ValueError(f"--words names {name!r} twice; give each objective a name of its own")
        words[name] = text
    return words


def value_sources(parts: Sequence[str]) -> str | list[str] | dict[str, str]:
    """`parse_values`, and a lone name by itself, which may be a bundle's."""
    values = parse_values(parts)
    return values[0] if isinstance(values, list) and len(values) == 1 else values


def parse_values(parts: Sequence[str]) -> list[str] | dict[str, str]:
    """Parse ``["a=org/value-a", "b=folder"]`` into a mapping, and names without ``=`` into a list.

    Raises:
        ValueError: Some are named and some are not, a name or a source is empty, or a name occurs twice.
    """
    if not any("=" in part for part in parts):
        return list(parts)
    values: dict[str, str] = {}
    for part in parts:
        name, _, source = part.partition("=")
        if not (name and source):
            raise ValueError(f"--values got {part!r}; expected NAME=FOLDER_OR_ID for each value function, or for none")
        if name in values:
            raise ValueError(f"--values names {name!r} twice; give each value function a name of its own")
        values[name] = source
    return values
