"""The commands of `mavis` that train: each reads a typed config from a recipe and from flags, and runs one function.

    mavis train-head --config recipe.yaml --epochs 3

Flags override the recipe; an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mavis_logits.core.known import nearest

from .base.settings import check_keys, names_of, nested

Config = TypeVar("Config")
Result = TypeVar("Result")
DRY_RUN = "--dry-run"


def prompts(argv: Sequence[str]) -> None:
    """`mavis prompts`: prompts of a data set, prepared as in section F.1."""
    from . import closing
    from .make_prompts import PromptsConfig, make_prompts

    config = read_config(PromptsConfig, argv, "prompts")
    print(f"{config.output}:\n{make_prompts(config)}")
    print(closing.of_prompts(config))


def sft(argv: Sequence[str]) -> None:
    """`mavis sft`: supervised fine-tuning of the reference model (section F.2)."""
    from . import closing
    from .sft import SftConfig
    from .sft import sft as run

    config = read_config(SftConfig, argv, "sft")
    run(config)
    tell(lambda: closing.of_sft(config.output))


def export(argv: Sequence[str]) -> None:
    """`mavis export`: trees as a data set with its card."""
    from .export import ExportConfig
    from .export import export as run

    print(run(read_config(ExportConfig, argv, "export")))


def collect(argv: Sequence[str]) -> None:
    """`mavis collect`: sample trees of completions (Algorithm 3)."""
    from . import closing
    from .collect import CollectConfig
    from .collect import collect as run

    run_or_estimate(run, CollectConfig, argv, "collect", lambda _, store: closing.of_collect(store))


def label(argv: Sequence[str]) -> None:
    """`mavis label`: add the reward of every finished completion."""
    from . import closing
    from .label import LabelConfig
    from .label import label as run

    run_or_estimate(run, LabelConfig, argv, "label", closing.of_label)


def train_model(argv: Sequence[str]) -> None:
    """`mavis train-model`: train a value model on labelled trees."""
    from . import closing
    from .train_model import TrainModelConfig
    from .train_model import train_model as run

    run_or_estimate(run, TrainModelConfig, argv, "train-model", lambda config, _: closing.of_training(config))


def train_head(argv: Sequence[str]) -> None:
    """`mavis train-head`: train a value head on labelled trees."""
    from . import closing
    from .train_head import TrainHeadConfig
    from .train_head import train_head as run

    run_or_estimate(run, TrainHeadConfig, argv, "train-head", lambda config, _: closing.of_training(config))


def distil(argv: Sequence[str]) -> None:
    """`mavis distil`: make one value model of several value functions."""
    from . import closing
    from .distil import DistilConfig
    from .distil import distil as run

    config = read_config(DistilConfig, argv, "distil")
    run(config)
    tell(lambda: closing.of_training(config.training()))


def iterate(argv: Sequence[str]) -> None:
    """`mavis iterate`: policy iteration (Algorithm 1) from prompts to value functions."""
    from . import closing
    from .iterate import IterateConfig
    from .iterate import iterate as run

    run_or_estimate(run, IterateConfig, argv, "iterate", closing.of_iteration)


def fit(argv: Sequence[str]) -> None:
    """`mavis fit`: from a model, prompts and rewards to a bundle, in the time that there is."""
    from .fit.config import FitConfig
    from .fit.report import summary, usage
    from .fit.run import fit as run

    config = read_config(FitConfig, _named(argv, "--reward", "--rewards"), "fit")
    state = run(config)
    print("\n".join(["", *summary(config, state["results"]), "", usage(state), ""]))
    print(f"What it was measured by, and answers before and after: {config.output}/report.html")


def _named(argv: Sequence[str], flag: str, mapping: str) -> list[str]:
    """`--reward NAME=SPEC` as the flag of one entry of a mapping, which `--rewards.NAME SPEC` is."""
    words, taken = [], False
    for word in argv:
        inline = word.startswith(f"{flag}=")
        if word == flag and not taken:
            taken = True
            continue
        if not taken and not inline:
            words.append(word)
            continue
        name, sign, spec = (word.removeprefix(f"{flag}=") if inline else word).partition("=")
        if not (name and sign and spec):
            raise ValueError(f"{flag} got {word!r}; expected NAME=SPEC, e.g. {flag} kind=rewards.py:kind")
        words, taken = [*words, f"{mapping}.{name}", spec], False
    if taken:
        raise ValueError(f"{flag} expects NAME=SPEC, e.g. {flag} kind=rewards.py:kind")
    return words


def tune(argv: Sequence[str]) -> None:
    """`mavis tune`: an adapter that value functions are compared with."""
    from .tuning.config import TuneConfig
    from .tuning.run import tune as run

    config = read_config(TuneConfig, argv, "tune")
    result = run(config)
    print(
        f"{config.output}: {config.method} for {config.weights}, {result['steps']} steps, {result['rollout_tokens']:,} "
        f"tokens sampled, {result['cpu_seconds']:.0f} CPU seconds"
    )


def calibrate(argv: Sequence[str]) -> None:
    """`mavis calibrate`: one strength for all objectives of a value function."""
    from .calibrate import CalibrateConfig, told
    from .calibrate import calibrate as run

    config = read_config(CalibrateConfig, argv, "calibrate")
    print(told(config, run(config)))


def evaluate(argv: Sequence[str]) -> None:
    """`mavis evaluate`: measure rewards and KL on held-out prompts."""
    from . import closing
    from .evaluate import EvaluateConfig
    from .evaluate import evaluate as run

    config = read_config(EvaluateConfig, argv, "evaluate")
    results = run(config)
    print(closing.of_evaluation(config, results))


def pareto(argv: Sequence[str]) -> None:
    """`mavis pareto`: whole trade-offs of several methods."""
    from .pareto.config import ParetoConfig
    from .pareto.run import pareto as run

    config = read_config(ParetoConfig, argv, "pareto")
    for name, found in run(config)["methods"].items():
        low, high = found["interval"]
        print(f"{name}: hypervolume {found['hypervolume']:.2f} ({low:.2f} to {high:.2f})")
    print(f"{Path(config.output).with_suffix('.html')}: what was measured, point by point, and answers side by side")


def card(argv: Sequence[str]) -> None:
    """`mavis card`: write the model card of a trained value function."""
    from .cards import CardConfig, write_card

    print(write_card(read_config(CardConfig, argv, "card")))


def run_or_estimate(
    run: Callable[[Config], Result],
    kind: type[Config],
    argv: Sequence[str],
    command: str,
    closing: Callable[[Config, Result], str],
) -> None:
    """Read a config and run a command with it or, given `--dry-run`, print what it would do and take.

    Args:
        run: the command.
        kind: of its config.
        argv: what follows the command's name.
        command: its name.
        closing: what it says in the end, from its config and result.
    """
    words = [word for word in argv if word != DRY_RUN]
    config = read_config(kind, words, command, dry_run=True)
    if len(words) == len(argv):
        result = run(config)
        tell(lambda: closing(config, result))
        return
    from .estimates.iteration import dry_run

    dry_run(config)


def tell(words: Callable[[], str]) -> None:
    """Print, of several processes in the first one."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(words())


