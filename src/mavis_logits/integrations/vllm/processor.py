"""The class that vLLM loads: `--logits-processors mavis_logits.integrations.vllm:MavisProcessor`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...scoring.rows import Tokens
from ..slots import Rows
from . import binding
from .engine import Engine, runner_of_caller, validate
from .states import BatchStates

try:  # the interface of Model Runner V2
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as _V2
except ImportError as error:
    raise ImportError(
        "steering inside vLLM needs vllm 0.29 or newer, which is not installed here. Run: pip install "
        '"mavis-logits[vllm]", in an environment of its own: vllm pins torch and transformers'
    ) from error
try:  # that of V1, which vLLM falls back to where there is no Triton
    from vllm.v1.sample.logits_processor.interface import LogitsProcessor as _V1
except ImportError:  # it is on its way out
    _V1 = object


class MavisProcessor(_V1, _V2):  # type: ignore[misc, valid-type]
    """Steers requests that ask for it by value functions; see `mavis_logits.integrations.vllm`.

    vLLM has two model runners, whose processors differ. This is one class for both: made with the arguments of either,
    it becomes that runner's.
    """

    def __new__(cls, vllm_config: Any, *given: Any, **named: Any) -> MavisProcessor:
        """A processor for the runner whose arguments these are."""
        return object.__new__(_ForV2 if len(given) + len(named) == 1 else _ForV1)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise `ValueError` for a request whose `mavis_...` arguments are wrong."""
        validate(sampling_params)


class _ForV2(MavisProcessor):
    """For Model Runner V2: rows are named by persistent slots, and by their positions."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        runner = runner_of_caller(vllm_config)
        self._req_states = req_states
        self._engine = Engine(vllm_config, req_states.max_num_reqs, req_states.device)
        if not runner.is_last_pp_rank:
            return  # no logits here
        if self._engine.inner_layers and runner.use_pp:
            raise ValueError(
                "mavis: a value head that reads an inner layer is not supported with pipeline parallelism: use one "
                "that reads the last layer, or tensor parallelism"
            )
        self._engine.attach(runner.model)
        self._engine.attach_drafts(getattr(runner, "speculator", None))
        _watch_v2(runner, self._engine)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return self._engine.put(req_idx, sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Nobody calls it: it is of the other runner's interface."""

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        present = ctx.idx_mapping_np.tolist()
        rows = Rows(ctx.expanded_idx_mapping, present, one_each=len(logits) == len(present))
        return self._engine.steer(logits, rows, ctx.pos, lambda numbers: self._texts_of(ctx, numbers))

    def _texts_of(self, ctx: Any, numbers: list[int]) -> list[Tokens]:
        """What stands before the tokens that are chosen by some rows: what is committed, and drafts up to there."""
        slots, positions, inputs = (
            tensor.cpu().numpy() for tensor in (ctx.expanded_idx_mapping, ctx.pos, ctx.input_ids)
        )
        wanted = ctx.expanded_idx_mapping[numbers].long()
        longest = int(positions[numbers].max()) + 1
        committed = self._req_states.all_token_ids.gpu[wanted, :longest].cpu().numpy()
        texts = []
        for number, text in zip(numbers, committed, strict=True):
            own = text[: positions[number] + 1].astype(np.int64)
            before = np.flatnonzero((slots == slots[number]) & (positions <= positions[number]))
            own[positions[before]] = np.maximum(inputs[before], 0)  # -1 stands for a draft that is rejected anyway
            texts.append(own)
        return texts


