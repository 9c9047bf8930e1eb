"""Loading over HTTP when something is wrong: nothing there, no permission, no line, damaged on the way."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from hub_server import HubServer, use_hub
from mavis_logits import MavisLogitsProcessor, ValueHead, ValueModel
from mavis_logits.hub.files import check_inside, find_file
from mavis_logits.integrations.serving import Serving
from test_push import assert_same, make_adapter
from tiny import make_base, make_head, make_value_model


@pytest.fixture
def value(hub: HubServer) -> ValueModel:
    """A value model, published as `org/value`."""
    model = make_value_model("a")
    model.push_to_hub("org/value")
    hub.requests.clear()
    return model


def cached(home: Path) -> list[Path]:
    """Weights that lie in the cache under the name of a file of the repository."""
    return [path for path in home.rglob("snapshots/*/*.safetensors") if path.exists()]


# ---- not there, or not for everybody ----


def test_an_unknown_repository_is_told(hub: HubServer) -> None:
    with pytest.raises(OSError, match=f"no such repository on {hub.url}, or it is private: check the name"):
        ValueModel.from_pretrained("org/nothing")
    with pytest.raises(OSError, match="org/nothing is no folder here, and there is no such repository"):
        MavisLogitsProcessor.from_pretrained("org/nothing")
    with pytest.raises(OSError, match="is no folder here, and no Hub id such as org/name"):
        ValueModel.from_pretrained("no/such/folder")


def test_an_unknown_revision_is_told(value: ValueModel) -> None:
    with pytest.raises(OSError, match="org/value has no revision 'v9': give a branch, a tag or a commit"):
        ValueModel.from_pretrained("org/value", revision="v9")


def test_a_repository_without_a_value_model_is_told(hub: HubServer) -> None:
    make_base().push_to_hub("org/base")
    with pytest.raises(ValueError, match=r"org/base is no value model \(found: llama\)"):
        ValueModel.from_pretrained("org/base")
    HfApi().create_repo("org/empty")
    with pytest.raises(ValueError, match=r"org/empty is no value model \(found: nothing with a config.json\)"):
        MavisLogitsProcessor.from_pretrained("org/empty")


def test_a_private_repository_needs_a_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make_value_model("a")
    model.push_to_hub("org/secret", private=True)
    use_hub(hub, monkeypatch, tmp_path / "stranger", token=None)
    for token in (None, "hf_other"):
        with pytest.raises(OSError, match=r"or it is private: .* log in \(hf auth login\) or pass token="):
            ValueModel.from_pretrained("org/secret", token=token)
    assert_same(ValueModel.from_pretrained("org/secret", token="hf_writer"), model)
    assert MavisLogitsProcessor.from_pretrained("org/secret", token="hf_writer").objectives == ["a"]


def test_the_token_goes_to_the_hub_and_not_to_where_it_sends_one(hub: HubServer, value: ValueModel) -> None:
    ValueModel.from_pretrained("org/value", token="hf_writer")
    with_token = {route.startswith("/cdn/"): token for _, route, token in hub.requests}
    assert with_token == {False: True, True: False}


def test_an_adapter_whose_base_is_missing_is_told(hub: HubServer) -> None:
    make_adapter("a").push_to_hub("org/value")
    message = (
        "org/value is an adapter on the first layers of org/base, which could not be loaded: pass the loaded model"
    )
    with pytest.raises(OSError, match=message):
        ValueModel.from_pretrained("org/value")
    assert_same(ValueModel.from_pretrained("org/value", backbone=make_base(), merge=False), make_adapter("a"))


def test_an_adapter_is_served_where_the_served_model_is_no_transformers_model(hub: HubServer) -> None:
    """As vLLM's is not: the layers come from the Hub."""
    make_adapter("a").push_to_hub("org/value")
    make_base().push_to_hub("org/base")
    functions = Serving.read("org/value").load(torch.nn.Linear(2, 2), torch.device("cpu"))
    ids = torch.tensor([[5, 6, 7, 8]])
    (served,) = functions.all
    assert isinstance(served, ValueModel)
    assert torch.allclose(served(ids).values, make_adapter("a")(ids).values, atol=1e-5)


