"""Bundles: the file, folders, the Hub, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from hub_server import HubServer
from mavis_logits import MavisConfig, MavisLogitsProcessor, ValueHead, ValueModel, cli
from mavis_logits.hub.bundle import BUNDLE_FILE, FORMAT_VERSION, Bundle, BundleEntry, load_bundle
from mavis_logits.hub.make_bundle import make_bundle
from mavis_logits.hub.publish import push_folder
from mavis_logits.values import loading
from mavis_logits.values.loading import load_value_functions
from mavis_training.collect import describe, load_policy
from mavis_training.measure.settings import steerings
from mavis_training.sampling.config import PolicyConfig
from tiny import make_base, make_head, make_value_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A value model for `a`, one for `b`, and a value head for `c` and `d`, of one base model."""
    for name in ("a", "b"):
        make_value_model(name, seed=ord(name)).save_pretrained(tmp_path / f"value-{name}")
    make_head(make_base(), "c", "d").save_pretrained(tmp_path / "head")
    return tmp_path


def values_of(mavis: MavisLogitsProcessor) -> torch.Tensor:
    """What a processor makes of fixed scores, for comparison."""
    torch.manual_seed(0)
    return mavis(torch.tensor([[5, 6, 7]]), torch.randn(1, 97))


# ---- the file ----

names = st.text("abcdefgh-", min_size=1, max_size=8).filter(lambda name: name.strip("-"))
entries = st.one_of(
    st.builds(BundleEntry, subfolder=names),
    st.builds(BundleEntry, repo=st.just("org/value"), revision=st.none() | names, subfolder=st.none() | names),
)
configs = st.builds(
    MavisConfig,
    beta=st.floats(0, 100),
    top_k=st.none() | st.integers(1, 1000),
    normalize=st.sampled_from(["minmax", "gap", "center", "none", "standard"]),
    kl_budget=st.none() | st.floats(0.01, 5),
)


@given(st.dictionaries(names, entries, min_size=1, max_size=4), configs, st.none() | names)
def test_what_is_written_is_read(functions: dict[str, BundleEntry], config: MavisConfig, base: str | None) -> None:
    bundle = Bundle(functions, config, base)
    assert Bundle.from_dict(json.loads(bundle.to_json())) == bundle


def test_only_settings_that_differ_are_written() -> None:
    """So that an older version can read what a newer one wrote, unless it uses something new."""
    bundle = Bundle({"a": BundleEntry(subfolder="a")}, MavisConfig(beta=3.0))
    assert json.loads(bundle.to_json())["settings"] == {"beta": 3.0}


GOOD: dict[str, Any] = {"format_version": 1, "value_functions": {"a": {"subfolder": "a"}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, r"reads formats up to 1: pip install -U mavis-logits"),
        ({"format_version": None}, "format_version must be a whole number"),
        ({"value_function": {}}, r"unknown key 'value_function'; did you mean 'value_functions'\?"),
        ({"value_functions": {}}, "at least one value function"),
        ({"value_functions": ["org/value"]}, "must be an object by objective, got list"),
        ({"value_functions": {"a": "org/value"}}, "value function 'a' must be an object, got 'org/value'"),
        (
            {"value_functions": {"a": {"rep": "x"}}},
            r"value function 'a' has the unknown key 'rep'; did you mean 'repo'",
        ),
        ({"value_functions": {"a": {}}}, "'a' needs a repo .* or a subfolder"),
        ({"value_functions": {"a": {"subfolder": "a", "revision": "v1"}}}, "'a' has a revision but no repo"),
        ({"value_functions": {"a": {"subfolder": "../a"}}}, "'../a' leads out of the repository"),
        ({"value_functions": {"a": {"subfolder": "/a"}}}, "'/a' leads out of the repository"),
        ({"value_functions": {"a": {"repo": "../a"}}}, r"'../a' is no Hub id"),
        ({"value_functions": {"a": {"repo": "/a"}}}, r"'/a' is no Hub id"),
        ({"value_functions": {"a": {"repo": 3}}}, "repo must be text, got 3"),
        ({"settings": {"betta": 3}}, "unknown setting 'betta'; did you mean 'beta'"),
        ({"settings": {"beta": -3}}, "beta must be a finite number of at least 0"),
        ({"settings": {"weights": {"aa": 1.0}}}, r"weights name the objective 'aa' \(did you mean 'a'\?\)"),
        ({"base_model": 3}, "base_model must be a Hub id, got 3"),
    ],
)
def test_mistakes_in_the_file_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / BUNDLE_FILE).write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_bundle(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}, {BUNDLE_FILE}: ")
    with pytest.raises(ValueError, match=message):
        MavisLogitsProcessor.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        push_folder(tmp_path, "org/bundle")