def _watch_v2(runner: Any, engine: Engine) -> None:
    """Have the states of every step caught between the forward pass and the sampling."""
    every: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    if engine.inner_layers:
        every, before = binding.ask_for_layers(runner.model, engine.inner_layers)
        before = before if runner.use_aux_hidden_state_outputs else ()
        runner.use_aux_hidden_state_outputs = True
        engine.mark(every)
    caught: dict[Any, Tensor] = {}
    execute_model, sample = runner.execute_model, runner.sample

    @wraps(execute_model)
    def executing(*given: Any, **named: Any) -> Any:
        caught.clear()  # rather none than those of another pass
        result = execute_model(*given, **named)
        state = runner.execute_model_state
        if state is not None and every and state.aux_hidden_states is not None:
            states = dict(zip(every, state.aux_hidden_states, strict=True))
            caught.update({layer: states[layer] for layer in engine.inner_layers})  # type: ignore[index]
            theirs = [states[layer] for layer in before] or None  # a drafter sees what it would without us
            runner.execute_model_state = state._replace(aux_hidden_states=theirs)
        return result

    @wraps(sample)
    def sampling(hidden_states: Tensor, input_batch: Any, *given: Any, **named: Any) -> Any:
        tokens = input_batch.logits_indices
        engine.batch = BatchStates(
            {**caught, None: hidden_states}, tokens, input_batch.expanded_idx_mapping, input_batch.positions[tokens]
        )
        try:
            return sample(hidden_states, input_batch, *given, **named)
        finally:
            engine.batch = None

    runner.execute_model, runner.sample = executing, sampling


class _ForV1(MavisProcessor):
    """For the V1 model runner: one row a request, in the order of its batch. It takes no speculative decoding."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        runner = runner_of_caller(vllm_config)
        self._engine = Engine(vllm_config, vllm_config.scheduler_config.max_num_seqs, device)
        self._texts: dict[int, tuple[Sequence[int] | None, Sequence[int]]] = {}
        self._slots = torch.arange(vllm_config.scheduler_config.max_num_seqs, device=device)
        load_model = runner.load_model

        @wraps(load_model)
        def loading(*given: Any, **named: Any) -> None:
            load_model(*given, **named)
            self._engine.attach(runner.model)
            self._engine.attach_drafts(None)
            _watch_v1(runner, self._engine)

        runner.load_model = loading

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for slot in batch_update.removed:
            self._engine.slots.put(slot, None)
            self._texts.pop(slot, None)
        for slot, params, prompt, written in batch_update.added:
            self._engine.put(slot, params)
            self._texts[slot] = prompt, written  # the latter grows
        for source, target, direction in batch_update.moved:
            swap = direction.name == "SWAP"
            self._engine.slots.move(source, target, swap)
            gone = self._texts.get(target)
            self._texts[target] = self._texts.pop(source)
            if swap and gone is not None:
                self._texts[source] = gone

    def apply(self, logits: Tensor) -> Tensor:
        rows = Rows(self._slots[: len(logits)], list(range(len(logits))), one_each=True)
        return self._engine.steer(logits, rows, None, self._texts_of)

    def _texts_of(self, numbers: list[int]) -> list[Tokens]:
        """What the requests in some places of the batch hold so far."""
        texts = []
        for number in numbers:
            prompt, written = self._texts[number]
            if prompt is None:
                raise ValueError("a prompt was given as embeddings, which value models cannot read")
            texts.append(np.array([*prompt, *written], dtype=np.int64))
        return texts


def _watch_v1(runner: Any, engine: Engine) -> None:
    every: tuple[int, ...] = ()
    if engine.inner_layers:
        every, _ = binding.ask_for_layers(runner.model, engine.inner_layers)
        runner.use_aux_hidden_state_outputs = True
        engine.mark(every)
    execute_model, prepare_inputs = runner.execute_model, runner._prepare_inputs
    tokens: list[Tensor] = []

    @wraps(prepare_inputs)
    def preparing(*given: Any, **named: Any) -> Any:
        result = prepare_inputs(*given, **named)
        tokens[:] = [result[0]]
        return result

    @wraps(execute_model)
    def executing(*given: Any, **named: Any) -> Any:
        result = execute_model(*given, **named)
        state = runner.execute_model_state
        engine.batch = None
        if state is not None and tokens:
            states: dict[Any, Tensor] = {None: state.hidden_states}
            if every and state.aux_hidden_states is not None:
                states.update(zip(every, state.aux_hidden_states, strict=True))
                runner.execute_model_state = state._replace(aux_hidden_states=None)
            engine.batch = BatchStates(states, tokens[0])
        return result

    runner._prepare_inputs, runner.execute_model = preparing, executing
