"""`mavis tune`: an adapter by DPO, SFT on best answers, RLOO or GRPO; or a direction in hidden states."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTTrainer
from trl import SFTConfig as TrlSftConfig

from mavis_logits.backbone.fingerprint import parameters_fingerprint, tokenizer_fingerprint
from mavis_logits.backbone.weights import twin
from mavis_logits.hub.cards import CARD, METRICS
from mavis_logits.models import load_chat_model
from mavis_logits.values.value_policy import SETTINGS, ValuePolicyConfig

from ..base.files import read_json, write_json
from ..base.kept import as_json, digest, model_origin
from ..base.prompts import read_prompts
from ..base.record import Record, clear_checkpoints
from ..base.settings import torch_dtype
from ..fitting.model_config import lora_config
from ..fitting.paths import path_loss
from ..fitting.trainer_arguments import common_arguments
from ..fitting.value_trainer import resume
from ..rewards.load import Reward, compute_rewards, load_reward, reward_digest
from ..rivals.directions import contrast, save_direction
from ..trees.data import LabelledTree, recipe_of
from ..trees.tree import Tree
from . import on_policy
from .config import TRL_ONLINE, TuneConfig
from .examples import ChosenTrees, best_answers, chosen_trees, combined_item, paired_trees, preference_pairs
from .paths import TreeTrainer, answer_ratios, collate, pair_loss, policy_metrics, tree_rows

RESULT = "tuned.json"
ON_TREES = {"paths": path_loss, "pairs": pair_loss}
_MEASURED = 128  # held-out trees, on which every policy is measured
_SHAPELESS = ("output", "device", "fresh", "model", "store", "prompts", "initial")


def tune(
    config: TuneConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Tune as `config` says; write the adapter or direction and `tuned.json`, and return what that holds.

    A model that is handed in is left as it was.

    `tuned.json` has the CPU seconds (of the last run, if interrupted), the tokens that were sampled for it and the
    steps; `metrics.json` what it foresees of held-out trees. What is finished is not done again, and what was begun
    goes on; of other settings or data it is refused.

    Args:
        config: what to tune for.
        model: the base model, if it is loaded already (then `tokenizer` too).
        tokenizer: its tokenizer.

    Raises:
        ValueError: trees or prompts that cannot be used, rewards that never differ, another tuning in `output`.
        OSError: a file that cannot be read.
    """
    set_seed(config.seed)
    before = None if config.initial is None else _before(config)
    if model is None or tokenizer is None:
        model, tokenizer = load_chat_model(config.model, torch_dtype(config.dtype))
    chosen = _trees(config, before)
    rows = [] if config.prompts is None else read_prompts(config.prompts)
    record, output = Record(config.output, _origin(config, model, chosen, rows)), Path(config.output)
    if record.is_finished(True, config.fresh):
        return cast(dict[str, Any], read_json(output / RESULT))
    started = time.process_time()
    shared = {"method": config.method, "weights": dict(config.weights), "deviations": chosen.deviations}
    if config.method == "direction":
        one = [combined_item(item, config.weights, chosen.deviations) for item in chosen.training]
        save_direction(output, contrast(model, one, 0, config.layer), config.layer, model.config.name_or_path)
        result: dict[str, Any] = {"rollout_tokens": chosen.tokens, "steps": 0}
    else:
        result = _train(config, model, tokenizer, chosen, rows)
    result = shared | {"cpu_seconds": round(time.process_time() - started, 1)} | result
    write_json(output / RESULT, result)
    record.write(finished=True)
    return result


def _trees(config: TuneConfig, before: Mapping[str, Any] | None) -> ChosenTrees:
    """Those to learn from, none for an online method; `before` is what the tuning to go on from has written."""
    deviations = before and before["deviations"]
    if config.store is None:
        return ChosenTrees([], [], deviations or dict.fromkeys(config.weights, 1.0), 0, [])
    share = config.validation_share
    return chosen_trees(config.store, config.weights, config.trees, config.seed, share, deviations, config.answers)


