"""A way of decoding without value functions, or around them: prompts, tuned weights, mixed policies, other scores.

Every rival is a key of a setting, so that they combine with each other and with value functions:

    {system: "Answer with a joke."}                  a system prompt
    {examples: [[question, answer], ...]}            turns in front of the prompt
    {temperature: 0.5, top_p: 0.9}                   another temperature or nucleus than the protocol's
    {adapters: {runs/helpful: 0.4, runs/humour: 0.6}}    weights between tuned ones; one of weight 1: that model
    {mixture: {runs/helpful: 0.4, runs/humour: 0.6}}     log-probabilities of tuned models, mixed
    {token_rewards: {runs/helpful: 1.5}}             log pi_tuned - log pi_ref added to the scores
    {partial_rewards: {rewards/helpful: 1.5}}        a reward model asked about every candidate's text
    {directions: {runs/direction-humour: 4}}         a vector added to hidden states
    {samples: 8}                                     several answers, for the best of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.core.chat import ChatTemplate, encode_prompt

from ..base.settings import check_sampling
from ..rewards.load import Reward
from ..sampling.reference import warpers
from .adapters import Mixture, TokenRewards, adapted
from .directions import directed
from .partial_rewards import PartialRewards


@dataclass(frozen=True)
class Decoding:
    """What of a setting is no matter of value functions; every field may be left out.

    Attributes:
        system: system prompt; in front of a raw text's prompt where there is no chat template.
        examples: pairs of question and answer that come before the prompt.
        temperature, top_p: that tokens are sampled at, where not the protocol's; value functions tilt what they leave.
        adapters: share by folder of LoRA adapters whose weights are summed (Rewarded Soups).
        mixture: share by folder of adapters whose log-probabilities are summed (MOD); shares sum to 1.
        token_rewards: strength by folder of adapters whose log-probability beyond the reference's is added (GenARM).
        partial_rewards: strength by reward, as `mavis label` takes them, of every candidate's text so far (ARGS).
        candidates: tokens a step that `partial_rewards` asks about; the others are dropped.
        directions: strength by folder of vectors that are added to the states of a layer.
        samples: answers to each prompt, of which the best by reward can be taken (best of N).
    """

    system: str | None = None
    examples: Sequence[Sequence[str]] = ()
    temperature: float | None = None
    top_p: float | None = None
    adapters: Mapping[str, float] = field(default_factory=dict)
    mixture: Mapping[str, float] = field(default_factory=dict)
    token_rewards: Mapping[str, float] = field(default_factory=dict)
    partial_rewards: Mapping[str, float] = field(default_factory=dict)
    candidates: int = 10
    directions: Mapping[str, float] = field(default_factory=dict)
    samples: int = 1

    def __post_init__(self) -> None:
        if self.system is not None and (not isinstance(self.system, str) or not self.system.strip()):
            raise ValueError(f"system must be a text, got {self.system!r}")
        for pair in self.examples:
            if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise ValueError(f"examples are pairs of a question and its answer, got {pair!r}")
        check_sampling(1.0 if self.temperature is None else self.temperature, 1.0 if self.top_p is None else self.top_p)
        for name in ("adapters", "mixture", "token_rewards", "partial_rewards", "directions"):
            given = getattr(self, name)
            if not isinstance(given, Mapping) or not all(_is_finite(x) for x in given.values()):
                raise ValueError(f"{name} must give a finite number for each of what it names, got {given!r}")
        if self.mixture and abs(sum(self.mixture.values()) - 1.0) > 1e-6:
            raise ValueError(f"the shares of a mixture must sum to 1, got {dict(self.mixture)}")
        if sum(map(bool, (self.adapters, self.mixture, self.token_rewards))) > 1:
            raise ValueError("adapters, mixture and token_rewards each take the model's adapters: give one of them")
        for name in ("candidates", "samples"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a number of at least 1, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, setting: Mapping[str, Any]) -> Decoding | None:
        """Of a setting's own keys; None if it has none of them.

        Raises:
            ValueError: a value that is out of range.
        """
        own = {name: setting[name] for name in KEYS if name in setting}
        return cls(**own) if own else None

    def encode(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate
    ) -> list[int]:
        """Token ids of a prompt's row as this way of decoding puts it."""
        given = row.get("conversation") or row["prompt"]
        if self.system is None and not self.examples:
            return encode_prompt(given, tokenizer, chat_template)
        if tokenizer.chat_template is None or chat_template == "none":
            before = [] if self.system is None else [self.system]
            before += [f"{question}\n{answer}" for question, answer in self.examples]
            return encode_prompt("\n\n".join([*before, given]), tokenizer, chat_template)
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, answer in self.examples:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        elif self.system is not None and given and given[0]["role"] == "system":
            given = given[1:]
        return encode_prompt([*turns, *given], tokenizer, chat_template)

    @contextmanager
    def applied(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Mapping[str, Tensor],
        prompts: Sequence[Mapping[str, Any]],
        load: Callable[[str], Reward],
        at: tuple[float, float],
    ) -> Iterator[LogitsProcessorList]:
        """Within, `model` is as this way of decoding has it; yields what makes its scores, before anything steers them.

        Args:
            model: the base model.
            tokenizer: its tokenizer.
            inputs: `input_ids` and `attention_mask` [R, T] that `generate` is called with.
            prompts: the R rows that they are of.
            load: gives the reward of a spec.
            at: the protocol's temperature and nucleus.

        Raises:
            ValueError: an adapter or direction for another model.
            OSError: one that cannot be read.
        """
        processors = LogitsProcessorList()
        with ExitStack() as stack:
            if self.directions:
                stack.enter_context(directed(model, self.directions))
            folders = self.adapters or self.mixture or self.token_rewards
            if folders:
                switch = stack.enter_context(adapted(model, folders, summed=bool(self.adapters)))
                if self.mixture:
                    processors.append(Mixture(model, switch, self.mixture, inputs["attention_mask"]))
                if self.token_rewards:
                    processors.append(TokenRewards(model, switch, self.token_rewards, inputs["attention_mask"]))
            if self.partial_rewards:
                rewards = {spec: load(spec) for spec in self.partial_rewards}
                start = inputs["input_ids"].shape[1]
                processors.append(
                    PartialRewards(tokenizer, rewards, self.partial_rewards, prompts, start, self.candidates)
                )
            temperature = at[0] if self.temperature is None else self.temperature
            yield LogitsProcessorList([*processors, *warpers(temperature, at[1] if self.top_p is None else self.top_p)])


KEYS = tuple(one.name for one in fields(Decoding))


class Recorder(LogitsProcessor):
    """The last processor of a call: log pi of every token that is sampled, in nats. It changes no score.

    A step's scores are kept until the next call tells which token was drawn; `finish` gives the last one.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self._log_probs: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last is not None:
            self._keep(input_ids[:, -1:])
        self._last = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def _keep(self, drawn: Tensor) -> None:
        assert self._last is not None
        self._log_probs.append(self._last.gather(1, drawn)[:, 0])

    def finish(self, output: Tensor) -> Tensor:
        """log pi [R, N] of the N new tokens of `output`; what follows an end of text means nothing."""
        if self._last is not None:
            self._keep(output[:, self.start + len(self._log_probs), None])
            self._last = None
        return torch.stack(self._log_probs, dim=1)


def _is_finite(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < float("inf")
