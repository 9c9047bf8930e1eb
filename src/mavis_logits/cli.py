"""The command ``mavis``: finds the command that is named (`commands.registry`) and runs it."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from .commands.registry import Command, available
from .core.known import meant


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mavis`` on ``argv`` (default: the process's own arguments) and return its exit status."""
    commands = available()
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
        return fail(
            f"mavis {arguments.command} needs the package {error.name}, which is not installed. "
            f'Run: pip install "mavis-logits[{commands[arguments.command].extras}]"'
        )
    except (ValueError, OSError, ImportError) as error:  # what the library raises for bad input, each saying what to do
        if arguments.debug:
            raise
        return fail(f"mavis {arguments.command}: {error}")
    except KeyboardInterrupt:
        return 130


def top_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of ``mavis`` itself; what follows a command's name is left to the command."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
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


def unknown_command(command: str, commands: Mapping[str, Command]) -> str:
    """Return the message for a command that does not exist, with the nearest one that does."""
    return f"mavis: unknown command {command!r}; {meant(command, commands)}"


def fail(message: str) -> int:
    """Print an error and return the exit status that goes with it."""
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
