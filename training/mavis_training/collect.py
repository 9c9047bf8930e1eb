"""Algorithm 3, GET_DATA: sample a tree of completions for every prompt and keep the trees in a store."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits import MavisConfig
from mavis_logits.demo.chat import ChatTemplate
from mavis_logits.demo.smollm2 import load_chat_model
from mavis_logits.fingerprint import tokenizer_fingerprint, weights_fingerprint
from mavis_logits.steering import Steering

from .prompts import encode_prompts, read_prompts
from .rollout import sample_trees
from .tree_store import StoreMetadata, TreeStore


@dataclass(frozen=True)
class PolicyConfig:
    """A steered policy to sample from: MAVIS(pi_ref, V, k, beta) of Algorithm 1.

    Attributes:
        value_functions: Hub id or folder of the value functions: one, or by objective.
        settings: fields of `MavisConfig`: weights, beta, top_k, normalize, ...
    """

    value_functions: str | dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        MavisConfig.from_dict(self.settings)


@dataclass(frozen=True)
class CollectConfig:
    """What to sample (Algorithm 3; the defaults are section F.4's for iteration 0).

    Attributes:
        prompts: JSON-lines file with the fields `id` and `prompt`; other fields are handed on to reward functions.
        store: folder of the tree store.
        model: base model, by Hub id or folder; `"smollm2"` is the one the demo uses.
        limit: at most this many prompts, from the top of the file; None for all.
        max_new_tokens: T, length of a completion.
        layers: L, depth of a tree.
        root_children: K_root, completions begun at the prompt.
        children: K, continuations of every other node.
        two_layers: split a first-layer completion that ended, so that every tree has at least two layers (appendix C).
        temperature: softmax temperature of the sampling policy (a steered one tilts the reference at it).
        policy: the steered policy that samples; None for the reference, as in iteration 0.
        chat_template: "auto" puts a prompt as one user turn of the tokenizer's chat template, or as raw text if it has
            none; "none" always as raw text.
        max_prompt_tokens: longer prompts are an error.
        prompts_per_shard: prompts sampled side by side, and written together.
        dtype: of the base model's weights.
        device: where to sample; None for a GPU if there is one.
        seed: of the whole collection; the trees do not depend on where a run was interrupted.
    """

    prompts: str
    store: str
    model: str = "smollm2"
    limit: int | None = None
    max_new_tokens: int = 128
    layers: int = 5
    root_children: int = 4
    children: int = 2
    two_layers: bool = True
    temperature: float = 1.0
    policy: PolicyConfig | None = None
    chat_template: ChatTemplate = "auto"
    max_prompt_tokens: int = 512
    prompts_per_shard: int = 8
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "layers", "root_children", "children", "prompts_per_shard", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype must name a torch dtype such as 'float32' or 'bfloat16', got {self.dtype!r}")

    def sampling(self) -> dict[str, Any]:
        """The settings that shape the samples, as the store records them."""
        names = ("max_new_tokens", "layers", "root_children", "children", "two_layers", "temperature", "dtype", "seed")
        sampling = {name: getattr(self, name) for name in names}
        # Only where it is not as it always was, so that a store begun earlier can be gone on with.
        return sampling if self.chat_template == "auto" else sampling | {"chat_template": self.chat_template}


def collect(
    config: CollectConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TreeStore:
    """Sample one tree for every prompt that has none yet. Killed at any instant, a rerun goes on where it stood.

    Args:
        config: what to sample.
        model: the base model, if it is loaded already (then `tokenizer` too).
        tokenizer: its tokenizer.

    Raises:
        ValueError: a prompt is empty, too long or a duplicate, the store was sampled with other settings, or the value
            functions do not fit the model. Nothing has been sampled then.
        OSError: the prompts file cannot be read.
    """
    rows = read_prompts(config.prompts, config.limit)
    if model is None or tokenizer is None:
        model, tokenizer = load_chat_model(config.model, getattr(torch, config.dtype))
    model.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()  # type: ignore[arg-type]
    prompts = encode_prompts(rows, tokenizer, config.max_prompt_tokens, config.chat_template)
    steering = load_policy(config.policy, model, tokenizer)

    store = TreeStore.create(
        config.store,
        StoreMetadata(
            model=model.config.name_or_path or type(model).__name__,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            sampling=config.sampling(),
            policy=describe(steering),
            weights_fingerprint=weights_fingerprint(model),
            versions={name: version(name) for name in ("torch", "transformers", "mavis-logits")},
        ),
    )
    done = store.prompt_ids()
    todo = [(row, ids) for row, ids in zip(rows, prompts, strict=True) if row["id"] not in done]
    eos = eos_token_ids(model, tokenizer)
    started, sampled = time.monotonic(), 0
    with tqdm(total=len(rows), initial=len(rows) - len(todo), desc="collect", unit="tree") as progress:
        for start in range(0, len(todo), config.prompts_per_shard):
            chunk = todo[start : start + config.prompts_per_shard]
            chunk_rows, chunk_ids = [row for row, _ in chunk], [ids for _, ids in chunk]
            seed = _seed(config.seed, chunk_rows)
            trees = sample_trees(model, chunk_rows, chunk_ids, eos, config, seed, config.temperature, steering)
            store.write(trees)
            sampled += sum(len(tree.tokens) for tree in trees)
            progress.update(len(chunk))
            progress.set_postfix_str(f"{sampled / (time.monotonic() - started):.0f} tokens/s")
    return store


def load_policy(
    config: PolicyConfig | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Steering | None:
    """The steered policy that `config` describes, on top of `model`.

    Raises:
        ValueError: value functions of another base model, tokenizer or vocabulary, or settings that do not fit them.
        OSError: value functions that cannot be read.
    """
    if config is None:
        return None
    settings = MavisConfig.from_dict(config.settings)
    return Steering.from_pretrained(config.value_functions, model=model, tokenizer=tokenizer, config=settings)


def describe(steering: Steering | None) -> dict[str, Any]:
    """What a store records of the policy that sampled it: its settings, and which value functions it used."""
    if steering is None:
        return {}
    functions = [
        {"objectives": f.config.objectives, "weights": weights_fingerprint(f)}  # type: ignore[arg-type]
        for f in steering._functions.all
    ]
    return {"settings": asdict(steering.config), "value_functions": functions}


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a sequence, from the generation config and the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return {i for i in ids if isinstance(i, int)}


def _seed(seed: int, rows: list[dict[str, Any]]) -> int:
    """A seed for these prompts alone, so that an interrupted run samples the same trees as an uninterrupted one."""
    digest = hashlib.sha256(json.dumps([seed, *(row["id"] for row in rows)]).encode()).digest()
    return int.from_bytes(digest[:6], "big")
