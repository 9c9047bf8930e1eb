"""Rollouts by vLLM, against a double of the part of vLLM that is used, and against vLLM where it is installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

import collecting
from chat_model import chat_model
from collecting import config
from mavis_logits import MavisConfig, MavisLogitsProcessor, ValueHead
from mavis_training import collect as collect_module
from mavis_training.base.ranks import Ranks
from mavis_training.collect import collect
from mavis_training.sampling import rollout_vllm
from mavis_training.trees.tree_store import TreeStore
from tiny_models import tiny_llama


@dataclass
class SamplingParams:
    """vLLM's, as far as it is used; the defaults are vLLM's."""

    max_tokens: int | None = 16
    temperature: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    prompt_logprobs: int | None = None
    extra_args: dict | None = None


class LLM:
    """A double of vLLM's engine: samples request by request with the model in this process."""

    def __init__(self, model, dtype="auto", logprobs_mode="raw_logprobs", max_model_len=None, **arguments):
        steered = "logits_processors" in arguments
        assert logprobs_mode == ("processed_logprobs" if steered else "raw_logprobs")
        self.arguments = arguments
        self.longest = max_model_len
        self.model = chat_model()[0].to(getattr(torch, dtype))
        self.calls = []
        self.serving = dict(arguments["additional_config"]["mavis"]) if steered else {}

    @torch.no_grad()
    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        assert len(prompts) == len(sampling_params)
        self.calls.append(prompts)
        return [
            self._answer(prompt["prompt_token_ids"], own) for prompt, own in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, prompt, settings):
        assert len(prompt) + settings.max_tokens <= self.longest
        generator = torch.Generator().manual_seed(settings.seed)
        ids, logprobs = list(prompt), []
        processors, read = [], []
        if settings.extra_args:
            own = {key: value for key, value in self.serving.items() if key != "values"}
            own["reference_temperature"] = settings.extra_args["mavis_reference_temperature"]
            weights = own.pop("weights", None)
            mavis = MavisLogitsProcessor.from_pretrained(
                self.serving["values"], weights, model=self.model, config=MavisConfig(**own)
            )
            processors = [mavis]
        if settings.prompt_logprobs == 0:
            every = torch.log_softmax(self.model(torch.tensor([prompt])).logits[0].float(), dim=-1)
            read = [None] + [
                {token: SimpleNamespace(logprob=float(row[token]))}
                for token, row in zip(prompt[1:], every[:-1], strict=True)
            ]
        stops = set(settings.stop_token_ids or [])
        if not settings.ignore_eos:
            stops.add(self.model.config.eos_token_id)
        while len(ids) - len(prompt) < settings.max_tokens:
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            for processor in processors:
                logits = processor(torch.tensor([ids]), logits[None])[0]
            scores = torch.log_softmax(logits, dim=-1)
            token = int(torch.multinomial((scores / settings.temperature).softmax(-1), 1, generator=generator))
            ids.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(scores[token]), rank=1, decoded_token=None)})
            if token in stops:
                break
        completion = SimpleNamespace(
            token_ids=ids[len(prompt) :], logprobs=logprobs if settings.logprobs == 0 else None
        )
        return SimpleNamespace(outputs=[completion], prompt_logprobs=read)


@pytest.fixture
def vllm(monkeypatch):
    """The double in the place of vLLM."""
    module, inputs = ModuleType("vllm"), ModuleType("vllm.inputs")
    module.LLM, module.SamplingParams, module.__version__ = LLM, SamplingParams, "0"
    inputs.TokensPrompt = dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    collecting.write_inputs(folder)
    return folder


@torch.no_grad()
def check(store, model):
    """Every node's log-probabilities are those of the tokens under `model`, and the tree is one of Algorithm 3."""
    eos, new_tokens = model.config.eos_token_id, collecting.SHAPE["max_new_tokens"]
    for tree in store:
        assert (tree.logp_gen == tree.logp_ref).all()
        for leaf in tree.leaves():
            completion = tree.completion(leaf).tolist()
            assert eos not in completion[:-1]
            assert len(completion) == new_tokens or completion[-1] == eos
            assert tree.terminal[leaf]
            prompt = tree.prompt_tokens.tolist()
            scores = torch.log_softmax(model(torch.tensor([prompt + completion])).logits[0].float(), dim=-1)
            own = scores[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]
            start = 0
            for node in tree.path(leaf):
                span = slice(start, start := start + int(tree.length[node]))
                assert float(own[span].sum()) == pytest.approx(tree.logp_ref[node], abs=1e-3)


