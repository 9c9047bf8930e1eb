"""Answers while they are being written, a thread each, on models that all visitors share."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ...core.chat import encode_prompt
from ...demo.checkout import checkout_path
from ...models import full_name, load_chat_model
from ...steering.trace_html import Written
from ..doctor import cached_value_functions
from ..generate import recommended_temperature, steering
from .settings import Choice, Settings, check_prompt

if TYPE_CHECKING:
    from ... import MavisLogitsProcessor

PATIENCE = 20.0  # seconds that an answer is written on for while nobody looks at it
SHOWN = 8  # candidates on a token's card
_LOADED = 2  # language models that are kept


class Engine:
    """A language model and what steers it.

    Args:
        choice: what they are called.
        model, tokenizer: of the base model.
        mavis: made with a trace. It is never used itself: every answer has a copy with settings of its own.
    """

    def __init__(self, choice: Choice, model: Any, tokenizer: Any, mavis: MavisLogitsProcessor) -> None:
        self.choice, self.model, self.tokenizer, self.mavis = choice, model, tokenizer, mavis
        self.temperature = recommended_temperature(mavis)
        self.units = mavis.functions.units()

    @property
    def objectives(self) -> list[str]:
        """Their names."""
        return self.mavis.objectives

    def begin(self, prompt: str, settings: Settings, steered: bool = True) -> Answer:
        """Begin an answer; an unsteered one has the tokens that `generate` gives without any processor.

        Raises:
            ValueError: nothing to answer, an unknown objective, or a prompt that leaves no room in the context.
        """
        ids = encode_prompt(check_prompt(prompt), self.tokenizer)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and len(ids) + settings.max_new_tokens > longest:
            raise ValueError(
                f"the question has {len(ids)} tokens and the answer may have {settings.max_new_tokens}, but the model "
                f"reads {longest} in all: shorten one of them"
            )
        mavis = copy.deepcopy(self.mavis)
        try:
            mavis.reset()
            mavis.weights = settings.weights
            if steered and settings.steers:
                mavis.config = replace(
                    mavis.config,
                    kl_budget=settings.kl / settings.max_new_tokens,
                    reference_temperature=settings.temperature,
                )
            else:  # it looks on
                mavis.config = replace(
                    mavis.config, kl_budget=None, unscored="keep", normalize="standard", reference_temperature=1.0
                )
                mavis.beta = 0.0  # type: ignore[assignment]
        except BaseException:
            mavis.detach()
            raise
        return Answer(self, mavis, ids, settings, steered and settings.steers)


class Engines:
    """The engines of all visitors, each loaded when it is first asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: OrderedDict[str, tuple[Any, Any]] = OrderedDict()
        self._engines: dict[Choice, Engine] = {}

    def get(self, choice: Choice) -> Engine:
        """The engine of a choice; one that has been loaded at once, also while another is being loaded.

        Raises:
            ValueError, OSError, ImportError: as `commands.generate.steering`, naming what cannot be had.
        """
        engine = self._engines.get(choice)
        if engine is not None:
            return engine
        with self._lock:
            if choice in self._engines:  # meanwhile
                return self._engines[choice]
            if choice.model not in self._models:
                self._models[choice.model] = load_chat_model(choice.model)
            self._models.move_to_end(choice.model)
            model, tokenizer = self._models[choice.model]
            engine = Engine(choice, model, tokenizer, steering(choice.arguments(), model, tokenizer, None, trace=True))
            self._engines[choice] = engine
            while len(self._models) > _LOADED:  # answers under way keep theirs until they are written
                gone, _ = self._models.popitem(last=False)
                self._engines = {own: kept for own, kept in self._engines.items() if own.model != gone}
            return engine


