"""Best of N: several samples, of which the best is returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from .beams import Beams
from .search import MavisSearch, whole_number

RewardFunction = Callable[..., Sequence[float]]


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
        reward_functions: one `f(prompts, completions, **columns) -> rewards`, as for TRL's trainers, or several by
            name. They need `tokenizer` and are called once, with all texts, special tokens left out.
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
        *args: Any,
        num_samples: int = 5,
        reward_functions: RewardFunction | Mapping[str, RewardFunction] | None = None,
        reward_weights: Mapping[str, float] | None = None,
        reward_columns: Mapping[str, Sequence[Any]] | None = None,
        prune: Mapping[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.num_samples = whole_number("num_samples", num_samples)
        self.prune = _checked_prune(prune or {}, num_samples)
        if callable(reward_functions):
            reward_functions, reward_weights = {"reward": reward_functions}, reward_weights or {"reward": 1.0}
        self.reward_functions: dict[str, RewardFunction] = dict(reward_functions or {})
        self.reward_weights, self.reward_columns = reward_weights, dict(reward_columns or {})
        if self.reward_functions and self.tokenizer is None:
            raise ValueError("reward_functions judge texts: pass tokenizer= to MavisBestOfN")
        known = self.objectives if reward_weights is None else list(reward_weights)
        unknown = [name for name in self.reward_functions if name not in known]
        if unknown:
            raise ValueError(
                f"no weight is known for the reward functions {unknown}, there are weights for {known}: name all of "
                "them in reward_weights"
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
        completions = self.tokenizer.batch_decode(beams.completions(), skip_special_tokens=True)
        columns = {"prompts": self.tokenizer.batch_decode(prompts, skip_special_tokens=True), **self.reward_columns}
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise ValueError(
                    f"reward_columns[{name!r}] has {len(column)} entries, but the batch has {len(prompts)} prompts"
                )
        columns = {name: [x for x in column for _ in range(beams.size)] for name, column in columns.items()}
        total = torch.zeros_like(beams.scores)
        for name, function in self.reward_functions.items():
            rewards = list(function(completions=completions, **columns))
            _check_rewards(name, rewards, len(completions))
            weight = self._reward_weight(name)
            total += weight.to(total.device).repeat_interleave(beams.size if weight.ndim else 1) * total.new_tensor(
                rewards
            )
        return total

    def _reward_weight(self, name: str) -> Tensor:
        """[] or [P]."""
        if self.reward_weights is not None:
            return torch.tensor(float(self.reward_weights[name]))
        return self.weights[..., self.objectives.index(name)]

    def _check_call(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        super()._check_call(model, input_ids, processors, config, model_kwargs)
        if self.num_samples > 1 and not config.do_sample:
            raise ValueError(
                f"num_samples={self.num_samples} with do_sample=False are all the same text: use do_sample=True"
            )


def _checked_prune(prune: Mapping[int, int], samples: int) -> dict[int, int]:
    steps = [(whole_number("prune, tokens", tokens), whole_number("prune, samples", n)) for tokens, n in prune.items()]
    steps.sort()
    if any(later >= earlier for (_, earlier), (_, later) in pairwise([(0, samples), *steps])):
        raise ValueError(
            f"prune={dict(prune)} must keep fewer and fewer of {samples} samples: {{tokens: samples, ...}}"
        )
    return dict(steps)


def _check_rewards(name: str, rewards: list[Any], count: int) -> None:
    if len(rewards) != count:
        raise ValueError(f"reward function {name!r} returned {len(rewards)} numbers for {count} completions")
    for i, reward in enumerate(rewards):
        if reward is None or not math.isfinite(reward):
            raise ValueError(f"reward function {name!r} is {reward} for completion {i} of {count}: expected a number")
