"""``mavis push`` and ``mavis bundle``: publishing a value function, and making one id of several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .parser import Parser

PUSH_EXAMPLES = """examples:
  mavis push runs/value-helpful org/value-helpful --private
  mavis push my-bundle org/steering-bundle --custom-generate

The token is that of `hf auth login`, or HF_TOKEN.
"""
BUNDLE_EXAMPLES = """examples:
  mavis bundle my-bundle --values model_cards/smollm2-135m-value-head --weights helpful=0.7,humour=0.3
  mavis bundle my-bundle --values helpful=org/value-helpful humour=org/value-humour@v1.0 --beta 4

A folder is copied into the bundle; a Hub id is named in it, at the commit that it (or its revision after @) is at now.
"""


def push(argv: Sequence[str]) -> None:
    """``mavis push``: publish a value function's folder or a bundle."""
    arguments = push_parser().parse_args(list(argv))

    from ..hub.publish import push_folder  # only here, so that --help answers at once

    commit = push_folder(
        arguments.folder,
        arguments.repo,
        private=arguments.private or None,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        commit_message=arguments.message,
        custom_generate=arguments.custom_generate,
        allow_weak=arguments.allow_weak,
    )
    print(commit.pr_url or commit.commit_url)
    _tell_left_out(arguments.folder)


def bundle(argv: Sequence[str]) -> None:
    """``mavis bundle``: write a bundle of value functions into a new folder."""
    arguments = bundle_parser().parse_args(list(argv))

    from ..core.weights import parse_weights
    from ..hub.make_bundle import make_bundle
    from .generate import parse_values

    settings = {name: getattr(arguments, name) for name in ("beta", "top_k", "normalize", "unscored", "kl_budget")}
    settings["weights"] = parse_weights(arguments.weights) if arguments.weights else None
    given = {name: value for name, value in settings.items() if value is not None}
    values = parse_values(arguments.values)
    made = make_bundle(arguments.folder, values, given, arguments.base_model, allow_weak=arguments.allow_weak)
    print(made)
    for value in values.values() if isinstance(values, dict) else values:
        _tell_left_out(value)
    print(
        f"Steer by it: mavis generate --values {made} --model MODEL --prompt TEXT, or "
        f"MavisLogitsProcessor.from_pretrained({str(made)!r}, model=model, tokenizer=tokenizer)"
    )


def _tell_left_out(folder: str) -> None:
    """Print what of a folder was not published, if it is one."""
    from ..hub.publish import left_out

    found = left_out(Path(folder)) if Path(folder).is_dir() else {}
    if found:
        listed = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in found.items())
        print(f"Left out of {folder}, since nobody needs it to steer: {listed}")


def push_parser() -> argparse.ArgumentParser:
    """Return the parser of ``mavis push``."""
    about = "Publish a value function or a bundle on the Hugging Face Hub, with its card, in one commit."
    parser = _parser("push", about, PUSH_EXAMPLES)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="what training, save_pretrained or mavis bundle wrote")
    add("repo", metavar="REPO", help="org/name; made if it does not exist")
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", metavar="BRANCH", help="branch to push to; made if it does not exist (default: main)")
    add("--create-pr", action="store_true", help="open a pull request in place of committing")
    add("--message", metavar="TEXT", help="of the commit")
    add(
        "--custom-generate",
        action="store_true",
        help="for a bundle: add code for model.generate(custom_generate=REPO, trust_remote_code=True)",
    )
    return parser


def bundle_parser() -> argparse.ArgumentParser:
    """Return the parser of ``mavis bundle``."""
    about = "Make a bundle: several value functions and their default settings under one id."
    parser = _parser("bundle", about, BUNDLE_EXAMPLES)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="where to write it; must not exist")
    add(
        "--values",
        nargs="+",
        required=True,
        metavar="[NAME=]FOLDER_OR_ID",
        help="value functions, under their own objectives' names or under those given",
    )
    add("--weights", metavar="NAME=NUMBER,...", help="default weights (default: equal)")
    add("--beta", type=float, help="default strength (default: what the value functions recommend, else 5)")
    add("--top-k", type=int, help="default number of candidates (default: as recommended, else 15)")
    add(
        "--normalize",
        choices=("minmax", "gap", "center", "none", "standard"),
        help="default normalisation (default: as recommended, else minmax)",
    )
    add(
        "--unscored",
        choices=("drop", "keep", "expected"),
        help="what becomes of other tokens by default (default: as recommended, else drop)",
    )
    add("--kl-budget", type=float, metavar="NATS", help="default divergence per step, in place of a strength")
    add("--base-model", metavar="ID", help="the language model it is for (default: what the value functions name)")
    return parser


def _parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """What both have in common."""
    parser = Parser(
        prog=f"mavis {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    weak = "also where the metrics of a value function say that it foresees nothing"
    parser.add_argument("--allow-weak", action="store_true", help=weak)
    return parser