def test_a_file_that_is_no_object_is_told(tmp_path: Path) -> None:
    (tmp_path / BUNDLE_FILE).write_text("[1]")
    with pytest.raises(OSError, match="holds list, expected a JSON object"):
        load_bundle(tmp_path)
    (tmp_path / BUNDLE_FILE).write_text('{"format')
    with pytest.raises(OSError, match=r"mavis_bundle.json is no valid JSON"):
        load_bundle(tmp_path)


def test_a_link_out_of_the_bundle_is_refused(folders: Path) -> None:
    bundle = folders / "bundle"
    bundle.mkdir()
    (bundle / BUNDLE_FILE).write_text(json.dumps(GOOD))
    (bundle / "a").symlink_to(folders / "value-a")
    with pytest.raises(ValueError, match="is a link out of the bundle: put the files themselves there"):
        load_bundle(bundle)


def test_a_place_without_a_bundle_is_none(tmp_path: Path) -> None:
    assert load_bundle(tmp_path) is None


# ---- folders ----


def test_a_bundle_of_folders_steers_as_its_parts_do(folders: Path) -> None:
    base = make_base()
    given = {"a": str(folders / "value-a"), "b": str(folders / "value-b"), "c": str(folders / "head")}
    config = MavisConfig(weights={"a": 1.0, "b": -0.5}, beta=3.0, top_k=7)
    bundle = make_bundle(folders / "bundle", given, config)
    assert sorted(path.name for path in bundle.iterdir()) == [
        "README.md", "head", BUNDLE_FILE, "value-a", "value-b"
    ]  # fmt: skip
    mavis = MavisLogitsProcessor.from_pretrained(bundle, model=base)
    assert mavis.objectives == ["a", "b", "c"]
    assert mavis.config == config
    assert mavis.weights.tolist() == [1.0, -0.5, 0.0]
    ab = {k: given[k] for k in "ab"}
    parts = MavisLogitsProcessor.from_pretrained(ab, config=config)
    bundled = MavisLogitsProcessor.from_pretrained(make_bundle(folders / "two", ab, config))
    assert torch.equal(values_of(bundled), values_of(parts))


def test_a_bundle_is_value_functions_wherever_these_are_loaded(folders: Path) -> None:
    """As what `mavis evaluate`, `pareto` and `iterate` load does, too, and not only what steers."""
    base = make_base()
    given = {"a": str(folders / "value-a"), "c": str(folders / "head"), "d": str(folders / "head")}
    bundle = str(make_bundle(folders / "bundle", given, MavisConfig()))
    setting = {"weights": {"a": 1.0, "c": 0.5}, "beta": 2.0, "top_k": 6}
    (steering,) = steerings({"steered": setting}, bundle, base, None).values()  # type: ignore[arg-type]
    assert steering is not None
    assert steering.objectives == ["a", "c", "d"]
    for mixed in ({"a": bundle}, [bundle, str(folders / "value-b")]):
        with pytest.raises(ValueError, match=r"bundle of value functions, for a, c, d: give it alone"):
            load_value_functions(mixed, base, None, {})


def test_what_a_setting_of_an_evaluation_does_not_say_is_as_recommended(folders: Path) -> None:
    base = make_base()
    head = ValueHead.from_pretrained(folders / "head")
    head.config.settings = {"beta": 3.5, "top_k": 7, "normalize": "none", "unscored": "expected", "temperature": 0.4}
    head.save_pretrained(folders / "recommending")
    own = str(folders / "recommending")
    bundle = str(make_bundle(folders / "bundle", {"c": own, "d": own}, MavisConfig(top_k=9, kl_budget=0.2)))
    for source in (own, bundle):
        settings: dict[str, dict[str, Any]] = {"as it is": {"weights": {"c": 1.0}}, "stronger": {"beta": 6.0}}
        made = steerings(settings, source, base, None)  # type: ignore[arg-type]
        for name, setting in settings.items():
            one = made[name]
            loaded = MavisLogitsProcessor.from_pretrained(source, model=base, **setting)  # type: ignore[arg-type]
            assert one is not None
            assert one.config == loaded.config
            assert one.beta == loaded.beta
            assert one.policy.weights.tolist() == loaded.policy.weights.tolist()
        recorded = describe(load_policy(PolicyConfig(source, {"beta": 6.0}), base, None))  # type: ignore[arg-type]
        assert recorded["settings"] == asdict(made["stronger"].config) | {"beta": 6.0}  # type: ignore[union-attr]
    assert made["as it is"].config.kl_budget == 0.2  # type: ignore[union-attr]
    assert made["stronger"].config.kl_budget is None  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["value-a", "bundle"])
