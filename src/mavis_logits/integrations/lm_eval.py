"""A steered model in lm-eval: what writes is steered, and so are the likelihoods of choices.

    from mavis_logits.integrations.lm_eval import SteeredLM
    lm_eval.simple_evaluate(SteeredLM(pretrained="org/model", values="org/head", weights={"helpful": 1}), tasks=[...])

or by lm-eval's own command line, `python -m mavis_logits.integrations.lm_eval` in place of `lm_eval`:

    python -m mavis_logits.integrations.lm_eval --tasks arc_easy \\
      --model_args '{"pretrained": "org/model", "values": "org/head", "weights": {"helpful": 1}, "beta": 5}'
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from ..core.config import MavisConfig
from ..core.known import meant
from ..core.weights import parse_weights
from ..decoding.likelihoods import steered_log_probs
from ..decoding.strategies import MavisSampling

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("a steered model in lm-eval needs lm-eval 0.4: pip install lm_eval") from error

_SETTINGS = tuple(field.name for field in fields(MavisConfig) if field.name != "weights")


@register_model("mavis")
class SteeredLM(HFLM):  # type: ignore[misc]
    """lm-eval's class for Hugging Face models, steered by `MavisSampling`.

    Likelihoods are those of the steered policy, by one forward pass as without it (`decoding.likelihoods`), for value
    heads; value models and objectives in words steer tasks that generate. They need `unscored="expected"`, which heads
    recommend, or `"keep"`: under `"drop"`, the paper's, a token beyond the top k has no probability.

    Args:
        values: as for `MavisSampling.from_pretrained`: a Hub id or folder, several, or a mapping; None for words alone.
        weights: by objective, or as text, "helpful=0.7,humour=0.3"; None for equal ones.
        objectives: in words, an instruction by name.
        given: fields of `MavisConfig` (`beta`, `top_k`, ...), and what `HFLM` takes (`pretrained`, `batch_size`, ...).

    Attributes:
        strategy: what it decodes by; `strategy.stats` tells what was steered while generating.

    Raises:
        ValueError: as `MavisSampling.from_pretrained`; an encoder-decoder; an argument that nobody has.
    """

    def __init__(
        self,
        values: str | list[str] | dict[str, str] | None = None,
        weights: Mapping[str, float] | str | None = None,
        objectives: dict[str, str] | None = None,
        **given: Any,
    ) -> None:
        settings = {name: given.pop(name) for name in _SETTINGS if name in given}
        theirs = inspect.signature(HFLM).parameters
        for name in given:  # what is nobody's goes on to the model, which would not tell
            if name not in theirs and (hint := meant(name, ("values", "weights", "objectives", *_SETTINGS), "")):
                raise ValueError(f"unknown argument {name!r} of {type(self).__name__}; {hint}")
        if objectives is not None:
            settings["objectives"] = objectives
        super().__init__(**given)
        if self.backend != "causal":
            raise ValueError(f"a steered model in lm-eval must be a decoder, got the backend {self.backend!r}")
        if isinstance(weights, str):
            weights = parse_weights(weights, "weights")
        self.strategy = MavisSampling.from_pretrained(
            values, model=self.model, tokenizer=self.tokenizer, weights=weights, **settings
        )

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        config = self.strategy.config
        if config.top_k is not None and not config.keeps_unscored:
            raise ValueError(
                f"unscored={config.unscored!r} leaves no probability to tokens beyond the top {config.top_k}, which "
                'choices may begin with: give unscored="expected" for tasks that compare likelihoods'
            )
        return steered_log_probs(self.strategy, inps, attn_mask)

    def _model_generate(self, context: Tensor, max_length: int, stop: Any = None, **generation: Any) -> Any:
        # Its stopping criteria look at every row, which a strategy lets leave: what is too long is cut by lm-eval.
        sampled = bool(generation.get("do_sample", False))
        generation = {**generation, "do_sample": sampled}
        if not sampled:
            generation.pop("temperature", None)
        return self.model.generate(
            input_ids=context, max_length=max_length, pad_token_id=self.tokenizer.pad_token_id,
            custom_generate=self.strategy, **generation,
        )  # fmt: skip


def main() -> None:
    """lm-eval's command line, with this as its model."""
    from lm_eval.__main__ import cli_evaluate

    if not any(word == "--model" or word.startswith("--model=") for word in sys.argv[1:]):
        sys.argv += ["--model", "mavis"]
    cli_evaluate()


if __name__ == "__main__":
    main()