def _origin(
    config: TuneConfig, model: PreTrainedModel, chosen: ChosenTrees, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that shapes what is learned."""
    settings = {name: value for name, value in asdict(config).items() if name not in _SHAPELESS}
    if config.answers is None:  # which tunings from before do not have
        settings.pop("answers")
    origin = settings | {
        "starting_weights": parameters_fingerprint(model),
        "trees": digest([[item.tree.prompt_id, item.rewards.tolist()] for item in chosen.training]),
        "prompts": digest([row["prompt"] for row in rows]),
        "rewards_are": {name: reward_digest(spec) for name, spec in config.rewards.items()},
    }
    if config.initial is not None:  # likewise
        origin["initial"] = model_origin(config.initial)
    return origin


def _train(
    config: TuneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: ChosenTrees,
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Train an adapter and write it as the value function that it also is; what there is to say of it."""
    # What makes it a value function is asked of the model before an adapter is on it.
    objective = "+".join(name for name, weight in config.weights.items() if weight)
    value_policy = ValuePolicyConfig.of(
        model, objective, eta=config.eta or None,
        strength=SETTINGS["beta"] if config.method == "paths" else 1.0,  # its eta keeps it near the reference
        settings=SETTINGS | ({"beta": 1.0} if config.method == "on_policy" else {}),  # it is where it is to steer
        recipe=as_json(recipe_of(asdict(config), chosen.stores)),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        iteration=_iteration(config, chosen),
    )  # fmt: skip
    output = Path(config.output)
    with twin(model) as own:
        sampled = [0]
        if config.method == "on_policy":
            trainer = _on_policy(config, own, tokenizer, rows, chosen.deviations)
        elif config.method in TRL_ONLINE:
            trainer = _online(config, own, tokenizer, rows, chosen.deviations, sampled)
        else:
            trainer = _offline(config, own, tokenizer, chosen.training, chosen.deviations)
        resume(trainer)
        tuned = trainer.accelerator.unwrap_model(trainer.model).eval()
        for parameter in tuned.parameters():
            if parameter.requires_grad:  # PEFT trains adapters in float32
                parameter.data = parameter.data.to(torch_dtype(config.dtype))
        tuned.save_pretrained(output)
        (output / CARD).unlink(missing_ok=True)  # PEFT's, with nothing in it: `mavis card`, `mavis push` write one
        value_policy.save_pretrained(output)
        held_out = [combined_item(item, config.weights, chosen.deviations) for item in chosen.held_out[:_MEASURED]]
        if held_out:
            metrics = policy_metrics(tuned, held_out, objective, config.eta)
            write_json(output / METRICS, {"training_trees": len(chosen.training)} | metrics)
        clear_checkpoints(output)
    tokens = sampled[0] or trainer.state.num_input_tokens_seen or chosen.tokens
    return {"rollout_tokens": tokens, "steps": trainer.state.global_step, "log": trainer.state.log_history[-3:]}


def _before(config: TuneConfig) -> dict[str, Any]:
    """What the tuning that `config.initial` comes from has written of itself.

    Raises:
        ValueError: it was for something else.
        OSError: there is none.
    """
    path = Path(str(config.initial), RESULT)
    if not path.exists():
        raise OSError(
            f"initial {config.initial} has no {RESULT}: expected the output folder of a finished `mavis tune`"
        )
    found = cast(dict[str, Any], read_json(path))
    if found["weights"] != dict(config.weights):
        raise ValueError(
            f"initial {config.initial} was tuned for {found['weights']}, this is for {dict(config.weights)}"
        )
    return found


def _iteration(config: TuneConfig, chosen: ChosenTrees) -> int:
    """0 on the reference's own trees; one more than `initial` on those of a steered policy (Algorithm 1)."""
    before = 0 if config.initial is None else ValuePolicyConfig.from_pretrained(config.initial).iteration
    own = config.method == "on_policy" or any(store.metadata.policy for store in chosen.stores)
    return before + own


def seconds_a_tree(config: TuneConfig, model: PreTrainedModel, trees: Sequence[Tree]) -> float:
    """For which "paths" is at work on a tree, by a few of them."""
    found = []
    with twin(model) as own:
        adapted = _adapted(config, own).train()
        for tree in trees:
            started = time.monotonic()
            with torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16):
                ratios = answer_ratios(adapted, tree)
            ratios.square().mean().backward()
            found.append(time.monotonic() - started)
    return config.epochs * sum(found) / len(found)


def _adapted(config: TuneConfig, model: PreTrainedModel) -> Any:
    """`model` with the adapter that path consistency is to train."""
    if config.initial is not None:
        ValuePolicyConfig.from_pretrained(config.initial).require_base(model)
    adapted: Any = get_peft_model(model, lora_config(config.lora, model))
    if config.initial is not None:
        found = LoraConfig.from_pretrained(config.initial)
        if (found.r, found.lora_alpha) != (config.lora.rank, config.lora.alpha):
            raise ValueError(
                f"initial {config.initial} has rank {found.r} and alpha {found.lora_alpha}, lora has "
                f"{config.lora.rank} and {config.lora.alpha}: give it the same"
            )
        strange = set_peft_model_state_dict(adapted, load_peft_weights(config.initial, "cpu")).unexpected_keys
        if strange:
            raise ValueError(
                f"initial {config.initial} adapts {len(strange) // 2} layers that lora leaves out, such as "
                f"{strange[0]}: set lora.first_layer and lora.target_modules as it was tuned, or wider"
            )
        if config.method == "on_policy":  # from where that policy steers
            strength = ValuePolicyConfig.from_pretrained(config.initial).strength
            for name, parameter in adapted.named_parameters():
                if ".lora_B." in name:
                    parameter.data.mul_(strength)
    if model.device.type == "cpu":  # where fused attention under a mask is slow to differentiate
        model.set_attn_implementation("eager")
    return adapted


