"""A reward in words: how much likelier an instruction makes a completion, summed over its tokens.

    R(x, y) = log pi_ref(y | instruction, x) - log pi_ref(y | x)

Its value function at a token is the advantage that `mavis_logits.values.words` reads from a second row of the model:
trained into a head, it steers at plain speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.core.chat import ChatTemplate, encode_prompt
from mavis_logits.values.words import Words

from ..base.likelihoods import log_likelihoods

_BATCH = 8  # completions read side by side


class WordsReward:
    """The reward of an instruction under a language model, in nats. TRL's convention.

    Args:
        instruction: such as "Answer with a joke."
        model: the language model that is to be steered.
        tokenizer: its tokenizer.
        chat_template: how prompts are put, as for `mavis collect`.
    """

    def __init__(
        self,
        instruction: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: ChatTemplate = "auto",
    ) -> None:
        self._words = Words({"words": instruction}, tokenizer, model)
        self._model, self._tokenizer, self._chat_template = model.eval(), tokenizer, chat_template
        self.__name__ = "words"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[list[int]] | None = None,
        conversation: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        """A number for each completion; `completion_ids` are its tokens where they are known."""
        texts = completion_ids or [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
        begins: list[list[int]] = []  # with the instruction, without it, prompt by prompt
        for i, prompt in enumerate(prompts):
            asked = conversation[i] if conversation is not None and conversation[i] else prompt
            ids = encode_prompt(asked, self._tokenizer, self._chat_template)
            (place,) = self._words.places(ids)
            begins += [place.applied(ids), ids]
        ends = [list(own) for own in texts for _ in range(2)]
        order = sorted(range(len(begins)), key=lambda i: len(begins[i]) + len(ends[i]))
        found = [0.0] * len(begins)
        for start in range(0, len(order), 2 * _BATCH):
            part = order[start : start + 2 * _BATCH]
            sums = log_likelihoods(self._model, [begins[i] for i in part], [ends[i] for i in part])
            for i, value in zip(part, sums, strict=True):
                found[i] = value
        return [told - plain for told, plain in zip(found[::2], found[1::2], strict=True)]
