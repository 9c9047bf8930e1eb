"""`generate(custom_generate="org/bundle", trust_remote_code=True)`: a bundle that brings its strategy along."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TextIteratorStreamer, pipeline

from chat_model import chat_model
from hub_server import HubServer
from mavis_logits import MavisConfig, MavisLogitsProcessor, ValueHead, ValueModel
from mavis_logits.hub.make_bundle import make_bundle
from mavis_logits.hub.publish import push_folder
from mavis_logits.plugs import custom_generate as remote

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def chat() -> Any:
    return chat_model()


@pytest.fixture
def bundle(hub: HubServer, chat: Any, tmp_path: Path) -> str:
    """A value model for `a` and a value head for `b`, published with code as `org/steering-bundle.v1`."""
    model = chat[0]
    torch.manual_seed(1)
    function = ValueModel.from_backbone(model, ["a"])
    with torch.no_grad():
        function.head.weight.normal_()
    function.save_pretrained(tmp_path / "value")
    ValueHead.for_model(model, ["b"], width=8).save_pretrained(tmp_path / "head")
    config = MavisConfig(weights={"a": 1.0}, beta=20.0)
    folder = make_bundle(tmp_path / "bundle", [str(tmp_path / "value"), str(tmp_path / "head")], config)
    push_folder(folder, "org/steering-bundle.v1", custom_generate=True)
    hub.requests.clear()
    return "org/steering-bundle.v1"


def by_processor(model: PreTrainedModel, bundle: str, *settings: Any, **more: Any) -> torch.Tensor:
    """What the same bundle gives as a logits processor."""
    with MavisLogitsProcessor.from_pretrained(bundle, *settings, model=model, **more) as mavis:
        return model.generate(IDS, **GREEDY, logits_processor=[mavis])  # type: ignore[operator]


def test_it_steers_as_the_bundle_does(chat: Any, bundle: str) -> None:
    model = chat[0]
    results = []
    for mavis, settings, more in (
        ({}, (), {}),
        ({"mavis_weights": {"b": 1.0}, "mavis_beta": 30.0}, ({"b": 1.0}, 30.0), {}),
        ({"mavis_top_k": 2, "mavis_normalize": "center"}, (), {"top_k": 2, "normalize": "center"}),
        ({}, (), {}),
    ):
        found = model.generate(IDS, **GREEDY, custom_generate=bundle, trust_remote_code=True, **mavis)
        assert torch.equal(found, by_processor(model, bundle, *settings, **more))
        results.append(found.tolist())
    assert results[0] == results[3] != results[1]


def test_weights_of_each_request_and_generates_own_arguments(chat: Any, bundle: str) -> None:
    model = chat[0]
    arguments = {"custom_generate": bundle, "trust_remote_code": True}
    each = model.generate(IDS, **GREEDY, **arguments, mavis_weights=[[1.0, 0.0], [0.0, 1.0]])
    assert torch.equal(each[0], model.generate(IDS, **GREEDY, **arguments)[0])
    assert torch.equal(each[1], model.generate(IDS, **GREEDY, **arguments, mavis_weights={"b": 1.0})[1])
    output = model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=4,
        return_dict_in_generate=True,
        **arguments,
    )
    assert output.sequences.shape[0] == 6


def test_the_value_functions_are_loaded_once(hub: HubServer, chat: Any, bundle: str) -> None:
    model = chat[0]
    for weights in ({"a": 1.0}, {"b": 1.0}, None):
        model.generate(IDS, **GREEDY, custom_generate=bundle, trust_remote_code=True, mavis_weights=weights)
    downloads = [route for method, route, _ in hub.requests if method == "GET" and route.startswith("/cdn/")]
    assert len(downloads) == 2
    assert len(remote._strategies[model]) == 1


def test_a_streamer_is_passed_on(chat: Any, bundle: str) -> None:
    model, tokenizer = chat
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5)
    ids = model.generate(IDS[:1], **GREEDY, custom_generate=bundle, trust_remote_code=True, streamer=streamer)
    assert "".join(streamer).split() == tokenizer.decode(ids[0, 3:]).split()


def test_in_a_pipeline(chat: Any, bundle: str) -> None:
    model, tokenizer = chat
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    arguments = {"custom_generate": bundle, "trust_remote_code": True, **GREEDY}
    texts = {pipe("w5 w6", mavis_weights={o: 1.0}, **arguments)[0]["generated_text"] for o in "ab"}
    assert len(texts) == 2


def test_code_and_value_functions_come_from_one_commit(hub: HubServer, chat: Any, bundle: str, tmp_path: Path) -> None:
    model = chat[0]
    arguments = {"custom_generate": bundle, "trust_remote_code": True, **GREEDY}
    first = hub.repositories[bundle].refs["main"]
    before = model.generate(IDS, **arguments)
    torch.manual_seed(2)
    other = ValueModel.from_backbone(model, ["z"])
    with torch.no_grad():
        other.head.weight.normal_()
    other.save_pretrained(tmp_path / "other")
    push_folder(make_bundle(tmp_path / "next", [str(tmp_path / "other")]), bundle, custom_generate=True)
    assert torch.equal(model.generate(IDS, **arguments, revision=first), before)
    model.generate(IDS, **arguments, mavis_weights={"z": 1.0})
    with pytest.raises(ValueError, match="weights name the objective 'a'"):
        model.generate(IDS, **arguments, mavis_weights={"a": 1.0})


def test_a_private_bundle_and_the_cache(hub: HubServer, chat: Any, bundle: str, monkeypatch: Any) -> None:
    model = chat[0]
    hub.repositories[bundle].private = True
    monkeypatch.delenv("HF_TOKEN")
    arguments = {"custom_generate": bundle, "trust_remote_code": True, **GREEDY}
    expected = model.generate(IDS, **arguments, token="hf_writer")
    remote._strategies.clear()
    hub.close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(model.generate(IDS, **arguments), expected)


def test_code_is_not_run_without_leave_and_asks_for_the_package(hub: HubServer, chat: Any, bundle: str) -> None:
    model = chat[0]
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        model.generate(IDS, **GREEDY, custom_generate=bundle, trust_remote_code=False)
    files = hub.repositories[bundle].commits[hub.repositories[bundle].refs["main"]]
    code = files["custom_generate/generate.py"].content.decode()
    assert f'REPOSITORY = "{bundle}"' in code
    assert len(code.splitlines()) < 15
    assert files["custom_generate/requirements.txt"].content.startswith(b"mavis-logits>=")
    newer = type(files["custom_generate/requirements.txt"])(b"mavis-logits>=999.0\n", False)
    hub.repositories[bundle].commit("main", files | {"custom_generate/requirements.txt": newer})
    with pytest.raises(ImportError, match=r"mavis-logits>=999.0 \(installed: "):
        model.generate(IDS, **GREEDY, custom_generate=bundle, trust_remote_code=True)


def test_mistakes_are_told(chat: Any, bundle: str) -> None:
    model = chat[0]
    arguments = {"custom_generate": bundle, "trust_remote_code": True, **GREEDY}
    for mistake, message in (
        ({"mavis_weights": {"aa": 1.0}}, r"weights name the objective 'aa' \(did you mean 'a'\?\)"),
        ({"mavis_betta": 1.0}, "unknown setting 'betta'; did you mean 'beta'"),
        ({"mavis_top_k": 0}, "top_k must be"),
        ({"stop_strings": "w5"}, "stop_strings need the tokenizer: pass tokenizer= to generate"),
        ({"num_beams": 2}, r"num_beams=2 \(asks for generate's own beam search"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(IDS, **arguments, **mistake)
    with pytest.raises(OSError, match="org/nothing is no folder here"):
        model.generate(IDS, **arguments, mavis_bundle="org/nothing")


def test_another_bundle_may_be_named(chat: Any, bundle: str, tmp_path: Path) -> None:
    """For copies of the code: `mavis_bundle` also takes a folder."""
    model = chat[0]
    folder = make_bundle(tmp_path / "only-b", [str(tmp_path / "head")], MavisConfig(beta=30.0))
    arguments = {"custom_generate": bundle, "trust_remote_code": True, **GREEDY}
    found = model.generate(IDS, **arguments, mavis_bundle=folder)
    assert torch.equal(found, by_processor(model, str(folder)))


def test_code_does_not_outlive_the_bundle_that_brought_it(hub: HubServer, bundle: str, tmp_path: Path) -> None:
    push_folder(tmp_path / "head", bundle)
    files = hub.files(bundle)
    assert not [name for name in files if name.startswith("custom_generate/") or name == "mavis_bundle.json"]
    assert {name for name in files if name.endswith((".safetensors", "config.json"))} == {
        "config.json",
        "model.safetensors",
    }


def test_a_model_that_is_no_longer_used_is_freed(bundle: str) -> None:
    model = chat_model()[0]
    model.generate(IDS, **GREEDY, custom_generate=bundle, trust_remote_code=True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_code_goes_along_when_a_bundle_is_pushed_again(hub: HubServer, bundle: str, tmp_path: Path) -> None:
    for path, content in hub.files(bundle).items():
        (tmp_path / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / path).write_bytes(content)
    push_folder(tmp_path / "copy", "org/copy")
    assert b'REPOSITORY = "org/copy"' in hub.files("org/copy")["custom_generate/generate.py"]
    card = hub.files("org/copy")["README.md"].decode()
    assert 'custom_generate="org/copy"' in card
    assert bundle not in card