class _Tokenized(DPOTrainer):
    """DPO on token ids as they were sampled: a text tokenized anew would end, and begin, otherwise."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def _arguments(config: TuneConfig) -> dict[str, Any]:
    return common_arguments(config) | {
        "eval_strategy": "no", "report_to": "none", "disable_tqdm": False,
        # An interrupted tuning goes on; the tokens that TRL has sampled are counted in memory.
        "save_strategy": "no" if config.method in TRL_ONLINE else "steps", "save_steps": 25, "save_total_limit": 1,
    }  # fmt: skip


def _offline(
    config: TuneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[LabelledTree],
    deviations: Mapping[str, float],
) -> Any:
    """A trainer on trees; None for what is not trained on them."""
    shared: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "peft_config": lora_config(config.lora, model),
    }
    if config.method == "dpo":
        rows = preference_pairs(trees, config.weights, deviations, config.pairs)
        arguments = _arguments(config) | {"beta": config.eta, "max_length": None} | config.trl
        return _Tokenized(args=DPOConfig(**arguments), train_dataset=Dataset.from_list(rows), **shared)
    if config.method == "sft":
        rows = best_answers(trees, config.weights, deviations)
        arguments = _arguments(config) | {"max_length": None, "completion_only_loss": True} | config.trl
        return SFTTrainer(args=TrlSftConfig(**arguments), train_dataset=Dataset.from_list(rows), **shared)
    if config.method in ON_TREES:
        if config.method == "pairs":
            one = paired_trees(trees, config.weights, deviations, config.pairs)
        else:
            one = [combined_item(item, config.weights, deviations) for item in trees]
        adapted = _adapted(config, model)
        # A tree is as many sequences as it has answers: one at a time, and steps of `batch_size` trees.
        arguments = _arguments(config) | {
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": config.batch_size,
            "remove_unused_columns": False, "label_names": [],
        } | config.trl  # fmt: skip
        return TreeTrainer(
            model=adapted, args=TrainingArguments(**arguments), train_dataset=tree_rows(one), eta=config.eta,
            loss=ON_TREES[config.method], data_collator=collate,
        )  # fmt: skip
    return None


def _on_policy(
    config: TuneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    deviations: Mapping[str, float],
) -> Any:
    """A trainer on trees that it samples."""
    arguments = _arguments(config) | {
        "per_device_train_batch_size": config.batch_size // config.generations, "max_steps": config.steps,
        "remove_unused_columns": False, "label_names": [], "logging_steps": 5,
    } | config.trl  # fmt: skip
    return on_policy.OnPolicyTrainer(
        model=_adapted(config, model), args=TrainingArguments(**arguments), train_dataset=list(rows), eta=config.eta,
        loss=path_loss, data_collator=on_policy.collate, label=on_policy.labeller(config, tokenizer, deviations),
        sample=on_policy.sampler(config, model, tokenizer, list(rows)),
    )  # fmt: skip


def _online(
    config: TuneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    deviations: Mapping[str, float],
    sampled: list[int],
) -> Any:
    """A trainer that samples; `sampled` counts its tokens."""
    chat = tokenizer.chat_template is not None and config.chat_template != "none"

    def put(row: dict[str, Any]) -> Any:
        given = row.get("conversation") or row["prompt"]
        return [{"role": "user", "content": given}] if chat and isinstance(given, str) else given

    data = Dataset.from_list([{"prompt": put(row), "asked": row["prompt"]} for row in rows])
    functions = [
        _reward(name, load_reward(spec, config.device or "cpu"), sampled if i == 0 else None)
        for i, (name, spec) in enumerate(config.rewards.items())
        if name in config.weights
    ]
    shares = [config.weights[name] / deviations[name] for name in config.rewards if name in config.weights]
    arguments = _arguments(config) | {
        "beta": config.eta, "num_generations": config.generations, "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature, "top_k": 0, "top_p": 1.0, "max_steps": config.steps,
        "reward_weights": shares,
    } | config.trl  # fmt: skip
    kind, settings = (RLOOTrainer, RLOOConfig) if config.method == "rloo" else (GRPOTrainer, GRPOConfig)
    return kind(
        model=model, reward_funcs=functions, args=settings(**arguments), train_dataset=data,
        processing_class=tokenizer, peft_config=lora_config(config.lora, model),
    )  # fmt: skip


def _reward(name: str, reward: Reward, sampled: list[int] | None) -> Callable[..., list[float]]:
    """A reward as TRL calls it: of completions that may be turns, beside columns of the data set."""

    def function(prompts: Any, completions: Any, asked: list[str], completion_ids: Any, **kwargs: Any) -> list[float]:
        if sampled is not None:
            sampled[0] += sum(map(len, completion_ids))
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        return compute_rewards(reward, list(asked), texts, {}, name)

    function.__name__ = name
    return function
