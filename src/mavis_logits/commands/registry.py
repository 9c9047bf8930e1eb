"""All commands of `mavis`, in the order in which help lists them: known without importing what they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points

Run = Callable[[list[str]], int | None]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: as it is called.
        summary: a line for `mavis --help`.
        function: "module:name" of what runs it, given the arguments after its name; returns an exit status or None.
        extras: of this distribution that it needs, for the message where they are not installed.
    """

    name: str
    summary: str
    function: str
    extras: str = "training"

    def load(self) -> Run:
        """Import what runs it."""
        module, _, name = self.function.partition(":")
        run: Run = getattr(import_module(module), name)
        return run


OWN = [
    Command(
        "generate", "answer your own prompt, steered by value functions", "mavis_logits.commands.generate:main", "demo"
    ),
    Command("chat", "talk to a language model and steer it while you do", "mavis_logits.commands.chat:main", "demo"),
    Command(
        "ui",
        "a page in the browser to try steering on, with sliders and coloured tokens",
        "mavis_logits.commands.ui.command:main",
        "ui",
    ),
    Command(
        "serve",
        "serve a language model with vLLM, every request steered by weights of its own",
        "mavis_logits.commands.serve:main",
        "vllm",
    ),
    Command(
        "verify",
        "see on your own model whether steering does what it should and what it costs; one block to paste",
        "mavis_logits.commands.verify:main",
        "demo",
    ),
    Command(
        "doctor",
        "tell how a language model would be read and steered, and why not faster",
        "mavis_logits.commands.doctor:main",
        "demo",
    ),
    Command(
        "demo",
        "steer a real language model between two objectives; measures rewards, draws the trade-off",
        "mavis_training.demo:main",
        "demo,training",
    ),
    Command(
        "fit",
        "from a model, prompts and rewards to a value function that steers: one command, in the time that there is",
        "mavis_training.cli:fit",
    ),
    Command(
        "prompts",
        "training 0: prompts of a data set, cleaned, in the file that the other commands read",
        "mavis_training.cli:prompts",
    ),
    Command(
        "sft",
        "training 0: fine-tune the language model on answers before it is steered",
        "mavis_training.cli:sft",
    ),
    Command("collect", "training 1: sample trees of completions from a language model", "mavis_training.cli:collect"),
    Command("label", "training 2: add a reward to every finished completion of the trees", "mavis_training.cli:label"),
    Command("train-model", "training 3: train a value model on labelled trees", "mavis_training.cli:train_model"),
    Command(
        "train-head",
        "training 3: train a value head, which reads the language model's own hidden state",
        "mavis_training.cli:train_head",
    ),
    Command("distil", "training 4: make one value model of several value functions", "mavis_training.cli:distil"),
    Command(
        "iterate",
        "training, all of it: collect, label, train and validate, iteration by iteration",
        "mavis_training.cli:iterate",
    ),
    Command(
        "tune",
        "tune an adapter by DPO, RLOO, GRPO or SFT, or find a direction: what value functions are compared with",
        "mavis_training.cli:tune",
    ),
    Command(
        "calibrate",
        "find units of value in which one strength tilts equally far towards every objective of a value function",
        "mavis_training.cli:calibrate",
    ),
    Command(
        "evaluate",
        "measure rewards and divergence of steered completions on held-out prompts",
        "mavis_training.cli:evaluate",
    ),
    Command(
        "pareto",
        "compare methods over whole trade-offs between objectives: fronts, hypervolume, intervals, a page",
        "mavis_training.cli:pareto",
        "demo,training,pareto",
    ),
    Command(
        "export",
        "make a data set with a card of trees of completions, here or on the Hub",
        "mavis_training.cli:export",
    ),
    Command("card", "write the model card of a trained value function", "mavis_training.cli:card"),
    Command("bundle", "make one id of several value functions and their settings", "mavis_logits.commands.hub:bundle"),
    Command("push", "publish a value function or a bundle on the Hugging Face Hub", "mavis_logits.commands.hub:push"),
]


def available() -> dict[str, Command]:
    """The commands by name: those above, then those that other distributions add.

    They do so by an entry point in the group `mavis.commands`, whose value is as `Command.function`.
    """
    found = {command.name: command for command in OWN}
    for point in sorted(entry_points(group="mavis.commands"), key=lambda point: point.name):
        found.setdefault(point.name, Command(point.name, point.value, point.value))
    return found