def test_trees_are_those_of_algorithm_3_with_the_models_own_log_probabilities(vllm, folder):
    store = collect(config(folder, "trees", backend="vllm"))
    assert len(store) == 9
    check(store, chat_model()[0])
    assert store.metadata.sampling["backend"] == "vllm"
    assert store.metadata.weights_fingerprint is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_steered_policy_is_sampled_with_both_log_probabilities(vllm, folder, temperature):
    """Those that the backend transformers finds for the same tokens."""
    model = chat_model()[0]
    torch.manual_seed(0)
    head = ValueHead.for_model(model, ["kind", "short"], width=16)
    torch.nn.init.normal_(head.out.weight)
    head.save_pretrained(folder / "head")
    settings = {"weights": {"kind": 1.0}, "beta": 2.0, "top_k": 6}
    policy = collect_module.PolicyConfig(str(folder / "head"), settings)
    store = collect(config(folder, f"steered {temperature}", backend="vllm", policy=policy, temperature=temperature))
    assert store.metadata.policy["settings"]["top_k"] == 6
    assert store.metadata.policy["value_functions"][0]["objectives"] == ["kind", "short"]
    reference, steered = [], []
    mavis = MavisLogitsProcessor(
        head, {"kind": 1.0}, 2.0, model=model, config=MavisConfig(top_k=6, reference_temperature=temperature)
    )
    for tree in store:
        for leaf in tree.leaves():
            ids = tree.prompt_tokens.tolist()
            for node in tree.path(leaf):
                sums = [0.0, 0.0]
                for token in tree.tokens[tree.start[node] : tree.start[node] + tree.length[node]].tolist():
                    with torch.no_grad():
                        logits = model(torch.tensor([ids])).logits[:, -1].float()
                        tilted = mavis(torch.tensor([ids]), logits)
                    for place, scores in enumerate((tilted, logits)):
                        sums[place] += float(torch.log_softmax(scores, dim=-1)[0, token])
                    ids.append(token)
                assert sums[0] == pytest.approx(tree.logp_gen[node], abs=1e-3)
                assert sums[1] == pytest.approx(tree.logp_ref[node], abs=1e-3)
                steered.append(sums[0])
                reference.append(sums[1])
    assert steered != reference


def test_a_policy_that_cannot_be_served_is_refused_before_an_engine_starts(vllm, folder):
    (folder / "policy").mkdir()
    (folder / "policy" / "config.json").write_text('{"model_type": "mavis_value_policy", "objectives": ["kind"]}')
    policy = collect_module.PolicyConfig(str(folder / "policy"))
    with pytest.raises(ValueError, match="cannot steer a server"):
        collect(config(folder, "refused", backend="vllm", policy=policy))


def test_a_rerun_samples_the_same_trees(vllm, folder):
    for name, limits in {"at-once": [None], "by-parts": [4, None]}.items():
        for limit in limits:
            collect(config(folder, name, backend="vllm", limit=limit))
    assert collecting.content(folder / "at-once") == collecting.content(folder / "by-parts")


def test_a_level_of_all_trees_is_one_call(vllm, folder):
    settings = config(folder, "calls", backend="vllm", prompts_per_shard=9)
    engine = rollout_vllm.load_engine(settings.model, "float32", 200, {})
    prompts = [[5, 6, 7], [8], [9, 10]]
    rows = [{"id": f"p{i}", "prompt": "text"} for i in range(3)]
    rollout_vllm.sample_trees(engine, rows, prompts, {1}, settings, 0)
    assert len(engine.calls) <= settings.layers
    assert [call["prompt_token_ids"] for call in engine.calls[0]] == [p for p in prompts for _ in range(3)]


def test_engine_arguments_are_handed_on_but_not_those_that_the_trees_depend_on(vllm):
    engine = rollout_vllm.load_engine("model", "float32", 64, {"gpu_memory_utilization": 0.5, "max_model_len": 99})
    assert engine.arguments["gpu_memory_utilization"] == 0.5
    assert engine.longest == 99
    with pytest.raises(ValueError, match="may not set dtype, logprobs_mode"):
        rollout_vllm.load_engine("model", "float32", 64, {"logprobs_mode": "raw_logits", "dtype": "half"})


def test_without_vllm_the_error_says_what_to_install(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"mavis-logits\[vllm\]"):
        collect(config(folder, "none", backend="vllm"))


def test_several_processes_are_refused(vllm, folder, monkeypatch):
    monkeypatch.setattr(collect_module, "join", lambda device: Ranks(1, 2, torch.device("cpu")))
    with pytest.raises(ValueError, match="runs in one process"):
        collect(config(folder, "two", backend="vllm"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_the_real_engine_agrees_with_transformers(folder):
    model, tokenizer = tiny_llama(hidden_size=64), chat_model()[1]  # heads of 32: vLLM has no smaller ones
    model.save_pretrained(folder / "wide")
    tokenizer.save_pretrained(folder / "wide")
    settings = {"model": str(folder / "wide"), "backend": "vllm", "vllm": {"enforce_eager": True}, "limit": 4}
    store = collect(config(folder, "real", **settings))
    assert len(TreeStore.open(folder / "real")) == 4
    check(store, model)