def test_whether_it_is_a_bundle_is_looked_up_once(folders: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make_bundle(folders / "bundle", {"a": str(folders / "value-a")}, MavisConfig())
    asked: list[str] = []
    monkeypatch.setattr(loading, "load_bundle", lambda name, **hub: asked.append(str(name)) or load_bundle(name, **hub))
    MavisLogitsProcessor.from_pretrained(folders / name)
    assert asked == [str(folders / name)]


def test_what_the_caller_gives_comes_before_the_bundles_settings(folders: Path) -> None:
    config = MavisConfig(weights={"a": 1.0}, beta=3.0, top_k=7)
    bundle = make_bundle(folders / "bundle", [str(folders / "value-a"), str(folders / "value-b")], config)
    mavis = MavisLogitsProcessor.from_pretrained(str(bundle), {"b": 1.0}, 2.0, top_k=4)
    assert (mavis.weights.tolist(), float(mavis.beta), mavis.config.top_k) == ([0.0, 1.0], 2.0, 4)
    assert MavisLogitsProcessor.from_pretrained(str(bundle), config=MavisConfig()).config.top_k == 15
    with pytest.raises(ValueError, match=r"weights name the objective 'z'; there are values for \['a', 'b'\]"):
        MavisLogitsProcessor.from_pretrained(str(bundle), {"z": 1.0})


def test_a_bundle_takes_what_its_value_functions_recommend(folders: Path) -> None:
    settings = {"beta": 3.5, "top_k": 7, "normalize": "standard", "unscored": "expected", "temperature": 0.7}
    config = json.loads((folders / "head" / "config.json").read_text()) | {"settings": settings}
    (folders / "head" / "config.json").write_text(json.dumps(config))
    made = make_bundle(folders / "bundle", [str(folders / "head")])
    mavis = MavisLogitsProcessor.from_pretrained(str(made), model=make_base())
    assert (mavis.config.beta, mavis.config.top_k, mavis.config.unscored) == (3.5, 7, "expected")
    made = make_bundle(folders / "stronger", [str(folders / "head")], {"beta": 6.0})
    mavis = MavisLogitsProcessor.from_pretrained(str(made), model=make_base())
    assert (mavis.config.beta, mavis.config.top_k, mavis.config.normalize) == (6.0, 7, "standard")
    made = make_bundle(folders / "plain", [str(folders / "head")], MavisConfig())
    assert MavisLogitsProcessor.from_pretrained(str(made), model=make_base()).config.top_k == 15


def test_a_value_head_with_two_outputs_lies_in_a_bundle_once(folders: Path) -> None:
    bundle = make_bundle(folders / "bundle", [str(folders / "head")])
    content = json.loads((bundle / BUNDLE_FILE).read_text())
    assert content["value_functions"] == {"c": {"subfolder": "head"}, "d": {"subfolder": "head"}}
    mavis = MavisLogitsProcessor.from_pretrained(str(bundle), model=make_base())
    assert mavis.objectives == ["c", "d"]
    assert len(mavis.functions.all) == 1
    with pytest.raises(ValueError, match="is a value head, which needs its base model's hidden states: pass model="):
        MavisLogitsProcessor.from_pretrained(str(bundle))


def test_what_cannot_be_bundled_is_refused_and_leaves_nothing(folders: Path) -> None:
    model = str(folders / "value-a")
    refusals: list[tuple[Any, MavisConfig, type[Exception], str]] = [
        ([model, model], MavisConfig(), ValueError, "several value functions predict 'a': name them"),
        ([model], MavisConfig(weights={"z": 1.0}), ValueError, "weights name the objective 'z'"),
        ({"z": str(folders / "head")}, MavisConfig(), ValueError, r"'z' is none of the objectives \['c', 'd'\]"),
        ([str(folders)], MavisConfig(), ValueError, "holds no value function"),
        ([str(folders / "nothing")], MavisConfig(), OSError, "is no folder here, and no Hub id"),
    ]
    for given_functions, config, kind, message in refusals:
        with pytest.raises(kind, match=message):
            make_bundle(folders / "bundle", given_functions, config)
        assert not (folders / "bundle").exists()
    with pytest.raises(FileExistsError, match="give the name of a folder that is to be made"):
        make_bundle(folders, [model])
    (folders / "more").mkdir()
    make_value_model("b").save_pretrained(folders / "more/value-a")
    with pytest.raises(ValueError, match="two folders are called 'value-a'"):
        make_bundle(folders / "bundle", [model, str(folders / "more/value-a")])


def test_the_command(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bundle",
        str(folders / "bundle"),
        "--values",
        f"kind={folders / 'value-a'}",
        f"funny={folders / 'value-b'}",
    ]
    assert cli.main([*command, "--weights", "kind=0.7,funny=0.3", "--beta", "4", "--base-model", "org/base"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(folders / "bundle")
    mavis = MavisLogitsProcessor.from_pretrained(folders / "bundle")
    assert mavis.objectives == ["kind", "funny"]
    assert float(mavis.beta) == 4.0
    assert cli.main([*command]) == 2
    assert "exists: give the name of a folder" in capsys.readouterr().err


# ---- the Hub ----


def push_parts(folders: Path) -> dict[str, str]:
    """Publish the two value models; their commits."""
    return {name: push_folder(folders / f"value-{name}", f"org/value-{name}").oid for name in "ab"}


def test_a_bundle_of_repositories_is_pinned(hub: HubServer, folders: Path) -> None:
    commits = push_parts(folders)
    config = MavisConfig(weights={"a": 0.7, "b": 0.3}, beta=2.0)
    bundle = make_bundle(folders / "bundle", ["org/value-a", "org/value-b"], config)
    functions = json.loads((bundle / BUNDLE_FILE).read_text())["value_functions"]
    assert functions == {name: {"repo": f"org/value-{name}", "revision": commits[name]} for name in "ab"}
    push_folder(bundle, "org/bundle")
    before = values_of(MavisLogitsProcessor.from_pretrained("org/bundle"))
    make_value_model("a", seed=9).push_to_hub("org/value-a")
    assert torch.equal(values_of(MavisLogitsProcessor.from_pretrained("org/bundle")), before)
    card = ModelCard(hub.files("org/bundle")["README.md"].decode())
    assert 'from_pretrained("org/bundle"' in card.text
    assert commits["a"][:12] in card.text
    assert "mavis" in (card.data.tags or [])


def test_a_revision_of_a_repository_is_named_after_an_at_sign(hub: HubServer, folders: Path) -> None:
    commits = push_parts(folders)
    make_value_model("a", seed=9).push_to_hub("org/value-a")
    bundle = make_bundle(folders / "bundle", {"kind": f"org/value-a@{commits['a']}"})
    functions = json.loads((bundle / BUNDLE_FILE).read_text())["value_functions"]
    assert functions == {"kind": {"repo": "org/value-a", "revision": commits["a"]}}
    for unknown, message in (("org/value-a@v9", "has no revision 'v9'"), ("org/zzz", "no such repository")):
        with pytest.raises(OSError, match=message):
            make_bundle(folders / "another", [unknown])


def test_a_bundle_with_its_value_functions_inside(hub: HubServer, folders: Path, tmp_path: Path) -> None:
    bundle = make_bundle(folders / "bundle", [str(folders / "value-a"), str(folders / "head")], MavisConfig(beta=2.0))
    first = push_folder(bundle, "org/bundle").oid
    base = make_base()
    sources, _ = load_bundle("org/bundle") or ({}, None)
    assert {source.revision for source in sources.values()} == {first}
    mavis = MavisLogitsProcessor.from_pretrained(
        "org/bundle", model=base, cache_dir=tmp_path / "other", token="hf_writer"
    )
    assert mavis.objectives == ["a", "c", "d"]
    model = ValueModel.from_pretrained(folders / "value-a")
    found = next(f for f in mavis.functions.all if isinstance(f, ValueModel))
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    card = hub.files("org/bundle")["value-a/README.md"].decode()
    assert "# org/bundle: value-a" in card
    assert 'from_pretrained(\n    "org/bundle", weights={"a": 1}' in card

    again = make_bundle(folders / "again", [str(folders / "value-b")])
    push_folder(again, "org/bundle")
    assert not [name for name in hub.files("org/bundle") if name.startswith("head/") and "safetensors" in name]
    assert MavisLogitsProcessor.from_pretrained("org/bundle").objectives == ["b"]
    assert MavisLogitsProcessor.from_pretrained("org/bundle", model=base, revision=first).objectives == ["a", "c", "d"]


def test_a_bundle_serves_from_the_cache(hub: HubServer, folders: Path) -> None:
    push_parts(folders)
    push_folder(make_bundle(folders / "bundle", ["org/value-a", str(folders / "value-b")]), "org/bundle")
    expected = values_of(MavisLogitsProcessor.from_pretrained("org/bundle"))
    hub.close()
    assert torch.equal(values_of(MavisLogitsProcessor.from_pretrained("org/bundle", local_files_only=True)), expected)


def test_a_bundle_whose_value_function_is_gone_is_told(hub: HubServer, folders: Path) -> None:
    push_parts(folders)
    push_folder(make_bundle(folders / "bundle", ["org/value-a"]), "org/bundle")
    del hub.repositories["org/value-a"]
    with pytest.raises(OSError, match="org/value-a is no folder here, and there is no such repository"):
        MavisLogitsProcessor.from_pretrained("org/bundle")
    (folders / "bundle2").mkdir()
    (folders / "bundle2" / BUNDLE_FILE).write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="holds no value function"):
        push_folder(folders / "bundle2", "org/bundle2")
    with pytest.raises(ValueError, match="is no value model"):
        MavisLogitsProcessor.from_pretrained(folders / "bundle2")
