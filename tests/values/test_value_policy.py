"""Tuned policies as value functions: against reading everything from scratch, and what they share with the base."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, PeftModel, get_peft_model

from chat_model import chat_model, save_random_adapter
from hub_server import HubServer
from mavis_logits import MavisConfig, MavisLogitsProcessor, MavisSampling, ValuePolicy, ValuePolicyConfig
from mavis_logits.core.chat import chat_inputs
from mavis_logits.hub.make_bundle import make_bundle
from mavis_logits.hub.publish import push_folder
from mavis_logits.testing import recompute_all
from mavis_logits.values.value_head import ValueHead
from tiny_models import tiny_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two adapters of the chat model, the first with a config of a tuned policy."""
    folder = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate("ab"):
        save_random_adapter(folder / name, seed)
    ValuePolicyConfig.of(chat_model()[0], "a").save_pretrained(folder / "a")
    return folder


def policies(place: Path, model) -> dict[str, ValuePolicy]:
    return {
        "a": ValuePolicy.from_pretrained(place / "a", model),
        "b": ValuePolicy.from_adapter(place / "b", "b", model),
    }


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "top_k": 0},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    ],
)
def test_values_are_those_of_reading_everything_from_scratch(place, how) -> None:
    model, tokenizer = chat_model()
    torch.manual_seed(0)
    head = ValueHead.for_model(model, ["h"], width=8)
    torch.nn.init.normal_(head.out.weight)
    functions = policies(place, model) | {"h": head}
    mavis = MavisLogitsProcessor(
        functions, {"a": 0.5, "b": 0.3, "h": 0.2}, model=model, tokenizer=tokenizer, trace=True, beta=2.0, top_k=12
    )
    seen = []

    def keep(input_ids, scores):
        seen.append(input_ids.clone())
        return mavis(input_ids, scores)

    batch = chat_inputs(tokenizer, ["w3 w4", "w7 w8 w9 w10", "w11"])
    torch.manual_seed(0)
    model.generate(**batch, logits_processor=[keep], max_new_tokens=9, pad_token_id=tokenizer.pad_token_id, **how)
    compared = 0
    for ids, step in zip(seen, mavis.trace, strict=True):
        for row in torch.nonzero(step.live)[:, 0].tolist():
            text = ids[row][(ids[row] != tokenizer.pad_token_id).nonzero()[0, 0] :].tolist()
            expected = recompute_all(mavis.functions, model, text, step.candidates[row])
            torch.testing.assert_close(step.values[row], expected, atol=1e-3, rtol=1e-3)
            compared += 1
    assert compared > 12


def test_beta_1_is_the_tuned_model_itself(place) -> None:
    model, tokenizer = chat_model()
    tuned = PeftModel.from_pretrained(chat_model()[0], place / "a").eval()
    mavis = MavisLogitsProcessor(
        ValuePolicy.from_pretrained(place / "a", model), model=model, tokenizer=tokenizer, beta=1.0, top_k=None,
        normalize="none",
    )  # fmt: skip
    batch = chat_inputs(tokenizer, ["w3 w4", "w7 w8 w9 w10"])
    shared = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    expected = tuned.generate(**batch, **shared)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**batch, **shared, logits_processor=[mavis]), expected)


@pytest.mark.parametrize("how", [{"normalize": "none", "beta": 1.0}, {"normalize": "standard", "beta": 2.5}])
def test_at_a_strength_it_is_the_model_with_that_much_of_the_adapter(place, tmp_path, how) -> None:
    model, tokenizer = chat_model()
    shutil.copytree(place / "a", tmp_path / "more")
    adapter = json.loads((tmp_path / "more/adapter_config.json").read_text())
    adapter["lora_alpha"] *= 2.5
    (tmp_path / "more/adapter_config.json").write_text(json.dumps(adapter))
    tuned = PeftModel.from_pretrained(chat_model()[0], tmp_path / "more").eval()
    shutil.copytree(place / "a", tmp_path / "read")
    ValuePolicyConfig.of(model, "a", strength=2.5).save_pretrained(tmp_path / "read")
    batch = chat_inputs(tokenizer, ["w3 w4", "w7 w8 w9 w10"])
    shared = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    expected = tuned.generate(**batch, **shared)
    assert not torch.equal(expected, model.generate(**batch, **shared))
    for policy in (
        ValuePolicy.from_pretrained(tmp_path / "read", model),
        ValuePolicy.from_adapter(place / "a", "a", model, strength=2.5),
    ):
        mavis = MavisLogitsProcessor(policy, model=model, tokenizer=tokenizer, top_k=None, **how)
        assert torch.equal(model.generate(**batch, **shared, logits_processor=[mavis]), expected)


def test_a_strength_is_for_low_rank_adapters_and_positive(place, tmp_path) -> None:
    model, _ = chat_model()
    kind = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(chat_model()[0], kind).save_pretrained(tmp_path)
    ValuePolicy.from_adapter(tmp_path, "a", model)
    with pytest.raises(ValueError, match="has no strength"):
        ValuePolicy.from_adapter(tmp_path, "a", model, strength=2.0)
    for wrong in (0.0, -1.0, float("nan"), float("inf"), "4", True, None):
        with pytest.raises(ValueError, match="strength must be a positive number"):
            ValuePolicy.from_adapter(place / "a", "a", model, strength=wrong)


def test_a_strategy_decodes_the_same(place) -> None:
    model, tokenizer = chat_model()
    batch = chat_inputs(tokenizer, ["w3 w4", "w7 w8 w9 w10", "w11"])
    shared = {"beta": 2.0, "top_k": 12, "model": model, "tokenizer": tokenizer}
    processor = MavisLogitsProcessor(policies(place, model), **shared)
    strategy = MavisSampling(policies(place, model), **shared)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    expected = model.generate(**batch, **greedy, logits_processor=[processor])
    assert torch.equal(model.generate(**batch, **greedy, custom_generate=strategy), expected)


