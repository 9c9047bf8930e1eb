"""The processor between vLLM's runners and the core, by runners of our own that do what vLLM's may do to rows.

The real engine is in test_vllm_engine.py; what it cannot be made to do on one CPU is done here.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mavis_logits.integrations.asked import Asked
from mavis_logits.integrations.serving import ENVIRONMENT, Offer, Serving, offer_of
from mavis_logits.integrations.slots import Wanted, head_values
from mavis_logits.integrations.vllm.states import BatchStates
from mavis_logits.values.ensemble import ValueFunctions
from mavis_logits.values.value_head import ValueHead, ValueHeadConfig

V, D, EOS, SLOTS, LAYER = 97, 8, 1, 8, 2
INTERFACES = ("vllm.v1.worker.gpu.sample.logits_processor.interface", "vllm.v1.sample.logits_processor.interface")


@pytest.fixture
def processor_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The class, over interfaces like vLLM's, whether or not that is installed."""
    for name in INTERFACES:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        abstract = ["apply"] if ".gpu." in name else ["__init__", "apply", "is_argmax_invariant", "update_state"]
        methods = {method: abstractmethod(lambda self: None) for method in abstract}
        module.LogitsProcessor = type("LogitsProcessor", (ABC,), methods)  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "mavis_logits.integrations.vllm.processor", raising=False)
    from mavis_logits.integrations.vllm import processor

    yield processor.MavisProcessor
    sys.modules.pop("mavis_logits.integrations.vllm.processor", None)


@pytest.fixture(params=[LAYER, None], ids=["inner layer", "output"])
def head(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ValueHead:
    torch.manual_seed(0)
    config = ValueHeadConfig(D, D, V, 16, objectives=["kind", "short"], layer=request.param, settings={"top_k": 10})
    head = ValueHead(config).eval()
    nn.init.normal_(head.out.weight)
    head.save_pretrained(tmp_path / "head")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "head"))
    offer_of.cache_clear()
    return head


class Model(nn.Module):
    """As vLLM's: it hands out its layers when it is asked to, beside what a drafter reads."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self.model.aux_hidden_state_layers = ()
        self.lm_head = nn.Linear(D, V, bias=False)
        nn.init.normal_(self.lm_head.weight)

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        self.model.aux_hidden_state_layers = layers


class State(NamedTuple):
    input_batch: Any
    hidden_states: Tensor
    aux_hidden_states: list[Tensor] | None


@dataclass
class Batch:
    """Requests in the order of this step: each has some tokens, the last `rows` of which lead to logits."""

    slots: list[int]
    tokens: list[int]
    rows: list[int]

    def __post_init__(self) -> None:
        ends = np.cumsum(self.tokens)
        places = [end - rows + i for end, rows in zip(ends, self.rows, strict=True) for i in range(rows)]
        self.logits_indices = torch.tensor(places)
        of = [slot for slot, rows in zip(self.slots, self.rows, strict=True) for _ in range(rows)]
        self.expanded_idx_mapping = torch.tensor(of, dtype=torch.int32)
        starts = [7 * slot for slot in self.slots]  # how far each text had come
        self.positions = torch.cat([torch.arange(n) + s for n, s in zip(self.tokens, starts, strict=True)])
        self.idx_mapping_np = np.array(self.slots)


def dropped(batch: Batch) -> int | None:
    """The first row that is a draft's; every request keeps its last one."""
    drafts = [i for i, rows in enumerate(batch.rows) if rows > 1]
    return sum(batch.rows[: drafts[0]]) if drafts else None


def configuration() -> SimpleNamespace:
    return SimpleNamespace(
        additional_config={},
        parallel_config=SimpleNamespace(tensor_parallel_size=1, prefill_context_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=SLOTS),
        lora_config=None,
        model_config=SimpleNamespace(
            get_hidden_size=lambda: D, get_vocab_size=lambda: V, hf_config=SimpleNamespace(eos_token_id=EOS),
            try_get_generation_config=dict, model="org/served",
        ),
    )  # fmt: skip


