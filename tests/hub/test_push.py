"""Value functions pushed to a Hub and loaded from it, over HTTP: what comes back, and what a push refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from safetensors.torch import load_file

from hub_server import HubServer, use_hub
from mavis_logits import ValueHead, ValueModel, cli
from mavis_logits.hub.cards import CardDetails
from mavis_logits.hub.files import ADAPTER_WEIGHTS, HEAD_WEIGHTS
from mavis_logits.hub.publish import checked_files, left_out, push_folder
from tiny import make_base, make_head, make_value_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def make_adapter(*objectives: str, seed: int = 0) -> ValueModel:
    """A value model with a LoRA adapter that does something, on a base called `org/base`."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    base = make_base()
    base.config.name_or_path = "org/base"
    model = ValueModel.from_backbone(base, objectives or ["a"], lora=lora)
    with torch.no_grad():
        model.head.weight.normal_()
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def push_base(hub: HubServer, folder: Path) -> None:
    """Publish the base model of `make_adapter` as `org/base`, as transformers does."""
    make_base().push_to_hub("org/base")
    assert "model.safetensors" in hub.files("org/base")
    shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def assert_same(found: ValueModel, expected: ValueModel) -> None:
    """Every weight is the same to the bit (sums may be ordered otherwise where memory is aligned otherwise)."""
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    torch.testing.assert_close(found(IDS).values, expected(IDS).values)


# ---- what comes back ----


def test_a_value_model_comes_back_bit_for_bit(hub: HubServer) -> None:
    model = make_value_model("a", "b")
    commit = model.push_to_hub("org/value")
    again = ValueModel.from_pretrained("org/value")
    assert_same(again, model)
    assert again.config.objectives == ["a", "b"]
    assert commit.oid in hub.repositories["org/value"].commits
    card = ModelCard(hub.files("org/value")["README.md"].decode())
    assert card.data.library_name == "mavis-logits"
    assert {"mavis", "value-model"} <= set(card.data.tags or [])
    assert "Not measured" in card.text
    assert '"org/value", weights={"a": 0.5, "b": 0.5}' in card.text


def test_weights_in_shards_come_back_bit_for_bit(hub: HubServer) -> None:
    model = make_value_model("a")
    model.push_to_hub("org/value", max_shard_size="20KB")
    assert sum(name.endswith(".safetensors") for name in hub.files("org/value")) > 1
    again = ValueModel.from_pretrained("org/value")
    assert_same(again, model)


@torch.no_grad()
def test_an_adapter_repository_finds_its_base_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    push_base(hub, tmp_path / "base")
    model = make_adapter("a")
    model.save_pretrained(tmp_path / "value", push_to_hub=True, repo_id="org/value", commit_message="First")
    assert {ADAPTER_WEIGHTS, HEAD_WEIGHTS} <= set(hub.files("org/value"))
    assert "model.safetensors" not in hub.files("org/value")
    again = ValueModel.from_pretrained("org/value", merge=False)
    assert_same(again, model)
    on_one_device = ValueModel.from_pretrained("org/value", device_map={"": "cpu"})
    torch.testing.assert_close(on_one_device(IDS).values, model(IDS).values)


@torch.no_grad()
def test_a_value_head_comes_back_bit_for_bit(hub: HubServer) -> None:
    base = make_base()
    head = make_head(base, "a", "b")
    head.push_to_hub("org/head", private=True, tags=["mine"])
    again = ValueHead.from_pretrained("org/head").eval().bind(base)
    hidden = torch.randn(3, 32)
    assert torch.equal(again(hidden), head(hidden))
    assert hub.repositories["org/head"].private
    assert "mine" in (ModelCard(hub.files("org/head")["README.md"].decode()).data.tags or [])


def test_a_revision_is_pinned_by_branch_tag_or_commit(hub: HubServer) -> None:
    first, second = make_value_model("a", seed=1), make_value_model("a", seed=2)
    commit = first.push_to_hub("org/value").oid
    HfApi().create_tag("org/value", tag="v1")
    second.push_to_hub("org/value")
    make_value_model("a", seed=3).push_to_hub("org/value", revision="trial")
    expected = {None: 2, "main": 2, "v1": 1, commit: 1, "trial": 3}
    for revision, seed in expected.items():
        assert_same(ValueModel.from_pretrained("org/value", revision=revision), make_value_model("a", seed=seed))