def test_the_base_model_stays_as_it_is_and_shares_its_layers(place) -> None:
    model, _ = chat_model()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = [(p.clone(), p.requires_grad) for p in model.parameters()]
    names = [name for name, _ in model.named_modules()]
    policy = ValuePolicy.from_pretrained(place / "a", model)
    assert [name for name, _ in model.named_modules()] == names
    for parameter, (old, mode) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.requires_grad is mode
    own = {p.data_ptr() for p in policy.backbone.parameters()}
    assert {p.data_ptr() for p in model.parameters()} <= own
    new = sum(p.numel() for name, p in policy.backbone.named_parameters() if "lora" in name)
    assert new < sum(p.numel() for p in model.parameters())


def test_they_are_loaded_by_name_and_recommend_their_settings(place) -> None:
    model, tokenizer = chat_model()
    mavis = MavisLogitsProcessor.from_pretrained(str(place / "a"), model=model, tokenizer=tokenizer)
    assert mavis.objectives == ["a"]
    assert (float(mavis.beta), mavis.config.top_k, mavis.config.unscored) == (3.0, 200, "expected")
    with pytest.raises(ValueError, match="pass model="):
        MavisLogitsProcessor.from_pretrained(str(place / "a"))


def test_copies_and_pickles_steer_the_same(place) -> None:
    model, tokenizer = chat_model()
    mavis = MavisLogitsProcessor(policies(place, model), model=model, tokenizer=tokenizer, beta=2.0, top_k=12)
    batch = chat_inputs(tokenizer, ["w3 w4"])
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    expected = model.generate(**batch, **greedy, logits_processor=[mavis])
    twin = copy.deepcopy(mavis)
    assert torch.equal(model.generate(**batch, **greedy, logits_processor=[twin]), expected)
    again = pickle.loads(pickle.dumps(mavis)).attach(model)
    assert torch.equal(model.generate(**batch, **greedy, logits_processor=[again]), expected)


def test_what_does_not_fit_is_refused(place, tmp_path) -> None:
    model, _ = chat_model()
    other = chat_model()[0]
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(ValueError, match="was tuned on"):
        ValuePolicy.from_pretrained(place / "a", other)
    with pytest.raises(OSError, match="takes a bare adapter"):
        ValuePolicy.from_pretrained(place / "b", model)
    with pytest.raises(OSError, match=r"no adapter_config\.json"):
        ValuePolicy.from_adapter(tmp_path, "a", model)
    with pytest.raises(ValueError, match="for one objective"):
        ValuePolicyConfig(objectives=["a", "b"])
    policy = ValuePolicy.from_pretrained(place / "a", model)
    with pytest.raises(ValueError, match="has scores for"):
        policy.bind(tiny_llama(vocab_size=2 * model.config.vocab_size))


# ---- on the Hub ----


def test_a_policy_comes_back_from_the_hub_alone_and_in_a_bundle(place, hub: HubServer, tmp_path: Path) -> None:
    shutil.copytree(place / "a", tmp_path / "a", ignore=shutil.ignore_patterns("README.md"))  # PEFT's says nothing
    push_folder(tmp_path / "a", "org/policy")
    assert set(hub.files("org/policy")) >= {"config.json", "adapter_config.json", "adapter_model.safetensors"}
    card = ModelCard(hub.files("org/policy")["README.md"].decode())
    assert {"mavis", "value-policy"} <= set(card.data.tags or [])
    assert "It is an adapter that was tuned for one objective" in card.text
    assert "Not measured" in card.text
    model, tokenizer = chat_model()
    head = ValueHead.for_model(model, ["h"], width=8)
    torch.nn.init.normal_(head.out.weight)
    head.save_pretrained(tmp_path / "head")
    make_bundle(tmp_path / "both", [str(tmp_path / "a"), str(tmp_path / "head")], MavisConfig(beta=2.0, top_k=12))
    push_folder(tmp_path / "both", "org/both")

    def written(functions, **weights) -> list[int]:
        mavis = (
            MavisLogitsProcessor.from_pretrained(functions, weights, model=model, tokenizer=tokenizer, beta=2.0)
            if isinstance(functions, str)
            else MavisLogitsProcessor(functions, weights, model=model, tokenizer=tokenizer, beta=2.0)
        )
        batch = chat_inputs(tokenizer, ["w3 w4"])
        return model.generate(**batch, logits_processor=[mavis], max_new_tokens=12)[0].tolist()

    own = ValuePolicy.from_pretrained(place / "a", model)
    assert written("org/policy", a=1.0) == written({"a": own}, a=1.0)
    assert written("org/both", a=0.5, h=0.5) == written({"a": own, "h": head}, a=0.5, h=0.5)


def test_a_policy_on_a_folder_or_without_its_adapter_is_not_published(place, hub: HubServer, tmp_path: Path) -> None:
    shutil.copytree(place / "a", tmp_path / "local")
    config = json.loads((tmp_path / "local" / "config.json").read_text())
    (tmp_path / "local" / "config.json").write_text(json.dumps(config | {"base_model": str(tmp_path)}))
    with pytest.raises(ValueError, match="a folder that nobody else has"):
        push_folder(tmp_path / "local", "org/policy")
    (tmp_path / "local" / "config.json").write_text(json.dumps(config))
    (tmp_path / "local" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        push_folder(tmp_path / "local", "org/policy")
    assert not hub.repositories
