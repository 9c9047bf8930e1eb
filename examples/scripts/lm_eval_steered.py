"""A model in lm-eval, plain and steered: `python examples/scripts/lm_eval_steered.py --model org/model --values org/a`.

Value heads steer every task; value models, and objectives in words, those that generate.
"""

from __future__ import annotations

import argparse
import json

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mavis_logits.integrations.lm_eval import SteeredLM


def main() -> None:
    """Evaluate both on the same tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--values", help="a value function's or bundle's id or folder; without it, words")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--include-path", help="folder with tasks of your own")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()

    words = None if options.values else {"short": "Answer in few words."}
    given = {"pretrained": options.model, "batch_size": 4, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    steered = SteeredLM(options.values, objectives=words, **given)
    for name, model in (("plain", HFLM(**given)), ("steered", steered)):
        tasks = TaskManager(include_path=options.include_path)
        found = simple_evaluate(model, tasks=options.tasks, task_manager=tasks, limit=options.limit)
        print(name, json.dumps(found["results"], default=str))
    stats = steered.strategy.stats
    print(f"{stats.tokens} tokens were steered, {stats.kl:.1f} nats")


if __name__ == "__main__":
    main()
