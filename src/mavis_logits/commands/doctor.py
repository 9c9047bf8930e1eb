"""``mavis doctor``: what the library sees in a model, how it would read it, and why not faster."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..backbone import Backbone

MEANING = {
    "packed": "one forward over a ragged cache, void queries left out: the fastest way",
    "masked": "one forward over a ragged cache",
    "repeated": "the state after the text, repeated for every candidate",
    "plain": "every candidate from scratch: slow",
}


def main(argv: list[str]) -> int:
    """Print what `Backbone` answers about a model."""
    arguments = parser().parse_args(argv)

    # Imported only here, so that `--help` answers at once.
    import transformers

    from ..backbone import Backbone
    from ..hub.files import find_file
    from ..models import load_chat_model

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.model != "smollm2" and find_file(arguments.model, "tokenizer_config.json", {}) is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model)  # it need not be a chat model
    else:
        model, _ = load_chat_model(arguments.model)
    print("\n".join(report(Backbone.of(model))))
    return 0


def report(backbone: Backbone) -> list[str]:
    """The answers, a line each."""
    lines = [
        f"model             {backbone.name}",
        f"decoder           {type(backbone.decoder).__name__}, states of width {backbone.width}",
        f"layers            {_layers(backbone)}",
        f"tokens            {backbone.vocabulary} ids, {backbone.scores} scores, context {backbone.longest or 'open'}",
        f"attention         {_windows(backbone)}",
        f"value model       {backbone.reading.kind}: {MEANING[backbone.reading.kind]}",
    ]
    if backbone.reading.reason:
        lines.append(f"                  not faster, since {backbone.reading.reason}")
    lines.append(f"strategies        {_strategies(backbone)}")
    trees = backbone.trees
    lines.append(f"packed training   {'yes' if trees.kind == 'packed' else 'no: ' + trees.reason}")
    return lines


def _layers(backbone: Backbone) -> str:
    from ..backbone import UnsupportedModel

    try:
        return f"{len(backbone.layers)} of {type(backbone.layers[0]).__name__}; value heads may read after each"
    except UnsupportedModel as error:
        return str(error)


def _windows(backbone: Backbone) -> str:
    kinds = [f"{kind} ({window} tokens)" if window else kind for kind, window in backbone.windows.items()]
    changes = backbone.stable_length
    return ", ".join(kinds) + (f"; rotary frequencies change at {changes} tokens" if changes else "")


def _strategies(backbone: Backbone) -> str:
    model: PreTrainedModel = backbone.model
    why = None if backbone.reading.ragged else backbone.reading.reason
    why = why or backbone.why_not_handed_on(model.device)
    return "over a ragged cache" if why is None else f"in the way of generate itself, since {why}"


def parser() -> argparse.ArgumentParser:
    """The options of `mavis doctor`."""
    found = argparse.ArgumentParser(prog="mavis doctor", description="Tell how a language model would be steered.")
    found.add_argument("model", help="Hub id or folder of a causal language model, or smollm2")
    return found
