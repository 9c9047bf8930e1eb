"""Best of N: several samples, of which the best is returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Unpack

import torch
from torch import Tensor

from ...core.rewards import Reward, compute_rewards
from ...steering.signatures import StrategyOptions
from ...values.function import ValueFunction
from .base import Call
from .beams import Beams
from .search import MavisSearch, whole_number


class MavisBestOfN(MavisSearch):
    """Samples `num_samples` sequences a prompt from the tilted distribution and returns the best of them.

    The best is that of the highest combined value or, where reward functions are given, of the highest reward. Section
    4.4 compares beam search with this; `beta=0` samples from the reference, cut to its `top_k`. With one sample it is
    `MavisSampling`.

    Example:
        `MavisBestOfN(value_models, num_samples=16, prune={16: 8, 32: 4})` writes 16 samples; after 16 tokens the 8 most
        valuable of a prompt go on, after 32 tokens 4 of these. At 64 tokens that halves the cost.

    Args:
        num_samples: N.
        reward_functions: one `f(prompts, completions, **columns) -> rewards`, as for TRL's trainers (`async` ones and
            `completion_ids` too), or several by name. They need `tokenizer` and are called once, with all texts,
            special tokens left out.
        reward_weights: of several reward functions; by default the weights of the objectives that they are named for.
        reward_columns: further columns for the reward functions, with an entry for every prompt of the batch. A column
            `prompts` takes the place of the decoded prompts, which hold the whole chat where there is a template.
        prune: by number of tokens, how many samples of a prompt go on from there.
        args, kwargs: as for `MavisStrategy`.

    `generate` returns `num_return_sequences` sequences a prompt, the best first; with `return_dict_in_generate` their
    `values` [R, M] and `sequences_scores` [R], which are combined values or mixed rewards.

    Raises:
        ValueError: a number below 1, a `prune` that does not fall, several samples with `do_sample=False`, rewards
            without tokenizer or weight, or that are not one finite number a text; and as for `MavisSearch`.
    """

    def __init__(
        self,
        value_functions: ValueFunction | Sequence[ValueFunction] | Mapping[str, ValueFunction] | None = None,
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        num_samples: int = 5,
        reward_functions: Reward | Mapping[str, Reward] | None = None,
        reward_weights: Mapping[str, float] | None = None,
        reward_columns: Mapping[str, Sequence[Any]] | None = None,
        prune: Mapping[int, int] | None = None,
        **kwargs: Unpack[StrategyOptions],
    ) -> None:
        super().__init__(value_functions, weights, beta, **kwargs)
        self.num_samples = whole_number("num_samples", num_samples)
        self.prune = _checked_prune(prune or {}, num_samples)
        if callable(reward_functions):
            reward_functions, reward_weights = {"reward": reward_functions}, reward_weights or {"reward": 1.0}
        self.reward_functions: dict[str, Reward] = dict(reward_functions or {})
        self.reward_weights, self.reward_columns = reward_weights, dict(reward_columns or {})
        if self.reward_functions and self.tokenizer is None:
            raise ValueError("reward_functions judge texts: pass tokenizer= to MavisBestOfN")
        weighed = self.objectives if reward_weights is None else list(reward_weights)
        nameless = set(self.reward_functions) - set(weighed) | set(reward_weights or {}) - set(self.reward_functions)
        if nameless:
            raise ValueError(
                f"there are reward functions {sorted(self.reward_functions)}, but weights for {sorted(weighed)}: give "
                "reward_weights for each, or name the functions for objectives"
            )

    @property
    def size(self) -> int:
        return self.num_samples

    @property
    def kept(self) -> int:
        return min(self.prune.values(), default=self.num_samples)

    def plan(self, step: int, size: int) -> tuple[int, int]:
        return 1, self.prune.get(step, size)

    def final_scores(self, beams: Beams, prompts: list[list[int]]) -> Tensor:
        """Mixed rewards where there are reward functions, else combined values."""
        if not self.reward_functions:
            return beams.scores
        assert self.tokenizer is not None
        completion_ids = beams.completions()
        completions = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        columns = {"prompts": self.tokenizer.batch_decode(prompts, skip_special_tokens=True), **self.reward_columns}
        columns = {name: [x for x in column for _ in range(beams.size)] for name, column in columns.items()}
        texts = columns.pop("prompts")
        total = torch.zeros(len(prompts), beams.size, device=beams.scores.device, dtype=torch.float32)
        for name, function in self.reward_functions.items():
            rewards = compute_rewards(function, texts, completions, columns, name, completion_ids=completion_ids)
            total += self._reward_weight(name).to(total.device) * total.new_tensor(rewards).view_as(total)
        return total.view(-1)

    def _reward_weight(self, name: str) -> Tensor:
        """[1], or [P, 1] where every request has its own."""
        if self.reward_weights is not None:
            return torch.tensor([float(self.reward_weights[name])], dtype=torch.float32)
        place = self.objectives.index(name)
        return self.weights[..., place : place + 1]

    def check(self, call: Call) -> None:
        super().check(call)
        if self.num_samples > 1 and not call.config.do_sample:
            raise ValueError(
                f"num_samples={self.num_samples} with do_sample=False are all the same text: use do_sample=True"
            )
        count = len(call.input_ids) // (call.config.num_return_sequences or 1)
        for name, column in self.reward_columns.items():
            if len(column) != count:
                raise ValueError(
                    f"reward_columns[{name!r}] has {len(column)} entries, but the batch has {count} prompts"
                )


def _checked_prune(prune: Mapping[int, int], samples: int) -> dict[int, int]:
    steps = [(whole_number("prune, tokens", tokens), whole_number("prune, samples", n)) for tokens, n in prune.items()]
    steps.sort()
    if any(later >= earlier for (_, earlier), (_, later) in pairwise([(0, samples), *steps])):
        raise ValueError(
            f"prune={dict(prune)} must keep fewer and fewer of {samples} samples: {{tokens: samples, ...}}"
        )
    return dict(steps)