def test_an_adapter_is_served_on_the_layers_of_the_folder_that_is_served(hub: HubServer, tmp_path: Path) -> None:
    """Its own base model cannot be reached by its name."""
    make_adapter("a").push_to_hub("org/value")
    make_base().save_pretrained(tmp_path / "served")
    make_base(seed=5).save_pretrained(tmp_path / "other")
    served, serving = torch.nn.Linear(2, 2), Serving.read("org/value")
    (found,) = serving.load(served, torch.device("cpu"), str(tmp_path / "served")).all
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(found(ids).values, make_adapter("a")(ids).values, atol=1e-5)
    for elsewhere in (None, "org/served", str(tmp_path / "other")):
        with pytest.raises(OSError, match="first layers of org/base, which could not be loaded"):
            serving.load(served, torch.device("cpu"), elsewhere)


# ---- the cache ----


def test_a_second_load_downloads_nothing(hub: HubServer, value: ValueModel) -> None:
    ValueModel.from_pretrained("org/value")
    assert any(method == "GET" and route.startswith("/cdn/") for method, route, _ in hub.requests)
    hub.requests.clear()
    assert_same(ValueModel.from_pretrained("org/value"), value)
    assert not [route for method, route, _ in hub.requests if method == "GET" and "/api/" not in route]


def test_offline_the_cache_serves_and_says_what_it_has_not(
    hub: HubServer, value: ValueModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ValueModel.from_pretrained("org/value")
    ValueModel.from_pretrained("org/value", cache_dir=tmp_path / "elsewhere")
    hub.close()
    assert_same(ValueModel.from_pretrained("org/value", local_files_only=True), value)
    assert_same(ValueModel.from_pretrained("org/value", local_files_only=True, cache_dir=tmp_path / "elsewhere"), value)
    assert MavisLogitsProcessor.from_pretrained("org/value", local_files_only=True).objectives == ["a"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same(ValueModel.from_pretrained("org/value"), value)
    for revision in ("v1", "0" * 40):
        with pytest.raises(OSError, match=f"revision '{revision}' is not in the cache"):
            ValueModel.from_pretrained("org/value", revision=revision)
    with pytest.raises(OSError, match="beyond which nothing is looked for offline: load it once with a connection"):
        ValueModel.from_pretrained("org/other")


def test_without_a_line_the_cache_serves(hub: HubServer, value: ValueModel) -> None:
    ValueModel.from_pretrained("org/value")
    hub.fault("HEAD", ".", "503", times=1000)
    hub.fault("GET", ".", "503", times=1000)
    assert_same(ValueModel.from_pretrained("org/value"), value)
    with pytest.raises(OSError, match=f"org/other could not be had from {hub.url}, and is not in the cache"):
        ValueModel.from_pretrained("org/other")


# ---- on the way ----


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_hub_that_stumbles_once_is_asked_again(hub: HubServer, value: ValueModel, method: str) -> None:
    hub.fault(method, "/config.json", "503", times=2)
    hub.fault("HEAD", "model.safetensors", "502", times=2)
    assert_same(ValueModel.from_pretrained("org/value"), value)


def test_a_server_error_is_no_missing_file(hub: HubServer) -> None:
    """Or an adapter repository would be taken for a whole one."""
    make_adapter("a").push_to_hub("org/value")
    hub.fault("HEAD", "adapter_config.json", "503", times=1000)
    with pytest.raises(OSError, match=r"org/value could not be had from .* Check the connection and try again"):
        ValueModel.from_pretrained("org/value", backbone=make_base())


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub: HubServer, value: ValueModel) -> None:
    hub.fault("GET", "/cdn/", "cut", times=2)
    assert_same(ValueModel.from_pretrained("org/value"), value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", r"could not be had from .*500.* Try again"),
        ("short", "file should be of size"),
        (
            "flipped",
            r"model.safetensors of org/value arrived damaged \(sha256 .*\) and was deleted .*: download it",
        ),
    ],
)
def test_damaged_weights_are_not_loaded_and_not_kept(
    hub: HubServer, value: ValueModel, tmp_path: Path, fault: str, message: str
) -> None:
    hub.fault("GET", "/cdn/", fault, times=100)
    with pytest.raises(OSError, match=message):
        ValueModel.from_pretrained("org/value")
    assert not cached(tmp_path / "home")
    hub.stop_faults()
    assert_same(ValueModel.from_pretrained("org/value"), value)
    assert len(cached(tmp_path / "home")) == 1


