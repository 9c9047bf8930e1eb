"""Train the three example rewards: LoRA adapters on the MiniLM encoder.

    python examples/train_rewards.py --data FOLDER --out examples/rewards [--objectives helpful harmless humour]

`helpful` and `harmless` learn preferences (Bradley-Terry); `humour` learns what fraction of a text is a joke (binary
cross entropy with soft labels). About ten minutes an objective on one CPU core. `evaluate_rewards.py` measures them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from reward_data import (
    Labelled,
    Pair,
    cut_short,
    harmless_pairs,
    helpful_pairs,
    humour_texts,
    random_cut,
    read_collections,
    whole,
)
from reward_model import BASE_ID, MAX_LENGTH, encode, load_base


@dataclass(frozen=True)
class Recipe:
    """How one objective is trained.

    `rows` pairs or texts are seen once; `pair` says whether the prompt is read. `last_rows` more, mostly human
    preferences, come last: next to the easy contrasts they are too few and too subtle to be learned.
    """

    rows: int
    batch_size: int
    pair: bool
    last_rows: int = 0
    seed: int = 0
    learning_rate: float = 5e-4
    lora_rank: int = 16
    smoothing: float = 0.05  # share of wrong labels assumed: keeps rewards from saturating
    centering: float = 0.01  # weight of the squared mean reward of a pair, which a preference leaves free


RECIPES = {
    "helpful": Recipe(rows=6400, batch_size=16, pair=True),
    "harmless": Recipe(rows=6400, batch_size=16, pair=True, last_rows=4800),
    "humour": Recipe(rows=9600, batch_size=32, pair=False),
}


def preference_loss(rewards: torch.Tensor, smoothing: float, centering: float) -> torch.Tensor:
    """Bradley-Terry loss with smoothed labels.

    -(1 - s) log sigmoid(d) - s log sigmoid(-d) + c (r_better + r_worse)^2, with d = r_better - r_worse.

    Args:
        rewards: `[2 R]`, the R better replies first.
    """
    better, worse = rewards.chunk(2)
    difference = better - worse
    loss = -(1 - smoothing) * F.logsigmoid(difference) - smoothing * F.logsigmoid(-difference)
    return (loss + centering * (better + worse) ** 2).mean()


def fraction_loss(rewards: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Binary cross entropy of sigmoid(rewards) `[R]` against fractions `[R]` kept `smoothing` away from 0 and 1."""
    return F.binary_cross_entropy_with_logits(rewards, labels * (1 - 2 * smoothing) + smoothing)


class RewardTrainer(Trainer):
    """A Trainer whose batches bear either `labels` (fractions) or pairs, the better replies first."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The recipe's loss on one batch."""
        labels = inputs.pop("labels", None)
        rewards = model(**inputs).logits[:, 0].float()
        if labels is None:
            loss = preference_loss(rewards, self.recipe.smoothing, self.recipe.centering)
        else:
            loss = fraction_loss(rewards, labels, self.recipe.smoothing)
        return (loss, {"rewards": rewards}) if return_outputs else loss


def make_rows(objective: str, data: Path, count: int, seed: int) -> list[Pair] | list[Labelled]:
    """`count` training rows; where the data run out they are drawn again with other cuts and other negatives."""
    collections = read_collections(data, "train")
    rng = random.Random(seed)
    cut = random_cut(rng)
    if objective == "humour":
        return humour_texts(collections, cut, rng, count)
    build = {"helpful": helpful_pairs, "harmless": harmless_pairs}[objective]
    rows: list[Pair] = []
    while len(rows) < count:
        rows += build(collections, cut, rng)
    return rng.sample(rows, count)


def make_last_rows(objective: str, data: Path, count: int, seed: int, rehearsed: float = 0.25) -> list[Pair]:
    """`count` rows of human preferences, whole and cut alike, and a share of the other comparisons to keep these."""
    collections = read_collections(data, "train")
    rng = random.Random(seed + 1)
    build = {"helpful": helpful_pairs, "harmless": harmless_pairs}[objective]
    rows = [pair for cut in (whole, cut_short) for pair in build(collections, cut, rng)]
    human = [pair for pair in rows if pair.slice.startswith("human")]
    other = [pair for pair in rows if not pair.slice.startswith("human")]
    kept = rng.sample(other, min(len(other), round(count * rehearsed)))
    return kept + rng.sample(human, min(len(human), count - len(kept)))


def as_dataset(rows: list[Pair] | list[Labelled]) -> Dataset:
    """Rows as columns `texts` (one or two (prompt, reply)), `label`, and `length` in characters for grouping."""
    records = []
    for row in rows:
        texts = [row.better, row.worse] if isinstance(row, Pair) else [row.text]
        label = row.label if isinstance(row, Labelled) else None
        length = max(len(prompt) + len(reply) for prompt, reply in texts)
        records.append({"texts": [list(text) for text in texts], "label": label, "length": min(length, 600)})
    return Dataset.from_list(records)


def collator(tokenizer: PreTrainedTokenizerBase, pair: bool) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """Turns dataset rows into one batch: pairs as the better replies followed by the worse ones."""

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        columns = zip(*(row["texts"] for row in rows), strict=True)
        batch = encode(tokenizer, [(text[0], text[1]) for column in columns for text in column], pair)
        if rows[0]["label"] is not None:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch

    return collate


def add_lora(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """The encoder with LoRA on every linear map and a trainable head."""
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank,
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, config)


def save(model: PeftModel, folder: Path, objective: str, recipe: Recipe) -> None:
    """Write the adapter (safetensors) and `reward_config.json`; the base is named by its Hub id."""
    model.peft_config["default"].base_model_name_or_path = BASE_ID
    model.save_pretrained(str(folder), save_embedding_layers=False)
    config = {"objective": objective, "max_length": MAX_LENGTH, "pair": recipe.pair, "mean": 0.0, "scale": 1.0}
    (folder / "reward_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def fit(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Pair] | list[Labelled], recipe: Recipe, out: Path
) -> None:
    """One pass over the rows, in place."""
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=0.05,
        num_train_epochs=1,
        train_sampling_strategy="group_by_length",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=recipe.seed,
    )
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=as_dataset(rows),
        data_collator=collator(tokenizer, recipe.pair),
        recipe=recipe,
    )
    trainer.train()


def train(objective: str, data: Path, out: Path, recipe: Recipe) -> None:
    """Train one objective and write it to `out / objective`."""
    set_seed(recipe.seed)
    base, tokenizer = load_base()
    model = add_lora(base, recipe)
    fit(model, tokenizer, make_rows(objective, data, recipe.rows, recipe.seed), recipe, out / objective)
    if recipe.last_rows:
        last = replace(recipe, learning_rate=0.6 * recipe.learning_rate)
        fit(model, tokenizer, make_last_rows(objective, data, recipe.last_rows, recipe.seed), last, out / objective)
    save(model, out / objective, objective, recipe)


def main() -> None:
    """Train the objectives asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the source collections")
    parser.add_argument("--out", type=Path, default=Path("examples/rewards"), help="folder to write adapters to")
    parser.add_argument("--objectives", nargs="+", choices=sorted(RECIPES), default=["humour", "helpful", "harmless"])
    args = parser.parse_args()
    for objective in args.objectives:
        print(f"training {objective}", flush=True)
        train(objective, args.data, args.out, RECIPES[objective])


if __name__ == "__main__":
    main()
