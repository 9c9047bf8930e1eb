"""The command ``mavis ui``: loads a model, opens the page, and serves it until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading

from ..generate import check_names, model_arguments, quiet_transformers
from ..parser import Parser
from .settings import LENGTH, SEED, Choice, Settings

EXAMPLES = """examples:
  mavis ui
  mavis ui --values model_cards/smollm2-135m-policy-helpful --port 8000 --open
  mavis ui --model org/chat-model --values org/steering-bundle

Keys on the page: Enter answers, Escape stops, Tab goes from token to token. Ctrl-C here ends it.
Exit status: 0 after Ctrl-C, 2 where something is missing or out of range.
"""


def main(argv: list[str]) -> int:
    """Serve the page until it is interrupted."""
    arguments = parser().parse_args(argv)
    check(arguments)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with quiet_transformers():
        # Imported only here, so that `--help` and a mistyped option answer at once.
        from .engine import Engines, known_choices
        from .page import Page

        own = Choice(arguments.model, tuple(arguments.values or ()), tuple(arguments.words or ()), arguments.top_k)
        print(f"Loading {own.model} ...", file=sys.stderr, flush=True)
        engines = Engines()
        engines.get(own)
        local = arguments.host in ("127.0.0.1", "localhost", "::1")
        page = Page(
            engines, known_choices(own), open_choice=local, visitors=arguments.visitors,
            length=arguments.max_new_tokens, temperature=arguments.temperature, seed=arguments.seed,
        )  # fmt: skip
        url = page.launch(arguments.host, arguments.port, inbrowser=arguments.open)
        print(f"The page is at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\nclosed", file=sys.stderr)
        finally:
            page.blocks.close(verbose=False)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Tell what is wrong with the arguments before anything is loaded.

    Raises:
        ValueError: a setting out of range, or names that cannot be read.
        OSError: the port is in use, or there is no such host.
    """
    check_names(arguments)
    temperature = 1.0 if arguments.temperature is None else arguments.temperature
    Settings({}, 0.0, temperature, arguments.max_new_tokens, arguments.seed)
    if arguments.visitors < 1:
        raise ValueError(f"--visitors must be at least 1, got {arguments.visitors}")
    if arguments.port is not None:
        check_port(arguments.host, arguments.port)


def check_port(host: str, port: int) -> None:
    """Raise `OSError` unless the port can be listened on."""
    if not 0 < port < 65536:
        raise ValueError(f"--port must be between 1 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise OSError(
            f"port {port} of {host} cannot be used ({error.strerror or error}): give another one with --port, or leave "
            "it out for the next that is free"
        ) from error


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mavis ui``."""
    result = Parser(
        prog="mavis ui",
        description="A page to try steering on: sliders, two answers side by side, what each token was chosen from.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model_arguments(result)
    add = result.add_argument
    low, high = LENGTH
    add("--max-new-tokens", type=int, default=48, metavar="N",
        help=f"length of an answer that the page begins with, {low} to {high} (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help=f"of the sampling, {SEED[0]} to {SEED[1]} (default: %(default)s)")
    add("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="address to serve on; on any but this machine's own, visitors choose only among what is offered "
        "(default: %(default)s)")  # fmt: skip
    add("--port", type=int, help="port to serve on (default: 7860, or the next that is free)")
    add("--visitors", type=int, default=2, metavar="N",
        help="answers that are written at once; further visitors wait (default: %(default)s)")  # fmt: skip
    add("--open", action="store_true", help="open the page in the browser")
    return result
