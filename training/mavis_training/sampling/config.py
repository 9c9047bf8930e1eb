"""How to sample trees, and from which policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mavis_logits import MavisConfig
from mavis_logits.core.chat import ChatTemplate
from mavis_logits.models import DEFAULT_MODEL

from ..base.settings import check_sampling, torch_dtype

Backend = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class PolicyConfig:
    """A steered policy to sample from: MAVIS(pi_ref, V, k, beta) of Algorithm 1.

    Attributes:
        value_functions: Hub id or folder of the value functions: one, or by objective.
        settings: fields of `MavisConfig`: weights, beta, top_k, normalize, ...; the others are as the value functions
            or their bundle recommend.
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
        skip: prompts to leave out at the top of the file, such as those that another store has.
        limit: at most this many prompts, from there on; None for all.
        max_new_tokens: T, length of a completion.
        layers: L, depth of a tree.
        root_children: K_root, completions begun at the prompt.
        children: K, continuations of every other node.
        two_layers: split a first-layer completion that ended, so that every tree has at least two layers (appendix C).
        temperature: softmax temperature of the sampling policy (a steered one tilts the reference at it).
        top_p: nucleus that it samples from, after the temperature, as in `generate`; 1 for all tokens.
        policy: the steered policy that samples; None for the reference, as in iteration 0.
        backend: "transformers", or "vllm" (needs the extra `vllm`), which samples from the reference at
            temperature 1, or steered by value heads and value models.
        vllm: arguments of vLLM's engine, e.g. `tensor_parallel_size` or `gpu_memory_utilization`.
        chat_template: "auto" puts a prompt as one user turn of the tokenizer's chat template, or as raw text if it has
            none; "none" always as raw text.
        max_prompt_tokens: longer prompts are an error.
        prompts_per_shard: prompts sampled side by side, and written together (vllm: give it some hundreds).
        dtype: of the base model's weights.
        device: where to sample; None for a GPU if there is one, of several processes each its own. vLLM chooses itself.
        seed: of the whole collection; the trees depend neither on where a run was interrupted nor on how many processes
            sample.
    """

    prompts: str
    store: str
    model: str = DEFAULT_MODEL
    limit: int | None = None
    max_new_tokens: int = 128
    layers: int = 5
    root_children: int = 4
    children: int = 2
    two_layers: bool = True
    temperature: float = 1.0
    top_p: float = field(default=1.0, kw_only=True)
    skip: int = field(default=0, kw_only=True)
    policy: PolicyConfig | None = None
    backend: Backend = "transformers"
    vllm: dict[str, Any] = field(default_factory=dict)
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
        if self.skip < 0:
            raise ValueError(f"skip must be a number of prompts, got {self.skip}")
        check_sampling(self.temperature, self.top_p)
        torch_dtype(self.dtype)
        self._check_backend()

    def _check_backend(self) -> None:
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {self.backend!r}")
        if self.backend != "vllm":
            if self.vllm:
                raise ValueError(f"vllm = {self.vllm} has no effect under backend {self.backend!r}: leave it out")
        elif self.top_p != 1 or (self.temperature != 1 and self.policy is None):
            raise ValueError(
                f"backend 'vllm' samples at temperature 1 from all tokens only, got temperature {self.temperature}, "
                f"top_p {self.top_p}: it reports no log-probability of the reference beside that of such a policy. Use "
                "1 for both, or backend 'transformers'"
            )

    def sampling(self) -> dict[str, Any]:
        """The settings that shape the samples, as the store records them."""
        names = ("max_new_tokens", "layers", "root_children", "children", "two_layers", "temperature", "dtype", "seed")
        sampling = {name: getattr(self, name) for name in names}
        # Only where they are not as they always were, so that a store begun earlier can be gone on with.
        later = {"chat_template": "auto", "backend": "transformers", "top_p": 1.0}
        return sampling | {name: getattr(self, name) for name, old in later.items() if getattr(self, name) != old}