class Answer(BaseStreamer):
    """One answer that a thread is writing.

    Attributes:
        state: "writing", "done", "stopped" (by `stop`, or since nobody looked for `PATIENCE` seconds) or "failed".
        error: why it failed.
        written: its tokens so far, with what each was chosen from.
        ids: the same as numbers.
    """

    def __init__(
        self, engine: Engine, mavis: MavisLogitsProcessor, prompt: list[int], settings: Settings, steered: bool
    ) -> None:
        self.engine, self.settings, self.steered = engine, settings, steered
        self.written = Written(engine.tokenizer, prompt, SHOWN)
        self.ids: list[int] = []
        self.state, self.error = "writing", ""
        self.seconds = 0.0
        self._mavis, self._prompt, self._prompted = mavis, prompt, False
        self._stop, self._looked = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def look(self) -> str:
        """The state; to be called at least every `PATIENCE` seconds by whoever wants the answer to go on."""
        self._looked = time.monotonic()
        return self.state

    def stop(self) -> None:
        """Have it end after the token that is being computed."""
        self._stop.set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for its end, keeping it alive; False if the time was over first."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.look() == "writing" and (end is None or time.monotonic() < end):
            self._thread.join(0.1)
        return self.state != "writing"

    @property
    def text(self) -> str:
        """What is written so far."""
        return str(self.engine.tokenizer.decode(list(self.ids), skip_special_tokens=True)).strip()

    @property
    def kl(self) -> float:
        """Divergence of its steps so far, in nats."""
        return sum(token.kl for token in list(self.written.tokens)) if self.steered else 0.0

    def values(self) -> dict[str, float]:
        """What the value functions say of the whole of it, in standard deviations of the rewards they learnt.

        Without those of value models that did not run, and empty before the first token.
        """
        taken = next((each for token in self.written.tokens[-1:] for each in token.candidates if each.taken), None)
        if taken is None:
            return {}
        mean, scale, _ = self.engine.units.tolist()
        rows = zip(self.engine.objectives, taken.values, mean, scale, strict=True)
        return {name: (value - middle) / unit for name, value, middle, unit in rows if value == value}

    def _write(self) -> None:
        started, engine = time.monotonic(), self.engine
        try:
            ids = torch.tensor([self._prompt], device=engine.model.device)
            engine.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,  # the dice have been cast by then
                num_beams=1,
                max_new_tokens=self.settings.max_new_tokens,
                logits_processor=[
                    self._mavis, Dice(self.settings.seed, 1.0 if self.steered else self.settings.temperature)
                ],
                stopping_criteria=StoppingCriteriaList([_Stopping(self)]),
                streamer=self,
                pad_token_id=engine.tokenizer.pad_token_id,
            )  # fmt: skip
            self.state = "stopped" if self._ended_early() else "done"
        except Exception as error:
            self.error, self.state = f"{type(error).__name__}: {error}", "failed"
        finally:
            self.seconds = time.monotonic() - started
            self._mavis.detach()

    def _ended_early(self) -> bool:
        end = self.engine.mavis.special.eos
        whole = len(self.ids) >= self.settings.max_new_tokens or bool(self.ids and self.ids[-1] in end)
        return self.unwanted and not whole

    @property
    def unwanted(self) -> bool:
        """Whether it was stopped, or nobody has looked for too long."""
        return self._stop.is_set() or time.monotonic() - self._looked > PATIENCE

    def put(self, value: Tensor) -> None:
        """For `generate`: first the prompt, then every token."""
        if not self._prompted:
            self._prompted = True
            return
        trace = self._mavis.trace
        for token in value.reshape(-1).tolist():
            if trace is not None and len(trace):
                self.written.add(trace[len(trace) - 1], token)
            self.ids.append(token)

    def end(self) -> None:
        """For `generate`."""


class _Stopping(StoppingCriteria):
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._answer.unwanted, device=input_ids.device)


class Dice(LogitsProcessor):
    """Samples, and leaves nothing but the token sampled: by a generator of its own, which no other visitor disturbs.

    The tokens are those that `generate` samples after `torch.manual_seed(seed)` at this temperature.
    """

    def __init__(self, seed: int, temperature: float) -> None:
        self._seed, self._temperature = seed, temperature
        self._generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[1, V] 0 for the token sampled from `scores` [1, V], -inf for all others."""
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._seed)
        if self._temperature != 1.0:
            scores = scores / self._temperature
        token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def known_choices(own: Choice) -> Sequence[Choice]:
    """Choices to offer beside the one given: what a clone and the Hub's cache have for its model."""
    found = [own]
    try:
        folders = sorted(path for path in checkout_path("model_cards").iterdir() if (path / "config.json").is_file())
    except FileNotFoundError:
        folders = []
    for folder in folders:
        base = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("base_model")
        if base == full_name(own.model):
            found.append(Choice(own.model, (f"model_cards/{folder.name}",)))
    found += [Choice(own.model, (name,)) for name in cached_value_functions()]
    return list(dict.fromkeys(found))