def test_pushing_again_leaves_nothing_of_another_kind(hub: HubServer) -> None:
    make_value_model("a").push_to_hub("org/value", max_shard_size="20KB")
    make_adapter("a").push_to_hub("org/value")
    assert {name for name in hub.files("org/value") if "safetensors" in name} == {ADAPTER_WEIGHTS, HEAD_WEIGHTS}
    make_value_model("a").push_to_hub("org/value")
    files = hub.files("org/value")
    assert {name for name in files if "safetensors" in name} == {"model.safetensors"}
    assert "adapter_config.json" not in files
    assert ".gitattributes" in files


def test_pushing_the_same_again_makes_no_commit(hub: HubServer, tmp_path: Path) -> None:
    make_value_model("a").save_pretrained(tmp_path / "value")
    first = push_folder(tmp_path / "value", "org/value")
    assert push_folder(tmp_path / "value", "org/value").oid == first.oid
    assert len(hub.repositories["org/value"].commits) == 2  # that of the empty repository, and the first


def test_a_card_is_rendered_under_the_repositorys_name_unless_it_was_changed_by_hand(
    hub: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "value"
    make_value_model("a").save_pretrained(folder)
    (folder / "card.json").write_text(CardDetails(rewards={"a": "how a it is"}).to_json())
    push_folder(folder, "org/one")
    one = hub.files("org/one")["README.md"].decode()
    assert "# org/one" in one
    assert "how a it is" in one
    (folder / "README.md").write_text(one)
    push_folder(folder, "org/two")
    assert hub.files("org/two")["README.md"].decode() == one.replace("org/one", "org/two")
    (folder / "README.md").write_text(one + "\nA word of my own.\n")
    push_folder(folder, "org/three")
    assert hub.files("org/three")["README.md"].decode() == one + "\nA word of my own.\n"


def test_the_command(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_value_model("a").save_pretrained(tmp_path / "value")
    assert cli.main(["push", str(tmp_path / "value"), "org/value", "--private", "--message", "First"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/org/value/commit/")
    assert hub.repositories["org/value"].private
    assert cli.main(["push", str(tmp_path / "nothing"), "org/value"]) == 2
    assert "there is no folder" in capsys.readouterr().err


# ---- refusals: before anything is sent ----


def saved(folder: Path) -> Path:
    make_value_model("a").save_pretrained(folder)
    return folder


def assert_refused(hub: HubServer, folder: Path, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        push_folder(folder, "org/value")
    assert not hub.requests


def test_what_is_no_value_function_is_refused(hub: HubServer, tmp_path: Path) -> None:
    assert_refused(hub, tmp_path, ValueError, r"holds no value function \(no config.json\) and no bundle")
    make_base().save_pretrained(tmp_path)
    assert_refused(hub, tmp_path, ValueError, "holds a model of type 'llama'")


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_and_missing_weights_are_refused(hub: HubServer, tmp_path: Path, damage: str) -> None:
    weights = saved(tmp_path) / "model.safetensors"
    if damage == "missing":
        weights.unlink()
        assert_refused(hub, tmp_path, OSError, "has no model.safetensors: save the value function again")
    else:
        weights.write_bytes(weights.read_bytes()[:-10])
        assert_refused(hub, tmp_path, OSError, "corrupt or half-written .*: save the value function again")


def test_a_pickle_is_refused(hub: HubServer, tmp_path: Path) -> None:
    torch.save(load_file(saved(tmp_path) / "model.safetensors"), tmp_path / "optimizer.pt")
    assert_refused(hub, tmp_path, ValueError, r"optimizer.pt may be a pickle, which is not published: remove it")


def test_only_what_belongs_to_a_value_function_is_published(hub: HubServer, tmp_path: Path) -> None:
    folder = saved(tmp_path / "value")
    for name in ("states/trees-00000.states.safetensors", "checkpoint-3/optimizer.pt", "trees.h5", "other.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"prompts of mine")
    (folder / "LICENSE").write_text("mine")
    push_folder(folder, "org/value")
    assert {"LICENSE", "config.json", "model.safetensors"} <= set(files := checked_files(folder))
    assert not {name for name in files if "/" in name or name in ("trees.h5", "other.safetensors")}
    assert set(left_out(folder)) == {"states/", "checkpoint-3/", "trees.h5", "other.safetensors"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_out_of_the_folder_is_refused(hub: HubServer, tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path / "value")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.txt").write_text("a secret")
    (folder / "extra").symlink_to(secret / "key.txt" if kind == "file" else secret)
    assert_refused(hub, folder, ValueError, "is a link out of the folder: put the file itself there")


def test_an_adapter_on_a_folder_that_nobody_else_has_is_refused(hub: HubServer, tmp_path: Path) -> None:
    adapter = make_adapter("a")
    adapter.config.backbone = str(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "value")
    assert_refused(hub, tmp_path / "value", ValueError, "a folder that nobody else has: publish that model")


def test_a_repository_id_that_is_none_is_refused(hub: HubServer, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="is no repository id such as org/name"):
        push_folder(tmp_path, "a/b/c")
    with pytest.raises(ValueError, match="custom_generate is for bundles"):
        push_folder(tmp_path, "org/value", custom_generate=True)
    assert not hub.requests


# ---- refusals by the Hub, and a line that breaks ----


def test_no_token_and_one_without_permission(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "value")
    for token in ("hf_other", "hf_unknown"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(OSError, match=r"no permission to write to org/value .* log in with a token that may write"):
            push_folder(tmp_path / "value", "org/value")
    use_hub(hub, monkeypatch, tmp_path / "home", token=None)
    with pytest.raises(OSError, match="needs a token that may write: hf auth login"):
        push_folder(tmp_path / "value", "org/value")
    assert not hub.repositories
    push_folder(tmp_path / "value", "org/value", token="hf_writer")
    assert "model.safetensors" in hub.files("org/value")


@pytest.mark.parametrize("step", ["/api/models/org/value/commit/", "/lfs/", "/api/models/org/value/preupload/"])
def test_a_push_that_breaks_off_changes_nothing_and_can_be_repeated(hub: HubServer, step: str, tmp_path: Path) -> None:
    make_value_model("a", seed=1).push_to_hub("org/value")
    before = hub.files("org/value")
    second = make_value_model("a", seed=2)
    method = "PUT" if step == "/lfs/" else "POST"
    hub.fault(method, step, "cut", times=100)
    with pytest.raises(OSError, match=r"was left as it was; .* Push again"):
        second.push_to_hub("org/value")
    assert hub.files("org/value") == before
    hub.stop_faults()
    second.push_to_hub("org/value")
    assert_same(ValueModel.from_pretrained("org/value"), second)


def test_what_arrived_before_the_break_is_not_sent_again(hub: HubServer, tmp_path: Path) -> None:
    saved(tmp_path)
    hub.fault("POST", "/commit/", "cut", times=100)
    with pytest.raises(OSError, match="Push again"):
        push_folder(tmp_path, "org/value")
    hub.stop_faults()
    sent = sum(method == "PUT" for method, _, _ in hub.requests)
    push_folder(tmp_path, "org/value")
    assert sum(method == "PUT" for method, _, _ in hub.requests) == sent


@pytest.mark.parametrize("step", ["/preupload/", "/objects/batch", "/lfs/"])
def test_a_hub_that_stumbles_once_is_asked_again(hub: HubServer, step: str, tmp_path: Path) -> None:
    hub.fault("PUT" if step == "/lfs/" else "POST", step, "503", times=2)
    push_folder(saved(tmp_path), "org/value")
    assert "model.safetensors" in hub.files("org/value")


def test_an_error_of_the_hub_says_that_nothing_changed(hub: HubServer, tmp_path: Path) -> None:
    hub.fault("POST", "/commit/", "500", times=100)
    with pytest.raises(OSError, match=r"org/value was left as it was; .*500.* Try again"):
        push_folder(saved(tmp_path), "org/value")
    assert set(hub.files("org/value")) == {".gitattributes"}
