"""A reward in words: how much likelier an instruction makes a completion, summed over its tokens.

    R(x, y) = log pi_ref(y | instruction, x) - log pi_ref(y | x)

Its value function at a token is the advantage that `mavis_logits.values.words` reads from a second row of the model:
trained into a head, it steers at plain speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.core.chat import ChatTemplate, encode_prompt
from mavis_logits.values.words import Words

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
        rows: list[tuple[list[int], list[int]]] = []
        for i, (prompt, own) in enumerate(zip(prompts, texts, strict=True)):
            asked = conversation[i] if conversation is not None and conversation[i] else prompt
            ids = encode_prompt(asked, self._tokenizer, self._chat_template)
            (place,) = self._words.places(ids)
            told = ids[: place.start] + place.inserted + ids[place.start + place.removed :]
            rows += [(told, list(own)), (ids, list(own))]
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
        found = [0.0] * len(rows)
        for start in range(0, len(order), 2 * _BATCH):
            part = order[start : start + 2 * _BATCH]
            for i, value in zip(part, self._log_likelihoods([rows[i] for i in part]), strict=True):
                found[i] = value
        return [told - plain for told, plain in zip(found[::2], found[1::2], strict=True)]

    @torch.inference_mode()
    def _log_likelihoods(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """log pi_ref of every completion after its prompt, in nats."""
        width = max(len(prompt) + len(own) for prompt, own in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=self._model.device)
        mask = torch.zeros_like(ids)
        for row, (prompt, own) in enumerate(rows):  # padded on the right: nothing before it sees it
            count = len(prompt) + len(own)
            ids[row, :count] = torch.tensor(prompt + own, device=ids.device)
            mask[row, :count] = 1
        logits: Tensor = self._model(input_ids=ids, attention_mask=mask).logits
        sums = []
        for row, (prompt, own) in enumerate(rows):
            if not own:
                sums.append(0.0)
                continue
            begin = len(prompt)
            log_probs = torch.log_softmax(logits[row, begin - 1 : begin - 1 + len(own)].float(), dim=-1)
            sums.append(float(log_probs.gather(1, ids[row, begin : begin + len(own), None]).sum()))
        return sums
