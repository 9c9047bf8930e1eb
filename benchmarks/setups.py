"""The models and prompts that the benchmark runs on: SmolLM2 on a CPU, the shapes of Llama-2 and TinyLlama on a GPU.

Time does not depend on what value functions have learned, so that theirs are random weights. The base model is real
where that is possible, because the number of candidates left by `candidate_min_p` depends on its distribution.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mavis_logits import ValueHead, ValueModel
from mavis_logits.backbone import Backbone
from mavis_logits.demo import load_smollm2

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
TINYLLAMA_1_1B = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
DRY_BASE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
DRY_VALUE = DRY_BASE | {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 1}


@dataclass
class Setup:
    """A base model, what value functions are made from, and where prompts come from.

    Attributes:
        name: of the base model, for the report.
        model: the base model.
        backbone: of the value models.
        num_layers: of the backbone's layers that value models keep; None for all.
        pad_token_id: for padding on the left.
        stream: (which prompt, how many tokens) -> that many tokens.
        rank: of LoRA adapters.
    """

    name: str
    model: PreTrainedModel
    backbone: PreTrainedModel
    num_layers: int | None
    pad_token_id: int
    stream: Callable[[int, int], list[int]]
    rank: int = 16
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.model.device

    @property
    def value_config(self) -> PreTrainedConfig:
        """Config of the value models' decoder."""
        config = copy.deepcopy(self.backbone.config)
        config.num_hidden_layers = self.num_layers or config.num_hidden_layers
        return config

    def prompts(self, turn: int, batch: int, context: int, different: bool) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [batch, context], other prompts every turn.

        With `different`, lengths go evenly from a quarter of `context` up to it, padded on the left.
        """
        shortest = max(1, context // 4) if different else context
        lengths = [context - (context - shortest) * row // max(1, batch - 1) for row in range(batch)]
        rows = [self.stream(turn * batch + row, length) for row, length in enumerate(lengths)]
        ids = [[self.pad_token_id] * (context - len(row)) + row for row in rows]
        mask = [[0] * (context - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }

    def head(self, objectives: int) -> ValueHead:
        """A value head with this many outputs."""
        return self._once(("head", objectives), lambda: ValueHead.for_model(self.model, names(objectives)).eval())

    def shared_model(self, objectives: int, dtype: torch.dtype) -> ValueModel:
        """One value model with this many outputs."""
        return self._once(("shared", objectives, dtype), lambda: self._value_model(names(objectives), dtype))

    def separate_models(self, objectives: int, dtype: torch.dtype) -> dict[str, ValueModel]:
        """One value model for each objective."""
        return self._each("separate", objectives, dtype)

    def baseline_models(self, objectives: int, dtype: torch.dtype) -> dict[str, ValueModel]:
        """The same for the plain schemes, which run transformers' own attention: copies that nothing else touches."""
        return self._each("baseline", objectives, dtype)

    def adapters(self, objectives: int, dtype: torch.dtype) -> dict[str, ValueModel]:
        """One value model for each objective, each a LoRA adapter on the same backbone."""
        lora = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=LINEAR_LAYERS, init_lora_weights=False)
        return self._each("adapter", objectives, dtype, lora=lora)

    def _each(self, kind: str, objectives: int, dtype: torch.dtype, **kwargs: Any) -> dict[str, ValueModel]:
        return {
            name: self._once((kind, name, dtype), partial(self._value_model, [name], dtype, **kwargs))
            for name in names(objectives)
        }

    def _value_model(self, objectives: Sequence[str], dtype: torch.dtype, **kwargs: Any) -> ValueModel:
        trunk = Backbone.of(self.backbone).truncated(self.num_layers, dtype)
        model = ValueModel.from_backbone(trunk, objectives, **kwargs).eval().requires_grad_(False)
        model.head.weight.normal_(std=model.head.in_features**-0.5)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # PEFT makes adapters in float32
        return model.to(self.device)  # type: ignore[arg-type]

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            torch.manual_seed(SEED)
            self._made[key] = make()
        return self._made[key]


def names(objectives: int) -> list[str]:
    """Names of so many objectives."""
    return [f"objective {number}" for number in range(1, objectives + 1)]


def smollm2() -> Setup:
    """SmolLM2-135M-Instruct in float32 on the CPU; value models are made of its first four layers."""
    model, tokenizer = load_smollm2()
    assert tokenizer.pad_token_id is not None
    return Setup(model.name_or_path, model, model, 4, tokenizer.pad_token_id, demo_stream(tokenizer))


def demo_stream(tokenizer: PreTrainedTokenizerBase) -> Callable[[int, int], list[int]]:
    """Tokens of the demo's prompts, one after another and round again, beginning with another one each time."""
    lines = (ROOT / "examples" / "data" / "demo_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] + "\n\n" for line in lines]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def stream(number: int, length: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += prompts[number % len(prompts)]
            number += 1
        return tokens[:length]

    return stream


def llama_shapes(device: torch.device | str, dry_run: bool = False) -> Setup:
    """Llama-2-7B as the base, TinyLlama-1.1B as value models, made from configs with random weights, in bfloat16.

    Args:
        device: to make them on.
        dry_run: make both tiny instead.
    """
    base_shape, value_shape = (DRY_BASE, DRY_VALUE) if dry_run else (LLAMA_2_7B, TINYLLAMA_1_1B)
    torch.manual_seed(SEED)
    with torch.device(device):
        base = LlamaForCausalLM._from_config(LlamaConfig(**base_shape), dtype=torch.bfloat16).eval()
        value = LlamaModel._from_config(LlamaConfig(**value_shape), dtype=torch.bfloat16).eval()
    vocabulary = base.config.vocab_size
    base.generation_config.eos_token_id = base.config.eos_token_id

    def stream(number: int, length: int) -> list[int]:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    name = "tiny random models (dry run)" if dry_run else "Llama-2-7B and TinyLlama-1.1B shapes, random weights"
    return Setup(name, base, value, None, 0, stream, rank=4 if dry_run else 128)