class Runner:
    """A model runner that samples in one of the ways of vLLM's."""

    is_last_pp_rank, use_pp = True, False

    def __init__(self, sampling: str = "whole", drafter_layers: tuple[int, ...] = ()) -> None:
        self.vllm_config, self.model, self.sampling = configuration(), Model(), sampling
        self.use_aux_hidden_state_outputs = bool(drafter_layers)
        self.model.set_aux_hidden_state_layers(drafter_layers)
        self.execute_model_state: State | None = None
        self.seen_by_drafter: Any = None

    def load_v2(self, processor_class: type) -> Any:
        req_states = SimpleNamespace(max_num_reqs=SLOTS, device=torch.device("cpu"))
        self.processor = processor_class(self.vllm_config, req_states)
        return self.processor

    def execute_model(self, batch: Batch) -> None:
        total = sum(batch.tokens)
        self.hidden = {layer: torch.randn(total, D) for layer in (None, 1, 2, 3)}
        aux = [self.hidden[layer] for layer in self.model.model.aux_hidden_state_layers]
        self.execute_model_state = State(batch, self.hidden[None], aux if self.use_aux_hidden_state_outputs else None)

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits before and after, [rows, V] in the order of the batch."""
        self.execute_model(batch)
        state = self.execute_model_state
        assert state is not None
        self.seen_by_drafter = state.aux_hidden_states
        logits = 3 * torch.randn(len(batch.logits_indices), V)
        logits[torch.rand_like(logits) < 0.2] = -torch.inf
        self.logits = logits.clone()
        return logits, self.sample(state.hidden_states, batch, None)

    def sample(self, hidden_states: Tensor, batch: Batch, grammar: Any) -> Tensor:
        positions, rows = batch.positions[batch.logits_indices], torch.arange(len(self.logits))
        parts = [(rows, list(batch.slots))]
        if self.sampling == "chunks":  # verification in several calls, of whole requests
            ends = np.cumsum([0, *batch.rows])
            halves = (range(len(batch.slots) // 2), range(len(batch.slots) // 2, len(batch.slots)))
            parts = [(rows[ends[h[0]] : ends[h[-1] + 1]], [batch.slots[i] for i in h]) for h in halves if len(h)]
        if self.sampling == "shards":  # this rank samples the requests in odd slots, the other those in even ones
            odd = batch.expanded_idx_mapping % 2 == 1
            parts = [
                (rows[odd], [s for s in batch.slots if s % 2]),
                (rows[~odd], [s for s in batch.slots if not s % 2]),
            ]
        if self.sampling == "compaction":  # one draft is not verified
            place = dropped(batch)
            parts = [(rows if place is None else rows[rows != place], list(batch.slots))]
        for own, slots in parts:
            ctx = SimpleNamespace(
                idx_mapping_np=np.array(slots, dtype=int), pos=positions[own],
                expanded_idx_mapping=batch.expanded_idx_mapping if len(own) == len(rows) and self.sampling == "whole"
                else batch.expanded_idx_mapping[own],
            )  # fmt: skip
            if len(own):
                self.logits[own] = self.processor.apply(self.logits[own], ctx)
        return self.logits


def params(temperature: float = 1.0, **arguments: Any) -> SimpleNamespace:
    extra_args = {f"mavis_{key}": value for key, value in arguments.items()}
    return SimpleNamespace(extra_args=extra_args, temperature=temperature)


ASKED: dict[int, Any] = {
    0: params(weights="kind=1"),
    1: params(),
    2: params(weights="short=1", beta=2.0),
    3: params(weights="kind=0.4,short=0.6", top_k=20, normalize="none"),
    5: params(kl_budget=0.3),
    6: params(),
}


def expected(runner: Runner, head: ValueHead, batch: Batch, logits: Tensor, asked: dict[int, Any]) -> Tensor:
    """The slow twin: row by row, from the state of the row's own token."""
    functions = ValueFunctions(head.bind_embedding(runner.model.lm_head.weight.detach()))
    offer = Offer.of(Serving.find())
    rows = []
    for row, (token, slot) in enumerate(zip(batch.logits_indices, batch.expanded_idx_mapping.tolist(), strict=True)):
        own = Asked.read(asked[slot].extra_args, offer)
        if own is None:
            rows.append(logits[row])
            continue
        nat = functions.log_prob_weights(own.config.reference_temperature * (asked[slot].temperature or 1.0))
        policy = offer.policy(own.config, own.weights, torch.tensor(own.beta), nat)
        states = {head.config.layer: runner.hidden[head.config.layer][token][None]}
        busy = [False] * len(offer.objectives)
        step = policy.step(
            logits[row][None],
            lambda choice, _, s=states, c=own.config, b=busy: head_values(functions, s, Wanted(None, choice, c, b)),
        )
        rows.append(step.log_probs(V)[0])
    return torch.stack(rows)