def read_config(kind: type[Config], argv: Sequence[str], command: str, dry_run: bool = False) -> Config:
    """A config from `--config FILE.yaml` and flags, which override it.

    Args:
        kind: a dataclass.
        argv: what follows the command's name.
        command: its name, for `--help`.
        dry_run: whether it has a dry run, for `--help`.

    Raises:
        ValueError: an unknown key, a missing or ill-typed value; the message names it.
        OSError: the recipe cannot be read.
    """
    summary = (kind.__doc__ or "").split("\n\n")[0]
    parser = ArgumentParser(prog=f"mavis {command}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="recipe file (YAML); flags override it")
    if dry_run:
        parser.add_argument(
            DRY_RUN, action="store_true", help="print what would happen: tokens, time, disk; do nothing"
        )
    parser.add_class_arguments(kind)
    _describe(parser, kind)
    recipes = _recipes(argv)
    contents = [check_recipe(path, kind) for path in recipes]
    for path in recipes:
        for folder in (str(Path.cwd()), str(path.resolve().parent)):  # a reward may lie beside the recipe that names it
            if folder not in sys.path:
                sys.path.append(folder)
    try:
        values = parser.parse_args(_with_lists(argv, kind)).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{error}{_nearest(str(error), kind)} (see mavis {command} --help)") from error
    for name in ("config", "dry_run"):
        values.pop(name, None)
    free = [name for name, hint in get_type_hints(kind).items() if "Any" in str(hint)]
    for content in contents:
        values |= {name: _as_written(values[name], content[name]) for name in free if name in content}
    return kind(**nested(kind, values))


def _as_written(read: Any, written: Any) -> Any:
    """A recipe's setting with its texts as they are written there, however deep.

    The parser reads a text again as YAML where any type will do, and takes "Be kind: say no." for a mapping.
    """
    if isinstance(written, str) and not isinstance(read, str):
        try:
            return written if yaml.safe_load(written) == read else read  # else a flag has taken its place
        except yaml.YAMLError:
            return read
    if isinstance(written, dict) and isinstance(read, dict):
        return {key: _as_written(value, written[key]) if key in written else value for key, value in read.items()}
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        return [_as_written(*both) for both in zip(read, written, strict=True)]
    return read


def _with_lists(argv: Sequence[str], kind: type) -> list[str]:
    """Flags of lists take `a` or `a,b` too, not only `[a, b]`; those that take one text as well are left alone."""
    lists = {f"--{name}" for name, hint in get_type_hints(kind).items() if get_origin(hint) is list}
    words = list(argv)
    for i, word in enumerate(words):
        flag, sign, value = word.partition("=")
        if flag in lists and sign and not value.startswith("["):
            words[i] = f"{flag}=[{value}]"
        elif i and words[i - 1] in lists and not word.startswith(("[", "--")):
            words[i] = f"[{word}]"
    return words


def check_recipe(path: Path, kind: type) -> dict[str, Any]:
    """What the recipe says; raise `ValueError` for a key that `kind` does not have."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings, one `name: value` a line; got {type(content).__name__}.")
    check_keys(content, kind, str(path))
    return content


def _nearest(message: str, kind: type) -> str:
    """For an error about unrecognized arguments: the known flag nearest to the first of them."""
    unknown = re.search(r"unrecognized arguments: --([\w.-]+)", message, re.IGNORECASE)
    near = nearest(unknown[1].replace("-", "_"), get_type_hints(kind)) if unknown else None
    return f"; did you mean --{near}?" if near else ""


def _recipes(argv: Sequence[str]) -> list[Path]:
    """The files given with `--config`."""
    following = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    joined = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    return [Path(name) for name in following + joined]


def _describe(parser: ArgumentParser, kind: type) -> None:
    """Give flags the descriptions of their fields, and put those of `kind` itself before those that it shares."""
    described: dict[str, str] = {}
    for owner in kind.__mro__:
        _, _, section = (vars(owner).get("__doc__") or "").partition("Attributes:")
        for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, flags=re.MULTILINE):
            described.setdefault(name, " ".join(text.split()))
    for action in parser._actions:
        if action.dest in described:
            action.help = described[action.dest].replace("%", "%%")
    order = names_of(kind)
    for group in parser._action_groups:
        own = [action for action in group._group_actions if action.dest.split(".")[0] in order]
        others = [action for action in group._group_actions if action not in own]
        own.sort(key=lambda action: order.index(action.dest.split(".")[0]))
        group._group_actions[:] = [*others, *own]
