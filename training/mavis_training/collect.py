"""Algorithm 3, GET_DATA: sample a tree of completions for every prompt and keep the trees in a store."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits import MavisConfig
from mavis_logits.backbone.anatomy import longest_sequence
from mavis_logits.backbone.fingerprint import Identity, parameters_fingerprint, tokenizer_fingerprint
from mavis_logits.integrations.serving import Offer, Serving
from mavis_logits.models import folder_of, full_name, load_chat_model, load_tokenizer
from mavis_logits.steering.steering import Steering
from mavis_logits.values.ensemble import ValueFunctions
from mavis_logits.values.value_policy import ValuePolicy

from .base.kept import as_json
from .base.prompts import encode_prompts, read_prompts
from .base.ranks import Ranks, join
from .base.settings import torch_dtype
from .sampling import rollout_vllm
from .sampling.config import CollectConfig as CollectConfig
from .sampling.config import PolicyConfig as PolicyConfig
from .sampling.reference import Reference, contexts, eos_token_ids, require_room
from .sampling.rollout import sample_trees
from .trees.tree import Tree
from .trees.tree_store import METADATA_FILE, StoreMetadata, TreeStore

Backend = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class Sampler:
    """What samples trees.

    Attributes:
        tokenizer: of the base model.
        metadata: of the store that it fills.
        sample: (prompt rows, their token ids, seed) -> their trees.
        contexts: how many tokens each model that reads them can read; None where that is not known.
    """

    tokenizer: PreTrainedTokenizerBase
    metadata: StoreMetadata
    sample: Callable[[list[dict[str, Any]], list[list[int]], int], list[Tree]]
    contexts: dict[str, int | None]


def collect(
    config: CollectConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TreeStore:
    """Sample one tree for every prompt that has none yet. Killed at any instant, a rerun goes on where it stood.

    Several processes (`mavis_training.base.ranks`) share the shards that are still to be written. Their numbers and
    contents are those that one process would write.

    Args:
        config: what to sample.
        model: the base model, if it is loaded already (then `tokenizer` too). vLLM loads its own.
        tokenizer: its tokenizer.

    Raises:
        ValueError: a prompt is empty, a duplicate, or too long for a model's context, the store was sampled with other
            settings or from other prompts, or the value functions do not fit the model. Nothing has been sampled then.
        OSError: the prompts file cannot be read.
        ImportError: backend "vllm" without vllm.
    """
    rows = read_prompts(config.prompts, config.limit, config.skip)
    ranks = join(config.device)
    make = vllm_sampler if config.backend == "vllm" else transformers_sampler
    sampler = make(config, ranks, model, tokenizer)
    tokens = encode_prompts(rows, sampler.tokenizer, config.max_prompt_tokens, config.chat_template)
    require_room(rows, tokens, config.max_new_tokens, sampler.contexts)
    prompts = {str(row["id"]): (row, ids) for row, ids in zip(rows, tokens, strict=True)}
    if ranks.is_main:
        TreeStore.create(config.store, sampler.metadata)
    ranks.wait()
    store = TreeStore.open(config.store)
    ranks.agree(lambda: require_same_prompts(store, prompts))
    plan = ranks.share(ranks.agree(lambda: plan_shards(store, list(prompts), config.prompts_per_shard)))
    started, sampled = time.monotonic(), 0
    title = "collect" if ranks.count == 1 else f"collect (1 of {ranks.count} processes)"
    total = sum(len(names) for _, names in plan)
    with tqdm(total=total, desc=title, unit="tree", disable=not ranks.is_main) as progress:
        for number, names in plan:
            chunk_rows, chunk_ids = [prompts[name][0] for name in names], [prompts[name][1] for name in names]
            trees = sampler.sample(chunk_rows, chunk_ids, _seed(config.seed, chunk_rows))
            store.write(trees, number)
            sampled += sum(len(tree.tokens) for tree in trees)
            progress.update(len(names))
            progress.set_postfix_str(f"{sampled / (time.monotonic() - started):.0f} tokens/s")
    ranks.wait()
    return store


def require_same_prompts(store: TreeStore, prompts: Mapping[str, tuple[dict[str, Any], list[int]]]) -> None:
    """Refuse to keep trees of prompts that have been edited since.

    Args:
        store: the trees.
        prompts: row and token ids by prompt id.

    Raises:
        ValueError: a tree's prompt, or a column that rewards may read, is not what the row of its id says now.
    """
    edited = []
    for tree in store:
        row, ids = prompts.get(tree.prompt_id, (None, None))
        if row is not None:
            columns = {key: value for key, value in row.items() if key not in ("id", "prompt")}
            same = tree.prompt == row["prompt"] and tree.prompt_tokens.tolist() == ids
            if not same or as_json(tree.columns) != as_json(columns):
                edited.append(tree.prompt_id)
    if edited:
        raise ValueError(
            f"{store.folder} has trees of {len(edited)} prompts that have other texts or columns now: "
            f"{', '.join(edited[:5])}. Undo the edit, give edited prompts new ids, or give another store."
        )


def plan_shards(store: TreeStore, prompt_ids: list[str], size: int) -> list[tuple[int, list[str]]]:
    """The shards that are still to be written: the number of each and the prompts of its trees.

    Prompts without a tree are cut, in order, into shards of `size`, which take the free numbers in order: what an
    interrupted run has left undone is planned again as it was.
    """
    done = store.prompt_ids()
    todo = [name for name in prompt_ids if name not in done]
    chunks = [todo[start : start + size] for start in range(0, len(todo), size)]
    return list(zip(store.free_numbers(), chunks, strict=False))


def transformers_sampler(
    config: CollectConfig, ranks: Ranks, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> Sampler:
    """Rollouts of the reference or of a steered policy by transformers, on this rank's device. Raises as `collect`."""
    if model is None or tokenizer is None:
        model, tokenizer = load_chat_model(config.model, torch_dtype(config.dtype))
    model.to(ranks.device).eval()  # type: ignore[arg-type]
    steering = load_policy(config.policy, model, tokenizer)
    reference = Reference.of(model, tokenizer)
    if ranks.is_main and (notice := reference.notice(config.model)):
        tqdm.write(notice)
    metadata = StoreMetadata(
        model=model.config.name_or_path or type(model).__name__,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        sampling=config.sampling(),
        policy=describe(steering),
        reference=reference.record(),
        **_weights(model, config.store),
        versions={name: version(name) for name in ("torch", "transformers", "mavis-logits")},
    )
    sample = partial(
        sample_trees,
        model,
        eos=set(reference.eos),
        shape=config,
        temperature=config.temperature,
        top_p=config.top_p,
        steering=steering,
    )
    return Sampler(tokenizer, metadata, lambda rows, ids, seed: sample(rows, ids, seed=seed), contexts(model, steering))


