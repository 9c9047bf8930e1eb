"""``mavis demo``: a real language model answers everyday questions at several weightings of two objectives.

The reward models that judge the answers are those whose verdict the value functions were trained to foresee. Model,
prompts, value functions and reward models come with the repository and its packages: nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mavis_logits.commands.parser import Parser

from .record import Measured, Setting, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mavis_logits import MavisLogitsProcessor

VALUE_HEAD = "model_cards/smollm2-135m-value-head"
VALUE_MODEL = "model_cards/smollm2-135m-value-{objective}"
REWARDS = {
    "helpful": "examples/rewards/helpful",
    "harmless": "examples/rewards/harmless",
    "humour": "examples/rewards/humour",
    "concise": "examples/fit/concise.py:concise",
    "positive": "examples/rewards/functions.py:positive",
    "formal": "examples/rewards/functions.py:formal",
}
OBJECTIVES = {"head": ("concise", "formal"), "model": ("helpful", "humour")}
KNOWN = {"head": tuple(REWARDS), "model": ("helpful", "harmless", "humour")}  # what there are value functions for
PROMPTS = "examples/data/demo_prompts.jsonl"
STEERING: dict[str, dict[str, float | int | str]] = {
    # What it recommends, but for the cut, which has a row of its own.
    "head": {"beta": 5.6, "top_k": 200, "normalize": "standard", "unscored": "drop"},
    "model": {"beta": 5.0, "top_k": 15, "normalize": "minmax", "unscored": "drop"},  # the paper's
}


def main(argv: list[str]) -> int:
    """Run the demo: answers side by side, a table of rewards, a figure of the trade-off."""
    arguments = read_options(argv)

    # Imported only here, so that `--help` and a mistyped option answer at once.
    import transformers
    from rich.console import Console

    from mavis_logits.demo.checkout import checkout_path
    from mavis_logits.demo.smollm2 import load_smollm2

    from ..base.prompts import read_prompts
    from ..rewards.load import load_reward
    from . import report as report

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    objectives = arguments.objectives
    console.print(report.introduction(objectives, arguments.top_k, arguments.max_new_tokens))
    rows = read_prompts(arguments.prompts or str(checkout_path(PROMPTS)), arguments.limit)
    prompts = [row["prompt"] for row in rows]
    with console.status("Loading the language model (the first time it is unpacked: half a minute)"):
        model, tokenizer = load_smollm2()
    with console.status("Loading value functions and reward models"):
        judges = {name: load_reward(reward_spec(name)) for name in objectives}
        how = {name: getattr(arguments, name) for name in ("top_k", "normalize", "unscored")}
        steer = load_steering(
            value_sources(arguments.kind, objectives),
            model,
            tokenizer,
            reference_temperature=arguments.temperature,
            **how,
        )

    settings = weightings(objectives, arguments.beta, arguments.top_k)
    stage = Stage(model, tokenizer, prompts, judges, arguments.seeds, arguments.max_new_tokens, arguments.temperature)
    measured = []
    with report.progress(console, len(settings) * stage.seeds * stage.max_new_tokens) as advance:
        for setting in settings:
            processor = steer(setting) if setting.weights else None
            measured.append(measure(stage, setting, processor, advance))

    shown = min(arguments.show, len(prompts))
    for index in (len(prompts) * i // shown for i in range(shown)):  # spread over the file, whatever the answers are
        console.print(report.side_by_side(prompts[index], measured, index, console.width))
    console.print(report.table(measured, objectives))
    console.print(report.reading(measured, objectives))
    report.draw(measured, objectives, Path(arguments.out))
    if arguments.json:
        report.write_results(Path(arguments.json), prompts, measured, vars(arguments))
    steering = {name: getattr(arguments, name) for name in STEERING[arguments.kind]}
    steering["reference_temperature"] = arguments.temperature
    closing = report.closing(arguments.out, value_sources(arguments.kind, objectives), objectives, steering)
    console.print(closing, soft_wrap=True, markup=False, highlight=False)
    return 0


def read_options(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments; how to steer, and towards what, depends on what steers, unless it is said."""
    command = parser()
    arguments = command.parse_args(argv)
    known = KNOWN[arguments.kind]
    arguments.objectives = tuple(getattr(arguments, "objectives", OBJECTIVES[arguments.kind]))
    if len(set(arguments.objectives)) != 2 or not set(arguments.objectives) <= set(known):
        command.error(
            f"--objectives must be two of {', '.join(known)} for --kind {arguments.kind}, "
            f"got {' and '.join(arguments.objectives)}"
        )
    return argparse.Namespace(**(STEERING[arguments.kind] | vars(arguments)))


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mavis demo``."""
    result = Parser(
        prog="mavis demo",
        description="A real language model answers everyday questions at several weightings of two objectives; "
        "the rewards judge the answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add(
        "--kind",
        choices=["head", "model"],
        default="head",
        help="what foresees the rewards: one value head on the language model, or separate value models",
    )
    add(
        "--objectives", nargs=2, metavar="NAME", help=f"two of {', '.join(REWARDS)} (default: concise formal; value "
        "models: helpful humour)", default=argparse.SUPPRESS,
    )  # fmt: skip
    add("--prompts", metavar="FILE", help='questions to answer, one JSON object {"id": ..., "prompt": ...} a line')
    add("--limit", type=positive, default=24, metavar="N", help="answer at most this many questions")
    add("--seeds", type=positive, default=3, metavar="N", help="samples of every answer")

    def add_steering(flag: str, name: str, text: str, **kind: Any) -> None:
        defaults = f"(default: {STEERING['head'][name]}; value models: {STEERING['model'][name]})"
        add(flag, default=argparse.SUPPRESS, help=f"{text} {defaults}", **kind)

    add_steering("--beta", "beta", "strength of the steering", type=float)
    add_steering("--top-k", "top_k", "how many of the likeliest tokens to choose among", type=positive)
    add_steering(
        "--normalize",
        "normalize",
        "values in standard deviations of their rewards, as they are, or rescaled to [0, 1] at every step",
        choices=["standard", "none", "minmax"],
    )
    add("--temperature", type=float, default=0.7, help="of the language model, the same in all settings")
    add("--max-new-tokens", type=positive, default=48, help="length at which answers are cut off")
    add("--show", type=int, default=3, metavar="N", help="print the answers to this many questions")
    add("--out", default="demo.png", metavar="PNG", help="where to write the figure")
    add("--json", metavar="FILE", help="also write answers, rewards and settings to this file")
    return result


def positive(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def weightings(objectives: tuple[str, str], beta: float, top_k: int) -> list[Setting]:
    """Return the settings that the demo compares.

    Cutting to the top k changes the answers by itself, so that it has its own setting: beta 0.
    """
    first, second = objectives
    return [
        Setting("unsteered"),
        Setting(f"cut to top {top_k}", {first: 0.5, second: 0.5}, beta=0.0),
        Setting(f"{first} 1", {first: 1.0, second: 0.0}, beta),
        Setting(f"{first} ½, {second} ½", {first: 0.5, second: 0.5}, beta),
        Setting(f"{second} 1", {first: 0.0, second: 1.0}, beta),
    ]


def reward_spec(objective: str) -> str:
    """Return what `load_reward` loads an objective's reward from, in the clone that this is."""
    from mavis_logits.demo.checkout import checkout_path

    path, colon, function = REWARDS[objective].partition(":")
    return f"{checkout_path(path)}{colon}{function}"


