"""``mavis chat``: a conversation in the terminal, steered while it goes on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.weights import parse_weights
from .finding import Finding
from .generate import DEFAULT_TEMPERATURE, quiet_transformers, steered_model, value_arguments
from .parser import Parser

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from .. import MavisLogitsProcessor

COMMANDS = {
    "/weights NAME=NUMBER,...": "weight of each objective; alone: show them",
    "/beta NUMBER": "strength; 0 is no steering",
    "/kl NATS": "in place of beta: how far an answer of full length may go from the model, in nats",
    "/temperature NUMBER": "of the language model",
    "/why": "the last answer, token by token: what steering made likelier, and what less likely",
    "/compare": "the last question once more, unsteered, by the same seed",
    "/find NAME NAME ...": "weights of some objectives, by up to ten choices between answers to the last question",
    "/new": "forget the conversation",
    "/help": "this list",
    "/quit": "the end (Ctrl-D, too); Ctrl-C stops an answer",
}


class Chat:
    """One conversation. A line goes in by `take`, what comes of it goes to the console.

    Args:
        model, tokenizer: of the base model; the tokenizer has a chat template.
        mavis: what steers it; made with a trace.
        console: to print to.
        temperature: of the reference.
        max_new_tokens: of an answer.
        seed: of the first answer; every further one has the next.
        system: system prompt, if any.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        mavis: MavisLogitsProcessor,
        console: Console,
        temperature: float = DEFAULT_TEMPERATURE,
        max_new_tokens: int = 256,
        seed: int = 0,
        system: str | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "this model's tokenizer has no chat template, so that it cannot tell turns apart: take a chat model, "
                "or mavis generate for raw text"
            )
        self.model, self.tokenizer, self.mavis, self.console = model, tokenizer, mavis, console
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.begin = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[dict[str, str]] = list(self.begin)
        self.last: Tensor | None = None  # the new tokens of the last answer
        self.finding: Finding | None = None
        self.mavis.config = replace(self.mavis.config, reference_temperature=temperature)

    @property
    def temperature(self) -> float:
        """Of the reference."""
        return self.mavis.config.reference_temperature

    def take(self, line: str) -> bool:
        """Act on a line: a command, or something said to the model; False if the conversation is over.

        What is wrong with a command is told, and nothing is changed.
        """
        line = line.strip()
        if not line:
            return True
        if self.finding is not None and line in ("a", "b", "/stop"):
            self._choose(line)
            return True
        self.finding = None
        if not line.startswith("/"):
            self.say(line)
            return True
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/weights": self._weights, "/beta": self._beta, "/kl": self._kl, "/temperature": self._temperature,
            "/why": lambda _: self.why(), "/compare": lambda _: self.compare(), "/new": lambda _: self._new(),
            "/find": self.find,
            "/help": lambda _: self.help(),
        }  # fmt: skip
        if name not in actions:
            self.console.print(f"There is no {name}; /help lists what there is.", style="yellow")
            return True
        try:
            actions[name](rest.strip())
        except ValueError as error:
            self.console.print(str(error), style="yellow", markup=False)
        return True

    def say(self, text: str) -> None:
        """Answer a text, and keep both."""
        self.turns.append({"role": "user", "content": text})
        self.last, answer = self._answer([self.mavis])
        self.turns.append({"role": "assistant", "content": answer})
        shares = zip(self.mavis.objectives, self.mavis.weights.tolist(), strict=True)
        shown = ", ".join(f"{name} {share:.3g}" for name, share in shares if share)
        self.console.print(
            f"[{shown or 'unsteered'}; {len(self.last)} tokens, {self.mavis.stats.kl:.1f} nats]",
            style="dim",
            markup=False,
        )

    def why(self) -> None:
        """Print the last answer coloured by how much likelier steering made each of its tokens."""
        from rich.text import Text

        trace = self.mavis.trace
        if self.last is None or trace is None or not len(trace):
            raise ValueError("There is no answer yet: say something first.")
        ratios = trace.log_ratios(self.last[None])[0].tolist()
        line = Text()
        for token, ratio in zip(self.last.tolist(), ratios, strict=True):
            line.append(self.tokenizer.decode([token]), style=_colour(ratio))
        self.console.print(line)
        most = max(range(len(ratios)), key=lambda i: ratios[i])
        token = self.tokenizer.decode([self.last[most].item()])
        self.console.print(
            f"green: likelier than unsteered, red: less likely; most of all {token!r}, {ratios[most]:+.1f} nats",
            style="dim", markup=False,
        )  # fmt: skip

    def compare(self) -> None:
        """Answer the last question unsteered, by the seed of the last answer; the conversation stays as it is."""
        if len(self.turns) < 2 + len(self.begin):
            raise ValueError("There is no answer yet: say something first.")
        kept = self.turns.pop()
        self.seed -= 1
        try:
            self._answer([])
        finally:
            self.turns.append(kept)
        self.console.print("[unsteered, the same seed]", style="dim", markup=False)

    def find(self, names: str) -> None:
        """Begin to find the weights of some objectives, those that have a weight if none are named.

        Raises:
            ValueError: fewer than two, or unknown ones; or nothing has been asked yet.
        """
        import torch

        kept = self.mavis.weights
        chosen = names.split() or [n for n, share in zip(self.mavis.objectives, kept.tolist(), strict=True) if share]
        unknown = [name for name in chosen if name not in self.mavis.objectives]
        if unknown or len(set(chosen)) < 2:
            raise ValueError(f"/find takes two or more of {', '.join(self.mavis.objectives)}; got {', '.join(chosen)}")
        if len(self.turns) < 2 + len(self.begin):
            raise ValueError("There is no question yet: say something first.")
        mixes = [{name: 1.0} for name in chosen for _ in range(2)] + 2 * [dict.fromkeys(chosen, 1 / len(chosen))]
        answer, answers, rewards = self.turns.pop(), [], []
        units = self.mavis.functions.units()[1]
        try:
            with self.console.status(f"Writing {len(mixes)} answers"):
                for mix in mixes:
                    # All count a little, so that a value model that has no say is asked, too.
                    self.mavis.weights = dict.fromkeys(self.mavis.objectives, 1e-6) | mix
                    _, text = self._answer([self.mavis], shown=False)
                    assert self.mavis.trace is not None
                    last = self.mavis.trace[len(self.mavis.trace) - 1]
                    values = last.values[0, int((last.candidates[0] == self._end).int().argmax())].cpu() / units
                    answers.append(text)
                    rewards.append(values[[self.mavis.objectives.index(name) for name in chosen]])
        finally:
            self.mavis.weights = kept
            self.turns.append(answer)
        self.finding = Finding(chosen, answers, torch.stack(rewards))
        self._ask()

    def _choose(self, line: str) -> None:
        assert self.finding is not None
        if line != "/stop":
            self.finding.choose(line == "a")
        if line == "/stop" or self.finding.done:
            self.mavis.weights = self.finding.finder.weights
            self.console.print(f"weights now: {self.finding.told()}", markup=False)
            self.finding = None
        else:
            self._ask()

    def _ask(self) -> None:
        assert self.finding is not None
        for letter, which in zip("ab", self.finding.pair, strict=True):
            self.console.print(f"{letter}: {self.finding.answers[which]}", markup=False, highlight=False)
        count = self.finding.finder.choices + 1
        self.console.print(f"[choice {count}: a or b; /stop takes {self.finding.told()}]", style="dim", markup=False)

    def help(self) -> None:
        """Print the commands."""
        width = max(map(len, COMMANDS))
        for name, what in COMMANDS.items():
            self.console.print(f"{name:<{width}}  {what}", markup=False, highlight=False)

    def _answer(self, processors: list[MavisLogitsProcessor], shown: bool = True) -> tuple[Tensor, str]:
        """New tokens and text of an answer to the turns; Ctrl-C leaves what has been written until then."""
        import torch
        from transformers import TextStreamer

        encoded = self.tokenizer.apply_chat_template(
            self.turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        start, written = encoded["input_ids"].shape[1], []
        console = self.console

        class Shown(TextStreamer):
            def put(self, value: Tensor) -> None:
                super().put(value)
                written.append(value.reshape(-1))

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if shown:
                    console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)

        torch.manual_seed(self.seed)
        self.seed += 1
        for mavis in processors:
            mavis.reset()
        try:
            self.model.generate(
                **encoded, do_sample=True, temperature=1.0 if processors else self.temperature, top_k=0, top_p=1.0,
                max_new_tokens=self.max_new_tokens, logits_processor=processors,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=Shown(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )  # fmt: skip
        except KeyboardInterrupt:
            console.print(" ... stopped", style="dim")
        tokens = torch.cat(written)[start:]
        self._end = int(tokens[-1]) if len(tokens) else -1
        return tokens, self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _weights(self, rest: str) -> None:
        if rest:
            self.mavis.weights = parse_weights(rest)
        shares = zip(self.mavis.objectives, self.mavis.weights.tolist(), strict=True)
        self.console.print(", ".join(f"{name} {share:.3g}" for name, share in shares), markup=False)

    def _beta(self, rest: str) -> None:
        beta = _number(rest, "/beta 5", 0.0)
        self.mavis.config = replace(self.mavis.config, kl_budget=None)
        self.mavis.beta = beta  # type: ignore[assignment]

    def _kl(self, rest: str) -> None:
        nats = _number(rest, "/kl 4", 0.0)
        self.mavis.config = replace(self.mavis.config, kl_budget=nats / self.max_new_tokens)

    def _temperature(self, rest: str) -> None:
        self.mavis.config = replace(
            self.mavis.config, reference_temperature=_number(rest, "/temperature 0.7", 0.0, above=True)
        )

    def _new(self) -> None:
        self.turns, self.last = list(self.begin), None


def _number(text: str, example: str, least: float, above: bool = False) -> float:
    try:
        found = float(text)
    except ValueError:
        found = float("nan")
    if not (least < found if above else least <= found) or found == float("inf"):
        than = "above" if above else "of at least"
        raise ValueError(f"expected a number {than} {least:g}, as in {example}; got {text!r}")
    return found


def _colour(ratio: float) -> str:
    """Of a token that is exp(ratio) times as likely as unsteered."""
    if abs(ratio) < 0.2:
        return ""
    strength = min(1.0, abs(ratio) / 3)
    part = int(60 + 120 * strength)
    return f"on rgb(0,{part},0)" if ratio > 0 else f"on rgb({part},0,0)"


def main(argv: list[str]) -> int:
    """Talk until the input ends."""
    arguments = parser().parse_args(argv)
    weights = parse_weights(arguments.weights) if arguments.weights else None
    with quiet_transformers():
        from rich.console import Console

        console = Console(soft_wrap=True)
        model, tokenizer, mavis, temperature = steered_model(arguments, weights, trace=True)
        chat = Chat(
            model, tokenizer, mavis, console, temperature, arguments.max_new_tokens, arguments.seed, arguments.system
        )
        console.print(f"{arguments.model}, steered by {', '.join(mavis.objectives)}. /help lists the commands.")
        run(chat, lines(sys.stdin.isatty()))
    return 0


def run(chat: Chat, said: Iterable[str]) -> None:
    """Take lines until there are no more or one is /quit."""
    for line in said:
        if not chat.take(line):
            break


def lines(prompted: bool) -> Iterable[str]:
    """What is typed, with history where there is a readline; Ctrl-C at the prompt begins a new line, Ctrl-D ends."""
    if prompted:
        with suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            yield input("> " if prompted else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mavis chat``."""
    width = max(map(len, COMMANDS))
    result = Parser(
        prog="mavis chat",
        description="Talk to a language model, and steer it while you do.",
        epilog="in the chat:\n" + "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    value_arguments(result)
    add = result.add_argument
    add("--system", metavar="TEXT", help="system prompt")
    add("--max-new-tokens", type=int, default=256, help="length of an answer at most (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the first answer (default: %(default)s)")
    return result
