"""The command ``mavis``: steer a model on one's own prompt, and whatever commands other packages add.

A distribution adds a command by an entry point in the group ``mavis.commands``, a callable that takes the list of
arguments after the command's name and returns an exit status or None. Commands are imported only when called.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points, version

Command = Callable[[list[str]], int | None]

# What `mavis --help` says of the commands that this distribution installs: known without importing them.
SUMMARIES = {
    "generate": "answer your own prompt, steered by value functions",
    "doctor": "tell how a language model would be read and steered, and why not faster",
    "demo": "steer a real language model between two objectives; measures rewards, draws the trade-off",
    "prompts": "training 0: prompts of a data set, cleaned, in the file that the other commands read",
    "sft": "training 0: fine-tune the language model on answers before it is steered",
    "collect": "training 1: sample trees of completions from a language model",
    "label": "training 2: add a reward to every finished completion of the trees",
    "train-model": "training 3: train a value model on labelled trees",
    "train-head": "training 3: train a value head, which reads the language model's own hidden state",
    "distil": "training 4: make one value model of several value functions",
    "iterate": "training, all of it: collect, label, train and validate, iteration by iteration",
    "evaluate": "measure rewards and divergence of steered completions on held-out prompts",
    "export": "make a data set with a card of trees of completions, here or on the Hub",
    "card": "write the model card of a trained value function",
    "bundle": "make one id of several value functions and their settings",
    "push": "publish a value function or a bundle on the Hugging Face Hub",
}
# Those that need no extra, and so are there from the first.
OWN = {
    "generate": "mavis_logits.commands.generate:main",
    "doctor": "mavis_logits.commands.doctor:main",
    "bundle": "mavis_logits.commands.hub:bundle",
    "push": "mavis_logits.commands.hub:push",
}
# The extras of this distribution that a command needs.
EXTRAS = {"generate": "demo", "doctor": "demo", "demo": "demo,training"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mavis`` on ``argv`` (default: the process's own arguments) and return its exit status."""
    commands = available_commands()
    arguments = top_parser(commands).parse_args(argv)
    if arguments.command is None:
        top_parser(commands).print_help()
        return 0
    if arguments.command not in commands:
        return fail(unknown_command(arguments.command, commands))
    try:
        with warnings.catch_warnings():
            if not arguments.debug:  # what libraries will change in future is no concern of a command's user
                warnings.filterwarnings("ignore", category=FutureWarning)
            return commands[arguments.command].load()(arguments.arguments) or 0
    except ModuleNotFoundError as error:
        if arguments.debug or (error.name or "mavis").startswith("mavis"):
            raise
        extras = EXTRAS.get(arguments.command, "training")
        return fail(
            f"mavis {arguments.command} needs the package {error.name}, which is not installed. "
            f'Run: pip install "mavis-logits[{extras}]"'
        )
    except (ValueError, OSError, ImportError) as error:  # what the library raises for bad input, each saying what to do
        if arguments.debug:
            raise
        return fail(f"mavis {arguments.command}: {error}")
    except KeyboardInterrupt:
        return 130


def available_commands() -> dict[str, EntryPoint]:
    """Return the commands by name, not yet imported, in the order in which help lists them."""
    own = (EntryPoint(name, function, "mavis.commands") for name, function in OWN.items())
    found = {point.name: point for point in own} | {point.name: point for point in entry_points(group="mavis.commands")}
    ordered = [*(name for name in SUMMARIES if name in found), *sorted(found.keys() - SUMMARIES.keys())]
    return {name: found[name] for name in ordered}


def top_parser(commands: dict[str, EntryPoint]) -> argparse.ArgumentParser:
    """Return the parser of ``mavis`` itself; what follows a command's name is left to the command."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {SUMMARIES.get(name, commands[name].value)}" for name in commands]
    parser = argparse.ArgumentParser(
        prog="mavis",
        usage="mavis COMMAND [options]   (mavis COMMAND --help for its options)",
        description="Steer language models while they write, with value functions.",
        epilog="commands:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mavis-logits {version('mavis-logits')}")
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def unknown_command(command: str, commands: dict[str, EntryPoint]) -> str:
    """Return the message for a command that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(command, commands, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(commands)}."
    return f"mavis: unknown command {command!r}. {hint}"


def fail(message: str) -> int:
    """Print an error and return the exit status that goes with it."""
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
