"""What a draft model proposes, tilted as the served model is, so that more of it is accepted.

A draft is accepted with the probability that rejection sampling gives it, whatever proposed it, so that what is written
follows the tilted distribution in any case. But a drafter that knows nothing of the tilt proposes what the reference
would say, of which less is accepted the stronger the tilt is.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor

from ..serving import Offer, Serving
from ..slots import Rows, Slots, Wanted, head_values
from . import binding


class Drafts:
    """Tilts the logits of a draft model by value heads on its own last state.

    Args:
        vllm_config: of the engine, with a draft model.
        drafter: the draft model as vLLM has loaded it.
        serving: the settings of the server.
        offer: what requests may ask for.
        slots: how many requests may be under way at once.
        device: of the logits.

    Attributes:
        slots: the requests' settings once more, for these values.

    Raises:
        ValueError: values that do not fit the drafter.
    """

    def __init__(self, vllm_config: Any, drafter: Any, serving: Serving, offer: Offer, slots: int, device: Any) -> None:
        speculative = vllm_config.speculative_config
        functions = serving.for_drafts(offer.objectives).load(drafter, device)
        config = speculative.draft_model_config
        binding.check_shapes(functions, config.get_hidden_size(), config.get_vocab_size())
        parallel = speculative.draft_parallel_config.tensor_parallel_size
        binding.bind(functions, drafter, serving.check_weights, parallel)
        own = Offer(functions, offer.config, offer.max_top_k)
        self.slots = Slots(slots, functions, own, binding.end_tokens(vllm_config))

    def steer(self, logits: Tensor, hidden: Tensor, slots: Tensor, present: list[int]) -> Tensor:
        """Logits [R, V] of the drafter, tilted where their requests are steered.

        Args:
            logits: [R, V], one row a request.
            hidden: [R, d], what entered the output embedding.
            slots: [R] of the rows.
            present: the same, on the host.
        """
        if not any(map(self.slots.is_steered, present)):
            return logits

        def read(wanted: Wanted) -> Tensor:
            states = hidden if wanted.rows is None else hidden[wanted.rows]
            return head_values(self.slots.functions, {None: states}, wanted)

        tilted = logits.float()
        tilted = tilted.clone() if tilted is logits else tilted
        self.slots.steer(tilted, Rows(slots, present, one_each=True), read)
        return tilted.to(logits.dtype)


def watch(speculator: Any, drafts: Drafts) -> None:
    """Have the logits of every draft pass through `drafts`.

    Raises:
        ValueError: a speculator that does not propose by a language model of its own, or by its logits.
    """
    if type(speculator).__name__ != "StandaloneARSpeculator":
        raise ValueError(
            "draft_values are for speculation by a draft model (method draft_model): leave them out. Drafts are "
            "verified against the tilted distribution with any method"
        )
    if speculator.use_local_argmax_reduction:
        raise ValueError("draft_values need the drafter's logits: set use_local_argmax_reduction to false")
    propose, sample_draft, compute = speculator.propose, speculator.sample_draft, speculator.compute_draft_logits
    rows: list[Any] = [None, []]

    @wraps(propose)
    def proposing(input_batch: Any, *given: Any, **named: Any) -> Any:
        rows[1] = input_batch.idx_mapping_np[: input_batch.num_reqs].tolist()
        return propose(input_batch, *given, **named)

    @wraps(sample_draft)
    def sampling(hidden: Tensor, positions: Tensor, idx_mapping: Tensor, *given: Any, **named: Any) -> Any:
        rows[0] = idx_mapping
        return sample_draft(hidden, positions, idx_mapping, *given, **named)

    @wraps(compute)
    def computing(hidden: Tensor, *given: Any, **named: Any) -> Tensor:
        return drafts.steer(compute(hidden, *given, **named), hidden, *rows)

    speculator.propose, speculator.sample_draft, speculator.compute_draft_logits = proposing, sampling, computing