BATCHES = [
    Batch([0, 1, 2, 3, 5, 6], [1] * 6, [1] * 6),
    Batch([6, 2, 0, 5, 3, 1], [1, 1, 9, 1, 1, 1], [1] * 6),  # reordered; the third is still reading its prompt
    Batch([3, 1, 0, 6], [4, 3, 1, 4], [4, 3, 1, 4]),  # drafts
    Batch([2, 5], [2, 2], [1, 2]),
    Batch([1, 6], [1, 1], [1, 1]),
]


@pytest.mark.parametrize("sampling", ["whole", "copied", "chunks", "shards", "compaction"])
def test_each_row_gets_the_state_of_its_own_token(processor_class: type, head: ValueHead, sampling: str) -> None:
    torch.manual_seed(1)
    runner = Runner(sampling)
    processor = runner.load_v2(processor_class)
    for slot, own in ASKED.items():
        assert processor.add_request(slot, own) is bool(own.extra_args)
    for batch in BATCHES:
        logits, found = runner.step(batch)
        wanted = expected(runner, head, batch, logits, ASKED)
        if sampling == "compaction" and (place := dropped(batch)) is not None:
            wanted[place] = logits[place]
        assert torch.allclose(found, wanted, atol=1e-5)
        for row, slot in enumerate(batch.expanded_idx_mapping.tolist()):
            if not ASKED[slot].extra_args:
                assert torch.equal(found[row], logits[row])
        assert torch.isneginf(found[torch.isneginf(logits)]).all()


def test_a_slot_is_used_again(processor_class: type, head: ValueHead) -> None:
    runner = Runner()
    processor = runner.load_v2(processor_class)
    batch = Batch([4], [1], [1])
    for own in (params(weights="kind=1"), params(), params(weights="short=1", top_k=3)):
        processor.add_request(4, own)
        logits, found = runner.step(batch)
        assert torch.allclose(found, expected(runner, head, batch, logits, {4: own}), atol=1e-5)


def test_what_log_pi_ref_counts_for_follows_the_temperature_of_each_request(
    processor_class: type, head: ValueHead, tmp_path: Path
) -> None:
    head.config.log_prob_weight = {"0.5": [0.0, 0.3], "1": [0.9, -0.4]}
    head.save_pretrained(tmp_path / "head")
    offer_of.cache_clear()
    runner = Runner()
    processor = runner.load_v2(processor_class)
    asked = {
        slot: params(temperature, weights="kind=1,short=1") for slot, temperature in enumerate((1.0, 0.5, 0.75, 0.0))
    }
    for slot, own in asked.items():
        processor.add_request(slot, own)
    batch = Batch([2, 0, 3, 1], [1] * 4, [1] * 4)
    logits, found = runner.step(batch)
    assert torch.allclose(found, expected(runner, head, batch, logits, asked), atol=1e-5)
    warm = {slot: params(1.0, weights="kind=1,short=1") for slot in asked}
    alike = torch.isclose(found, expected(runner, head, batch, logits, warm), atol=1e-5).all(dim=1)
    assert alike.tolist() == [False, True, True, False]  # greedy, as at 1


def test_a_drafter_sees_the_states_it_would_see_without_us(processor_class: type, head: ValueHead) -> None:
    batch = BATCHES[0]
    for drafter_layers in ((), (1, 3), (2, 3)):
        runner = Runner(drafter_layers=drafter_layers)
        runner.load_v2(processor_class)
        runner.step(batch)
        wanted = [runner.hidden[layer] for layer in drafter_layers]
        assert (runner.seen_by_drafter is None) == (not wanted)
        for found, own in zip(runner.seen_by_drafter or [], wanted, strict=True):
            assert found is own


def test_a_row_that_is_not_of_this_step_is_noticed() -> None:
    batch = BatchStates({None: torch.randn(3, D)}, torch.arange(3), torch.tensor([0, 1, 2]), torch.tensor([4, 4, 4]))
    found = batch.of(torch.tensor([1, 1, 9]), torch.tensor([4, 5, 4]), {None})[None]
    assert torch.equal(found[0], batch.hidden[None][1])
    assert found[1:].isnan().all()


