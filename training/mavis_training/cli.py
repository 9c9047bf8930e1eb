"""The commands of `mavis` that train: each reads a typed config from a recipe and from flags, and runs one function.

    mavis train-head --config recipe.yaml --epochs 3

Flags override the recipe; an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

Config = TypeVar("Config")


def collect(argv: Sequence[str]) -> None:
    """`mavis collect`: sample trees of completions (Algorithm 3)."""
    from .collect import CollectConfig
    from .collect import collect as run

    run(read_config(CollectConfig, argv, "collect"))


def label(argv: Sequence[str]) -> None:
    """`mavis label`: add the reward of every finished completion."""
    from .label import LabelConfig
    from .label import label as run

    run(read_config(LabelConfig, argv, "label"))


def train_model(argv: Sequence[str]) -> None:
    """`mavis train-model`: train a value model on labelled trees."""
    from .train_model import TrainModelConfig
    from .train_model import train_model as run

    run(read_config(TrainModelConfig, argv, "train-model"))


def train_head(argv: Sequence[str]) -> None:
    """`mavis train-head`: train a value head on labelled trees."""
    from .train_head import TrainHeadConfig
    from .train_head import train_head as run

    run(read_config(TrainHeadConfig, argv, "train-head"))


def evaluate(argv: Sequence[str]) -> None:
    """`mavis evaluate`: measure rewards and KL on held-out prompts."""
    from .evaluate import EvaluateConfig
    from .evaluate import evaluate as run

    run(read_config(EvaluateConfig, argv, "evaluate"))


def card(argv: Sequence[str]) -> None:
    """`mavis card`: write the model card of a trained value function."""
    from .cards import CardConfig, write_card

    print(write_card(read_config(CardConfig, argv, "card")))


def read_config(kind: type[Config], argv: Sequence[str], command: str) -> Config:
    """A config from `--config FILE.yaml` and flags, which override it.

    Args:
        kind: a dataclass.
        argv: what follows the command's name.
        command: its name, for `--help`.

    Raises:
        ValueError: an unknown key, a missing or ill-typed value; the message names it.
        OSError: the recipe cannot be read.
    """
    summary = (kind.__doc__ or "").split("\n\n")[0]
    parser = ArgumentParser(prog=f"mavis {command}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="recipe file (YAML); flags override it")
    parser.add_class_arguments(kind)
    _describe(parser, kind)
    for path in _recipes(argv):
        check_recipe(path, kind)
    try:
        values = parser.parse_args(list(argv)).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{error}{_nearest(str(error), kind)} (see mavis {command} --help)") from error
    values.pop("config", None)
    return kind(**_plain(kind, values))


def check_recipe(path: Path, kind: type) -> None:
    """Raise `ValueError` for a key of the recipe that `kind` does not have."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings, one `name: value` a line; got {type(content).__name__}.")
    _check_keys(content, kind, str(path))


def _check_keys(content: Mapping[str, Any], kind: type, where: str) -> None:
    hints = get_type_hints(kind)
    for key, value in content.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(hints)}."
            raise ValueError(f"{where} has the unknown key {key!r}: {hint}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            _check_keys(value, hints[key], f"{where}, {key}")  # type: ignore[arg-type]


def _nearest(message: str, kind: type) -> str:
    """For an error about unrecognized arguments: the known flag nearest to the first of them."""
    unknown = re.search(r"unrecognized arguments: --([\w.-]+)", message)
    near = difflib.get_close_matches(unknown[1].replace("-", "_"), get_type_hints(kind), n=1) if unknown else []
    return f"; did you mean --{near[0]}?" if near else ""


def _recipes(argv: Sequence[str]) -> list[Path]:
    """The files given with `--config`."""
    following = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    joined = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    return [Path(name) for name in following + joined]


def _plain(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as the dataclasses that `kind` declares."""
    hints = get_type_hints(kind)
    return {
        name: hints[name](**value) if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict) else value
        for name, value in values.items()
    }


def _describe(parser: ArgumentParser, kind: type) -> None:
    """Give flags the descriptions in the `Attributes:` section of the dataclass's docstring."""
    _, _, section = (kind.__doc__ or "").partition("Attributes:")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, flags=re.MULTILINE)
    described = {name: " ".join(text.split()) for name, text in entries}
    for action in parser._actions:
        if action.dest in described:
            action.help = described[action.dest].replace("%", "%%")
