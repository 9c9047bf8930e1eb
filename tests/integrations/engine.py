"""One vLLM engine, in a process of its own: reads what it is to do as JSON, and writes what came of it.

    python engine.py asked.json answers.json

asked: {"v2": bool, "model": folder, "serve": settings or null, "engine": arguments of LLM, "batches": [[{"prompt": ids,
"params": arguments of SamplingParams, "asked": extra_args}]]}. answers: per batch and request its token ids, the
log-probability of each as vLLM reports it, or the error that refused the batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(asked: Path, answers: Path) -> None:
    """Run the batches one after another."""
    job = json.loads(asked.read_text())
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    if job["serve"] is not None:
        os.environ["MAVIS_SERVE"] = json.dumps(job["serve"])
    if job["v2"]:
        use_interpreter()
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.inputs import TokensPrompt

    if job["v2"]:
        use_plain_logarithm()
    processors = [] if job["serve"] is None else ["mavis_logits.integrations.vllm:MavisProcessor"]
    defaults = {"enforce_eager": True, "max_model_len": 256, "enable_prefix_caching": False, "dtype": "float32"}
    own = {"skip_tokenizer_init": True, "logits_processors": processors}
    engine = LLM(job["model"], **own, **defaults | job["engine"])
    found: dict[str, object] = {"v2": engine.llm_engine.vllm_config.use_v2_model_runner, "batches": []}
    for batch in job["batches"]:
        prompts = [TokensPrompt(prompt_token_ids=request["prompt"]) for request in batch]
        params = [
            SamplingParams(**{"detokenize": False, "logprobs": 0} | one["params"], extra_args=one["asked"] or None)
            for one in batch
        ]
        started = time.perf_counter()
        try:
            outputs = engine.generate(prompts, params, use_tqdm=False)
        except VLLMValidationError as error:
            found["batches"].append({"refused": f"{type(error).__name__}: {error}"})  # type: ignore[attr-defined]
            continue
        seconds = time.perf_counter() - started
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        logprobs = [
            [step[token].logprob for token, step in zip(own, output.outputs[0].logprobs or [], strict=False)]
            for own, output in zip(tokens, outputs, strict=True)
        ]
        found["batches"].append(  # type: ignore[attr-defined]
            {"tokens": tokens, "logprobs": logprobs, "seconds": seconds}
        )
    found["metrics"] = metrics(engine)
    answers.write_text(json.dumps(found))


def use_interpreter() -> None:
    """Model Runner V2 without a GPU: Triton's interpreter, and a driver that says it is there."""
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    import triton.backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends.setdefault("cpu", types.SimpleNamespace(driver=driver, compiler=None))
    from triton.runtime import interpreter

    for name in ("load", "store"):
        setattr(interpreter._interpreter, name, _with_masks(getattr(interpreter._interpreter, name)))


def use_plain_logarithm() -> None:
    """The interpreter has no log1p, which the residual of sampled drafts is computed with."""
    import triton.language as tl
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

    rejection_sampler_utils.tldevice = types.SimpleNamespace(log1p=lambda x: tl.log(1.0 + x))


def _with_masks(access: Callable[..., Any]) -> Callable[..., Any]:
    """A load or store of Triton's interpreter that takes masks of whole numbers, as compiled kernels do."""

    def accessed(pointers: Any, *given: Any) -> Any:
        place = 0 if access.__name__ == "load" else 1  # of the mask among `given`
        mask = given[place].astype(bool)
        return access(pointers, *given[:place], mask, *given[place + 1 :])

    return accessed


def metrics(engine: object) -> dict[str, float]:
    """Preemptions and drafts, of those counters that vLLM has."""
    try:
        found = engine.get_metrics()  # type: ignore[attr-defined]
    except (AssertionError, AttributeError):
        return {}
    return {metric.name: metric.value for metric in found if isinstance(getattr(metric, "value", None), int | float)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