def test_rows_without_states_are_never_steered_by_old_ones(processor_class: type, head: ValueHead) -> None:
    runner = Runner()
    processor = runner.load_v2(processor_class)
    processor.add_request(0, params(weights="kind=1"))
    runner.step(Batch([0], [1], [1]))
    ctx = SimpleNamespace(
        idx_mapping_np=np.array([0]), expanded_idx_mapping=torch.tensor([0]), pos=torch.tensor([0])
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="no states of the model were seen"):
        processor.apply(torch.randn(1, V), ctx)


def test_a_bad_request_is_refused_at_admission_and_never_ends_the_engine(
    processor_class: type, head: ValueHead, caplog: pytest.LogCaptureFixture
) -> None:
    runner = Runner()
    frontend = SimpleNamespace(vllm_config=runner.vllm_config)

    def admit(self: Any, own: Any) -> None:
        processor_class.validate_params(own)  # type: ignore[attr-defined]

    admit(frontend, params())
    admit(frontend, SimpleNamespace(extra_args=None))
    admit(frontend, params(weights="kind=1"))
    with pytest.raises(ValueError, match="did you mean 'kind'"):
        admit(frontend, params(weights="kid=1"))
    processor = runner.load_v2(processor_class)
    assert processor.add_request(0, params(weights="kid=1"))  # as if nobody had looked
    processor.add_request(1, params())
    logits, found = runner.step(Batch([0, 1], [1, 1], [1, 1]))
    if torch.isfinite(logits[0, EOS]):
        assert torch.isfinite(found[0]).nonzero().flatten().tolist() == [EOS]
    assert torch.equal(found[1], logits[1])


def test_the_engines_own_settings_come_before_the_environments(processor_class: type, head: ValueHead) -> None:
    runner = Runner()
    runner.vllm_config.additional_config["mavis"] = {"values": Serving.find().values, "max_top_k": 12}
    frontend = SimpleNamespace(vllm_config=runner.vllm_config)

    def admit(self: Any, own: Any) -> None:
        processor_class.validate_params(own)  # type: ignore[attr-defined]

    admit(frontend, params(top_k=12))
    with pytest.raises(ValueError, match="at most 12"):
        admit(frontend, params(top_k=13))


def test_what_does_not_fit_is_refused_at_start(processor_class: type, head: ValueHead) -> None:
    runner = Runner()
    runner.vllm_config.model_config.get_hidden_size = lambda: 2 * D
    with pytest.raises(ValueError, match="states of width 8 and 97 tokens, but the served model has 16 and 97"):
        runner.load_v2(processor_class)
    runner = Runner()
    runner.model.lm_head = nn.Module()
    with pytest.raises(ValueError, match="no output embedding"):
        runner.load_v2(processor_class)
    runner = Runner()
    runner.vllm_config.parallel_config.prefill_context_parallel_size = 2
    with pytest.raises(ValueError, match="prefill context parallelism"):
        runner.load_v2(processor_class)
    if head.config.layer is None:
        return
    runner = Runner()
    del runner.model.model.aux_hidden_state_layers
    with pytest.raises(ValueError, match="does not hand out the states of its layers"):
        runner.load_v2(processor_class)
    runner = Runner()
    runner.use_pp = True  # type: ignore[misc]
    with pytest.raises(ValueError, match="pipeline parallelism"):
        runner.load_v2(processor_class)


def test_another_way_of_making_processors_is_refused(processor_class: type, head: ValueHead) -> None:
    with pytest.raises((RuntimeError, AttributeError), match=r"in another way|__version__"):
        processor_class(configuration(), SimpleNamespace(max_num_reqs=1, device=torch.device("cpu")))


class RunnerV1(Runner):
    """As the V1 runner: a row for every request of the batch, in its order; the processor comes before the model."""

    def __init__(self, processor_class: type) -> None:
        super().__init__()
        self.processor = processor_class(self.vllm_config, torch.device("cpu"), False)
        self.load_model()

    def load_model(self) -> None:
        """Nothing to load."""

    def _prepare_inputs(self, batch: Batch) -> tuple[Tensor, None, int]:
        return batch.logits_indices, None, 1

    def execute_model(self, batch: Batch) -> None:
        self._prepare_inputs(batch)
        super().execute_model(batch)

    def sample(self, hidden_states: Tensor, batch: Batch, grammar: Any) -> Tensor:
        return self.processor.apply(self.logits)


def update(size: int, removed: Any = (), added: Any = (), moved: Any = ()) -> SimpleNamespace:
    moves = [(a, b, SimpleNamespace(name=name)) for a, b, name in moved]
    return SimpleNamespace(batch_size=size, removed=removed, added=[(i, p, [5], []) for i, p in added], moved=moves)


