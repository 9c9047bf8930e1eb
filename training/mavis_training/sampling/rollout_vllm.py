"""Algorithm 3 with vLLM as the sampler: the trees of iteration 0, where the policy is the reference itself.

All branches of one level of all trees are one call of the engine, which batches them as it sees fit; its prefix cache
spares it what branches share. vLLM reports log-probabilities of the reference only, at temperature 1: that is all that
iteration 0 needs, and the reason why nothing else is sampled here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..trees.tree import Tree
from .growth import Growth

if TYPE_CHECKING:
    from vllm import LLM

    from .config import CollectConfig

_MISSING = (
    "backend 'vllm' needs the package vllm, which is not installed. Run: pip install \"mavis-logits[vllm]\" "
    "(best in an environment of its own: vllm pins torch and transformers), or use backend 'transformers'."
)


def load_engine(model: str, dtype: str, max_tokens: int, arguments: Mapping[str, Any]) -> LLM:
    """A vLLM engine that reports the reference's log-probabilities and keeps what prompts share.

    Args:
        model: base model, by Hub id or folder.
        dtype: of its weights.
        max_tokens: longest sequence, prompt included.
        arguments: of `vllm.LLM`, over these defaults: `tensor_parallel_size`, `gpu_memory_utilization`, ...

    Raises:
        ImportError: vllm is not installed.
        ValueError: an argument that would change what the log-probabilities mean; from vllm, a model or argument that
            it does not take.
    """
    try:
        from vllm import LLM
    except ModuleNotFoundError as error:
        raise ImportError(f"{_MISSING} ({error})") from error
    fixed = {"model": model, "dtype": dtype, "logprobs_mode": "raw_logprobs"}
    refused = sorted(fixed.keys() & arguments.keys())
    if refused:
        raise ValueError(
            f"vllm may not set {', '.join(refused)}: the settings of collect say so already. Leave it out."
        )
    defaults = {"max_model_len": max_tokens, "enable_prefix_caching": True, "skip_tokenizer_init": True}
    return LLM(**fixed, **defaults | dict(arguments))


def engine_version() -> str:
    """Version of the installed vLLM, which is distributed under several names."""
    import vllm

    return str(vllm.__version__)


def sample_trees(
    engine: LLM,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[list[int]],
    eos: set[int],
    shape: CollectConfig,
    seed: int,
) -> list[Tree]:
    """Algorithm 3 for P prompts side by side, from the reference at temperature 1, one call of the engine a level.

    Args:
        engine: from `load_engine`.
        rows: P prompt rows.
        prompts: their token ids, none empty.
        eos: tokens that end a completion.
        shape: of the trees.
        seed: of all randomness.

    Returns:
        P trees whose log pi_gen is log pi_ref.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    rng = random.Random(seed)
    growth = Growth(rows, prompts, eos, shape, rng)
    branches = growth.start()
    while branches:
        # `eos` decides alone what ends a completion, whatever the model's own files say.
        settings = [
            SamplingParams(
                max_tokens=branch.limit,
                temperature=1.0,
                seed=rng.getrandbits(48),
                logprobs=0,  # of the sampled token only
                stop_token_ids=sorted(eos),
                ignore_eos=True,
                detokenize=False,
            )
            for branch in branches
        ]
        requests = [TokensPrompt(prompt_token_ids=branch.before) for branch in branches]
        for branch, answer in zip(branches, engine.generate(requests, settings, use_tqdm=False), strict=True):
            completion = answer.outputs[0]
            for token, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
                logp = candidates[token].logprob
                branch.add(token, logp, logp)
        branches = [child for branch in branches for child in growth.finish(branch)]
    return growth.trees()