def value_sources(kind: str, objectives: Sequence[str]) -> str | dict[str, str]:
    """Return the folder of the value functions, relative to the repository: one for all objectives, or one for each."""
    return VALUE_HEAD if kind == "head" else {name: VALUE_MODEL.format(objective=name) for name in objectives}


def load_steering(
    sources: str | dict[str, str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> Callable[[Setting], MavisLogitsProcessor]:
    """Load the value head or value models once; the result returns the processor set to the setting asked for."""
    from mavis_logits import MavisLogitsProcessor
    from mavis_logits.demo.checkout import checkout_path

    values: str | dict[str, str] = (
        str(checkout_path(sources))
        if isinstance(sources, str)
        else {name: str(checkout_path(source)) for name, source in sources.items()}
    )
    mavis = MavisLogitsProcessor.from_pretrained(values, model=model, tokenizer=tokenizer, trace=True, **settings)

    def steer(setting: Setting) -> MavisLogitsProcessor:
        mavis.weights, mavis.beta = setting.weights, setting.beta  # type: ignore[assignment]
        return mavis

    return steer


def measure(
    stage: Stage, setting: Setting, processor: MavisLogitsProcessor | None, advance: Callable[[str, int], None]
) -> Measured:
    """Answer every prompt once per seed in one setting and let the reward models judge; `advance` shows progress."""
    answers, kl = [], []
    for seed in range(stage.seeds):
        texts, divergence = answer(stage, processor, seed, lambda steps: advance(setting.name, steps))
        answers.append(texts)
        kl.append(divergence)
    rewards = {
        name: np.array([judge(stage.prompts, texts) for texts in answers]) for name, judge in stage.judges.items()
    }
    return Measured(setting, answers, rewards, np.array(kl))


def answer(
    stage: Stage, processor: MavisLogitsProcessor | None, seed: int, tick: Callable[[int], None]
) -> tuple[list[str], list[float]]:
    """Sample one answer to each of P prompts in one batch.

    Returns:
        P texts, and their P divergences from the unsteered model in nats: the KL of every step, summed over an answer.
    """
    import torch
    from transformers import StoppingCriteriaList

    from mavis_logits.core.chat import answers, chat_inputs

    from ..sampling.reference import Reference

    def step(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        tick(1)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    inputs = chat_inputs(stage.tokenizer, stage.prompts)
    if processor is not None:
        processor.reset()  # so that the trace holds this call alone
    torch.manual_seed(seed)
    with Reference.of(stage.model, stage.tokenizer).applied(stage.model):
        output = stage.model.generate(  # type: ignore[operator]
            **inputs,
            do_sample=True,
            temperature=1.0 if processor else stage.temperature,  # a processor applies it before the tilt
            top_k=0,
            top_p=1.0,
            max_new_tokens=stage.max_new_tokens,
            logits_processor=[processor] if processor else [],
            stopping_criteria=StoppingCriteriaList([step]),
            pad_token_id=stage.tokenizer.pad_token_id,
        )
    prompt_length = inputs["input_ids"].shape[1]
    tick(stage.max_new_tokens - (output.shape[1] - prompt_length))  # all answers may end early
    texts = answers(stage.tokenizer, output, prompt_length)
    if processor is None or processor.trace is None:
        return texts, [0.0] * len(texts)
    ends = (output[:, prompt_length:] == stage.tokenizer.eos_token_id).int()
    going = ends.cumsum(dim=1) - ends == 0  # [P, T]: up to and with the first EOS
    steps = torch.stack([step.kl for step in processor.trace.steps], dim=1)  # [P, T]
    return texts, (steps * going).sum(dim=1).tolist()
