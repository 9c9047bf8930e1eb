"""The settings of the page as something to run elsewhere: Python, the command line, curl."""

from __future__ import annotations

import json
import shlex
from typing import Any

from ...core.weights import weights_text
from ..generate import DEFAULT_VALUES, parse_words, value_sources
from .settings import Choice, Settings

API = "answer"  # name of the page's own endpoint


def python(choice: Choice, prompt: str, settings: Settings) -> str:
    """A program that prints the steered answer of the page."""
    n = settings.max_new_tokens
    begin = f"""\
import torch
from mavis_logits import MavisLogitsProcessor
from mavis_logits.core.chat import chat_inputs
from mavis_logits.models import load_chat_model

model, tokenizer = load_chat_model({choice.model!r})
"""
    temperature, steered = settings.temperature, ""
    if settings.steers:
        words = f"    objectives={parse_words(choice.words)!r},\n" if choice.words else ""
        cut = "" if choice.top_k is None else f"    top_k={choice.top_k},\n"
        begin += f"""\
mavis = MavisLogitsProcessor.from_pretrained(
    {_sources(choice)!r},
{words}    weights={settings.said!r},
    kl_budget={settings.kl!r} / {n},  # nats a token
    reference_temperature={temperature!r},
{cut}    model=model,
    tokenizer=tokenizer,
)
"""
        temperature, steered = 1.0, "mavis"
    else:
        begin = begin.replace("from mavis_logits import MavisLogitsProcessor\n", "")
    return f"""\
{begin}inputs = chat_inputs(tokenizer, [{prompt!r}])
torch.manual_seed({settings.seed})
output = model.generate(
    **inputs,
    logits_processor=[{steered}],
    do_sample=True,
    temperature={temperature!r},
    top_k=0,
    top_p=1.0,
    max_new_tokens={n},
    pad_token_id=tokenizer.pad_token_id,
)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def command(choice: Choice, prompt: str, settings: Settings) -> str:
    """`mavis generate` with the same settings; where nothing steers, it prints the unsteered answer first."""
    words = ["mavis", "generate", "--model", choice.model]
    words += ["--values", *choice.values] if choice.values else []
    words += ["--words", *choice.words] if choice.words else []
    words += [] if choice.top_k is None else ["--top-k", str(choice.top_k)]
    if settings.steers:
        # With = since a value may begin with a minus.
        words += ["--weights=" + weights_text(settings.said)]
        words += ["--kl", repr(settings.kl)]
    else:
        words += ["--beta", "0", "--unsteered"]
    words += ["--temperature", repr(settings.temperature), "--max-new-tokens", str(settings.max_new_tokens)]
    words += ["--seed", str(settings.seed), f"--prompt={prompt}"]
    return shlex.join(words)


def curl(url: str, choice: Choice, prompt: str, settings: Settings) -> str:
    """Ask this page's own endpoint, which answers with JSON: one call asks, a second one waits for what comes."""
    call = shlex.quote(f"{url.rstrip('/')}/gradio_api/call/{API}")
    data = json.dumps({"data": request_data(choice, prompt, settings)})
    return (
        f"id=$(curl -s {call} -H 'Content-Type: application/json' -d {shlex.quote(data)} | cut -d'\"' -f4)\n"
        f"curl -sN {call}/$id"
    )


def request_data(choice: Choice, prompt: str, settings: Settings) -> list[Any]:
    """The arguments of the page's endpoint, in order."""
    return [
        prompt, dict(settings.said), settings.kl, settings.temperature, settings.max_new_tokens, settings.seed,
        choice.model, list(choice.values),
    ]  # fmt: skip


def _sources(choice: Choice) -> str | list[str] | dict[str, str] | None:
    """What `from_pretrained` takes for `--values`."""
    if not choice.values:
        return None if choice.words else DEFAULT_VALUES
    return value_sources(choice.values)
