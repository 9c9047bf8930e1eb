"""TRL's GRPO on steered rollouts: `python examples/scripts/trl_rollouts.py --model org/model`.

A reward that the model hardly ever earns gives no gradient: all answers of a group are equally bad. Steered rollouts
earn it now and then. They are drawn from another policy than the one that is trained, and GRPO takes them for its own:
a head start for exploration, which `--steered-steps` ends. The objective is in words, which the model itself reads, so
that it follows the model as it learns (a value head refuses a base model whose weights have changed).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from mavis_logits import MavisSampling


def short(completions: list[str], **_: Any) -> list[float]:
    """Highest for answers of few characters."""
    return [-len(completion) / 100 for completion in completions]


class SteeredRollouts(TrainerCallback):
    """Has `generate` of the trained model steered for the first steps.

    Args:
        strategy: by which it decodes.
        steps: for how many.
    """

    def __init__(self, strategy: MavisSampling, steps: int) -> None:
        self.strategy, self.steps = strategy, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        plain = model.generate

        def generate(*given: Any, **named: Any) -> Any:
            if state.global_step < self.steps:
                named["custom_generate"] = self.strategy
            return plain(*given, **named)

        model.generate = generate

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        del model.generate


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", default="runs/grpo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--steered-steps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.model)
    strategy = MavisSampling(objectives={"short": "Answer in few words."}, model=model, tokenizer=tokenizer)
    questions = ["How do I make good tea?", "What is rain?", "Why is the sea salt?", "How do I get up early?"]
    trainer = GRPOTrainer(
        model,
        reward_funcs=short,
        args=GRPOConfig(
            options.output, max_steps=options.steps, num_generations=4, per_device_train_batch_size=4,
            max_completion_length=options.tokens, logging_steps=1, report_to=[], save_strategy="no",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"prompt": questions}),
        processing_class=tokenizer,
        callbacks=[SteeredRollouts(strategy, options.steered_steps)],
    )  # fmt: skip
    trainer.train()
    print(f"{strategy.stats.tokens} tokens were steered, {strategy.stats.kl:.1f} nats")


if __name__ == "__main__":
    main()