@pytest.mark.parametrize("kind", ["head", "adapter", "shards"])
def test_the_hash_of_every_kind_of_weights_is_checked(hub: HubServer, kind: str) -> None:
    base = make_base()
    if kind == "head":
        make_head(base, "a").push_to_hub("org/value")
    elif kind == "adapter":
        make_adapter("a").push_to_hub("org/value")
    else:
        make_value_model("a").push_to_hub("org/value", max_shard_size="20KB")
    hub.fault("GET", "/cdn/", "flipped")
    load = ValueHead.from_pretrained if kind == "head" else partial(ValueModel.from_pretrained, backbone=base)
    with pytest.raises(OSError, match="of org/value arrived damaged"):
        load("org/value")


def test_a_backbone_from_the_hub_is_checked_too(hub: HubServer) -> None:
    make_base().push_to_hub("org/base")
    make_adapter("a").push_to_hub("org/value")
    oid = hub.repositories["org/base"].commits[hub.repositories["org/base"].refs["main"]]["model.safetensors"].oid
    hub.fault("GET", f"/cdn/{oid}", "flipped")
    with pytest.raises(OSError, match="which could not be loaded") as caught:
        ValueModel.from_pretrained("org/value")
    assert "model.safetensors of org/base arrived damaged" in str(caught.value.__cause__)


def test_a_config_that_is_no_json_is_told(hub: HubServer, value: ValueModel) -> None:
    hub.fault("GET", "/resolve/main/config.json", "short")
    with pytest.raises(OSError, match="file should be of size"):
        ValueModel.from_pretrained("org/value")
    assert_same(ValueModel.from_pretrained("org/value"), value)


# ---- paths ----


def test_a_path_out_of_the_repository_is_refused(tmp_path: Path) -> None:
    for part in ("../x", "a/../../x", "/etc/x", "..\\x"):
        with pytest.raises(ValueError, match="leads out of the repository: only files inside it are read"):
            check_inside(part)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/x.json").write_text("{}")
    with pytest.raises(ValueError, match="leads out"):
        find_file(str(tmp_path / "value"), "x.json", {"subfolder": "../secret"})


def test_shards_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    make_value_model("a").save_pretrained(tmp_path / "value")
    (tmp_path / "value/model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"head.weight": "../model.safetensors"}}
    (tmp_path / "value/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'../model.safetensors' leads out of the repository"):
        ValueModel.from_pretrained(tmp_path / "value")


def test_a_subfolder_is_read(hub: HubServer, tmp_path: Path) -> None:
    model = make_value_model("a")
    model.save_pretrained(tmp_path / "inside/value")
    HfApi().create_repo("org/many")
    HfApi().upload_folder(repo_id="org/many", folder_path=tmp_path)
    assert_same(ValueModel.from_pretrained("org/many", subfolder="inside/value"), model)
    assert_same(ValueModel.from_pretrained(tmp_path, subfolder="inside/value"), model)
    mavis = MavisLogitsProcessor.from_pretrained("org/many", subfolder="inside/value", device_map={"": "cpu"})
    assert mavis.objectives == ["a"]


def test_what_is_pushed_during_a_load_does_not_mix_with_it(
    hub: HubServer, value: ValueModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter("a").push_to_hub("org/next")
    following = hub.repositories["org/next"]
    take_fault = hub.take_fault

    def push_in_between(method: str, path: str) -> str | None:
        if method == "HEAD" and path.endswith("/adapter_config.json"):  # the load has read config.json before
            hub.repositories["org/value"].commit("main", following.commits[following.refs["main"]])
        return take_fault(method, path)

    monkeypatch.setattr(hub, "take_fault", push_in_between)
    assert_same(ValueModel.from_pretrained("org/value"), value)
