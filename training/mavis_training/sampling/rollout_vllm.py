"""Algorithm 3 with vLLM as the sampler: from the reference itself, or steered by the plug-in inside vLLM.

All branches of one level of all trees are one call of the engine, which batches them as it sees fit; its prefix cache
spares it what branches share. vLLM reports one log-probability a token. For the reference at temperature 1 that is all
there is; a steered policy's own is reported when it samples, and the reference's by a second reading of the level.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..trees.tree import Tree
from .growth import Growth

if TYPE_CHECKING:
    from vllm import LLM

    from .config import CollectConfig, PolicyConfig

PROCESSOR = "mavis_logits.integrations.vllm:MavisProcessor"

_MISSING = (
    "backend 'vllm' needs the package vllm, which is not installed. Run: pip install \"mavis-logits[vllm]\" "
    "(best in an environment of its own: vllm pins torch and transformers), or use backend 'transformers'."
)


def load_engine(
    model: str, dtype: str, max_tokens: int, arguments: Mapping[str, Any], policy: PolicyConfig | None = None
) -> LLM:
    """A vLLM engine that reports the log-probabilities of what it samples from, and keeps what prompts share.

    Args:
        model: base model, by Hub id or folder.
        dtype: of its weights.
        max_tokens: longest sequence, prompt included.
        arguments: of `vllm.LLM`, over these defaults: `tensor_parallel_size`, `gpu_memory_utilization`, ...
        policy: the steered policy; None for the reference.

    Raises:
        ImportError: vllm is not installed.
        ValueError: an argument that would change what the log-probabilities mean; from vllm, a model or argument that
            it does not take.
    """
    try:
        from vllm import LLM
    except ModuleNotFoundError as error:
        raise ImportError(f"{_MISSING} ({error})") from error
    fixed: dict[str, Any] = {"model": model, "dtype": dtype, "logprobs_mode": "raw_logprobs"}
    if policy is not None:
        fixed |= {
            "logprobs_mode": "processed_logprobs",
            "logits_processors": [PROCESSOR],
            "additional_config": {"mavis": serving(policy)},
        }
    refused = sorted(fixed.keys() & arguments.keys())
    if refused:
        raise ValueError(
            f"vllm may not set {', '.join(refused)}: the settings of collect say so already. Leave it out."
        )
    room = max_tokens + (
        policy is not None
    )  # it reads a whole text again and writes a token, since it cannot write none
    defaults = {"max_model_len": room, "enable_prefix_caching": True, "skip_tokenizer_init": True}
    return LLM(**fixed, **defaults | dict(arguments))


def serving(policy: PolicyConfig) -> dict[str, Any]:
    """The settings of the plug-in for a policy (`mavis_logits.integrations.serving.Serving`)."""
    return {"values": policy.value_functions, **policy.settings}


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
    """Algorithm 3 for P prompts side by side, one call of the engine a level (two where it is steered).

    Args:
        engine: from `load_engine`.
        rows: P prompt rows.
        prompts: their token ids, none empty.
        eos: tokens that end a completion.
        shape: of the trees.
        seed: of all randomness.

    Returns:
        P trees; log pi_gen is that of the policy that was sampled from, log pi_ref the reference's at temperature 1.
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
                extra_args=None if shape.policy is None else {"mavis_reference_temperature": shape.temperature},
            )
            for branch in branches
        ]
        requests = [TokensPrompt(prompt_token_ids=branch.before) for branch in branches]
        answers = [answer.outputs[0] for answer in engine.generate(requests, settings, use_tqdm=False)]
        sampled = [
            [candidates[token].logprob for token, candidates in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ]
        texts = [branch.before + list(answer.token_ids) for branch, answer in zip(branches, answers, strict=True)]
        counts = [len(answer.token_ids) for answer in answers]
        references = sampled if shape.policy is None else _reread(engine, texts, counts)
        for branch, answer, own, reference in zip(branches, answers, sampled, references, strict=True):
            for token, logp_gen, logp_ref in zip(answer.token_ids, own, reference, strict=True):
                branch.add(token, logp_gen, logp_ref)
        branches = [child for branch in branches for child in growth.finish(branch)]
    return growth.trees()


def _reread(engine: LLM, texts: Sequence[list[int]], counts: Sequence[int]) -> list[list[float]]:
    """log pi_ref of the last `counts[i]` tokens of `texts[i]`, at temperature 1 and of all tokens."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    settings = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False, seed=0)
    requests = [TokensPrompt(prompt_token_ids=text) for text in texts]
    answers = engine.generate(requests, [settings] * len(requests), use_tqdm=False)
    return [
        [answer.prompt_logprobs[place][text[place]].logprob for place in range(len(text) - count, len(text))]
        for answer, text, count in zip(answers, texts, counts, strict=True)
    ]
