"""A steered model in lm-eval: `python examples/scripts/lm_eval_steered.py --model org/model --values org/bundle`.

lm-eval's own class for Hugging Face models calls `generate`, which is steered here. Tasks that compare likelihoods call
`forward`, which is not: only tasks that write (`output_type: generate_until`) tell anything of steering.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from mavis_logits import MavisSampling


class SteeredHFLM(HFLM):
    """`HFLM`, decoding by a strategy.

    Args:
        strategy: by which it decodes; None for the plain model.
        given: as for `HFLM`.
    """

    def __init__(self, strategy: MavisSampling | None = None, **given: Any) -> None:
        super().__init__(**given)
        self.strategy = strategy

    def _model_generate(self, context: Any, max_length: Any = None, stop: Any = None, **generation: Any) -> Any:
        if self.strategy is None:
            return super()._model_generate(context, max_length, stop, **generation)
        # Its stopping criteria look at every row, which a strategy lets leave: what is too long is cut by lm-eval.
        generation = {"do_sample": False} | generation
        generation.pop("temperature", None) if not generation["do_sample"] else None
        return self.model.generate(
            input_ids=context, max_length=max_length, pad_token_id=self.tokenizer.pad_token_id,
            custom_generate=self.strategy, **generation,
        )  # fmt: skip


def main() -> None:
    """Evaluate the plain and the steered model on one task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--values", help="a value function's or bundle's id or folder; without it, words")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--include-path", help="folder with tasks of your own")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    words = {} if options.values else {"objectives": {"short": "Answer in few words."}}
    strategy = MavisSampling.from_pretrained(options.values, model=model, tokenizer=tokenizer, **words)
    for name, own in (("plain", None), ("steered", strategy)):
        found = simple_evaluate(
            SteeredHFLM(own, pretrained=model, tokenizer=tokenizer, batch_size=4),
            tasks=options.tasks, task_manager=TaskManager(include_path=options.include_path), limit=options.limit,
        )  # fmt: skip
        print(name, json.dumps(found["results"], default=str))
    print(f"{strategy.stats.tokens} tokens were steered, {strategy.stats.kl:.1f} nats")


if __name__ == "__main__":
    main()