def test_the_v1_runner_too(processor_class: type, head: ValueHead) -> None:
    runner = RunnerV1(processor_class)
    processor = runner.processor
    in_batch: dict[int, Any] = {}

    def check() -> None:
        batch = Batch(list(range(len(in_batch))), [1 + i % 2 for i in range(len(in_batch))], [1] * len(in_batch))
        logits, found = runner.step(batch)
        assert torch.allclose(found, expected(runner, head, batch, logits, in_batch), atol=1e-5)
        assert runner.execute_model_state.aux_hidden_states is None  # type: ignore[union-attr]

    in_batch.update({0: ASKED[0], 1: ASKED[1], 2: ASKED[2], 3: ASKED[3]})
    processor.update_state(update(4, added=list(in_batch.items())))
    check()
    processor.update_state(None)
    check()
    # The second leaves, and the last takes its place; then two change places; then one leaves and another comes.
    processor.update_state(update(3, removed=[1], moved=[(3, 1, "UNIDIRECTIONAL")]))
    in_batch[1] = in_batch.pop(3)
    check()
    processor.update_state(update(3, moved=[(0, 2, "SWAP")]))
    in_batch[0], in_batch[2] = in_batch[2], in_batch[0]
    check()
    processor.update_state(update(3, removed=[0], added=[(0, ASKED[5])]))
    in_batch[0] = ASKED[5]
    check()


def test_bad_weights_are_told_apart(processor_class: type, head: ValueHead, tmp_path: Path) -> None:
    from mavis_logits.backbone.fingerprint import Identity
    from mavis_logits.integrations.vllm.binding import bind, weights
    from tiny import make_base

    base = make_base()
    own = dict(weights(base))
    assert "layers.0.self_attn.q_proj.weight" in own
    torch.manual_seed(0)
    config = ValueHeadConfig(32, 32, V, 16, objectives=["kind"], base_sketch=Identity(base).sketch)
    fitting = ValueHead(config)
    functions = ValueFunctions(fitting)
    bind(functions, base, check_weights=True)
    assert fitting.is_bound
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"other weights .*down_proj"):
        bind(functions, base, check_weights=True)
    bind(functions, base, check_weights=False)


def test_packed_projections_are_taken_apart() -> None:
    from mavis_logits.integrations.vllm.binding import weights
    from tiny import make_base

    plain = make_base()
    packed = make_base()
    for layer in packed.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        attention.qkv_proj = nn.Linear(32, sum(map(len, parts)), bias=False)
        attention.qkv_proj.weight = nn.Parameter(torch.cat(parts))
        attention.qkv_proj.output_sizes = [len(part) for part in parts]
        mlp.gate_up_proj = nn.Linear(32, 96, bias=False)
        mlp.gate_up_proj.weight = nn.Parameter(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        mlp.gate_up_proj.output_sizes = [48, 48]
        for module, names in ((attention, ("q_proj", "k_proj", "v_proj")), (mlp, ("gate_proj", "up_proj"))):
            for name in names:
                delattr(module, name)
    found, wanted = dict(weights(packed)), dict(weights(plain))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_text_before_a_row_is_what_is_committed_and_the_drafts_up_to_it(processor_class: type) -> None:
    from mavis_logits.integrations.vllm.processor import _ForV2

    committed = torch.tensor([[5, 6, 7, 0, 0, 9, 9], [8, 8, 8, 8, 0, 0, 0]])  # slots 0 and 1; behind them old texts
    own = SimpleNamespace(_req_states=SimpleNamespace(all_token_ids=SimpleNamespace(gpu=committed)))
    ctx = SimpleNamespace(
        expanded_idx_mapping=torch.tensor([1, 0, 0, 0], dtype=torch.int32),
        pos=torch.tensor([3, 2, 3, 4]),
        input_ids=torch.tensor([8, 7, 20, -1]),  # a committed token, and two drafts, one of them none
    )
    texts = _ForV2._texts_of(own, ctx, [0, 1, 2, 3])  # type: ignore[arg-type]
    assert [text.tolist() for text in texts] == [[8, 8, 8, 8], [5, 6, 7], [5, 6, 7, 20], [5, 6, 7, 20, 0]]
    assert [text.tolist() for text in _ForV2._texts_of(own, ctx, [2])] == [[5, 6, 7, 20]]  # type: ignore[arg-type]