def vllm_sampler(
    config: CollectConfig, ranks: Ranks, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> Sampler:
    """Rollouts of the reference, or of a steered policy, by vLLM. Raises as `collect`.

    Args:
        config, tokenizer: see `collect`.
        ranks: one only.
        model: if given, its weights are recorded as those that the trees were sampled from.
    """
    if ranks.count > 1:
        raise ValueError(
            f"backend 'vllm' runs in one process, which uses several GPUs by itself; got {ranks.count}. Start it "
            "without accelerate launch, with vllm: {tensor_parallel_size: ...}"
        )
    folder = folder_of(config.model)
    tokenizer = tokenizer or load_tokenizer(folder)
    longest = config.max_prompt_tokens + config.max_new_tokens
    context = longest_sequence(AutoConfig.from_pretrained(folder).get_text_config(decoder=True))
    policy = {} if config.policy is None else _describe_served(config.policy)  # refuses what cannot be served
    engine = rollout_vllm.load_engine(
        folder, config.dtype, min(longest, context or longest), config.vllm, config.policy
    )
    eos = eos_token_ids(_generation(folder), tokenizer)
    metadata = StoreMetadata(
        model=full_name(config.model),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        sampling=config.sampling(),
        policy=policy,
        reference=Reference(frozenset(eos), tokenizer.pad_token_id).record(),
        **({} if model is None else _weights(model, config.store)),
        versions={"vllm": rollout_vllm.engine_version(), "mavis-logits": version("mavis-logits")},
    )
    sample = partial(rollout_vllm.sample_trees, engine, eos=eos, shape=config)
    return Sampler(
        tokenizer, metadata, lambda rows, ids, seed: sample(rows, ids, seed=seed), {"the base model": context}
    )


def _weights(model: PreTrainedModel, store: str) -> dict[str, Any]:
    """How a store records a base model: as it does already, if it is that one (another version knows it otherwise)."""
    identity = Identity(model)
    if Path(store, METADATA_FILE).exists():
        known = TreeStore.open(store).metadata
        if known.weights_fingerprint and identity.difference(known.weights_fingerprint, known.weights_sketch) is None:
            return {"weights_fingerprint": known.weights_fingerprint, "weights_sketch": known.weights_sketch}
    return {"weights_fingerprint": identity.fingerprint, "weights_sketch": identity.sketch}


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
    steering = Steering.from_pretrained(config.value_functions, model=model, tokenizer=tokenizer, **config.settings)
    named = {name: config.settings[name] for name in ("weights", "beta") if name in config.settings}
    steering.config = replace(steering.config, **named)  # which a store records
    return steering


def describe(steering: Steering | None) -> dict[str, Any]:
    """What a store records of the policy that sampled it: its settings, and which value functions it used."""
    return {} if steering is None else _described(steering.functions, steering.config)


def _described(functions: ValueFunctions, config: MavisConfig) -> dict[str, Any]:
    used = []
    for function in functions.all:
        if isinstance(function, ValuePolicy):
            weights = function.fingerprint
        else:  # instructions are read by a language model, which is not theirs alone
            read_by = function if isinstance(function, nn.Module) else function.backbone  # type: ignore[attr-defined]
            weights = parameters_fingerprint(read_by)
        found = {"objectives": function.config.objectives, "weights": weights}
        if instructions := getattr(function.config, "instructions", None):
            found["instructions"] = instructions
        used.append(found)
    return {"settings": asdict(config), "value_functions": used}


def _describe_served(policy: PolicyConfig) -> dict[str, Any]:
    """The same of a policy inside vLLM, which has the base model; here the value functions are loaded without it.

    Raises:
        ValueError: a value function that cannot be served, or settings that do not fit it.
    """
    serving = Serving.read(rollout_vllm.serving(policy))
    offer = Offer.of(serving)
    return _described(serving.load(None, torch.device("cpu")), offer.config)


def _generation(model: str) -> GenerationConfig:
    """The generation config in a model's repository or folder, or what follows from its model config."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))


def _seed(seed: int, rows: list[dict[str, Any]]) -> int:
    """A seed for these prompts alone, so that an interrupted run samples the same trees as an uninterrupted one."""
    digest = hashlib.sha256(json.dumps([seed, *(row["id"] for row in rows)]).encode()).digest()
    return int.from_bytes(digest[:6], "big")
