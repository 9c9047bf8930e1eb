"""`mavis fit`: from prompts and rewards to a bundle, on a tiny model; and what it refuses before work is spent."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chat_model import chat_model
from mavis_logits import MavisSampling, cli
from mavis_logits.core.chat import chat_inputs
from mavis_logits.hub.publish import push_folder
from mavis_logits.models import load_chat_model
from mavis_training.fit.config import FitConfig, seconds, told
from mavis_training.fit.plan import FEWEST_PROMPTS, answers_within, split, trees_within
from mavis_training.fit.report import verdict
from mavis_training.fit.run import fit
from mavis_training.fit.tune import GRIDS, Trial, choose

REWARDS = """
def few(prompts, completions, **columns):
    return [-len(text.split()) / 10 for text in completions]

def ones(prompts, completions, **columns):
    return [float(text.count("w1")) for text in completions]

def same(prompts, completions, **columns):
    return [1.0] * len(prompts)

def prompt(prompts, completions, **columns):
    return [float(len(prompt)) for prompt in prompts]

def broken(prompts, completions, **columns):
    return [float("nan")] * len(prompts)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A chat model, 90 prompts and rewards, in a folder."""
    folder = tmp_path_factory.mktemp("fit")
    model, tokenizer = chat_model()
    model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    rng = random.Random(0)
    lines = [" ".join(f"w{rng.randrange(40)}" for _ in range(5)) for _ in range(90)]
    (folder / "prompts.txt").write_text("\n".join(lines))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def config(place, output, *rewards, **changes):
    given_settings = {
        "prompts": str(place / "prompts.txt"), "output": str(output), "model": str(place / "chat"), "budget": "5m",
        "rewards": {name: f"{place / 'rewards.py'}:{name}" for name in rewards}, "max_new_tokens": 8,
        "train": {"learning_rate": 3e-3},
    } | changes  # fmt: skip
    return FitConfig(**given_settings)


@pytest.fixture(scope="module")
def fitted(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("fitted") / "out"
    said = []
    return output, fit(config(place, output, "few", "ones"), say=said.append), said


def test_it_ends_with_a_bundle_that_raises_the_reward(place, fitted):
    output, state, said = fitted
    assert [line[:5] for line in said if line.startswith("[")] == [f"[{i}/6]" for i in range(1, 7)]
    rows = state["results"]["settings"]
    assert rows["few"]["few"]["gain_sd"] > 2 * rows["few"]["few"]["gain_sd_error"] > 0
    model, tokenizer = load_chat_model(str(place / "chat"))
    mavis = MavisSampling.from_pretrained(str(output / "bundle"), model=model, tokenizer=tokenizer)
    assert mavis.objectives == ["few", "ones"]
    chosen = dict(state["chosen"])
    if state["betas"] is not None:  # one strength in new units does what each objective's own did
        chosen["beta"] = float(f"{math.exp(sum(map(math.log, state['betas'])) / len(state['betas'])):.2g}")
    assert {name: getattr(mavis.config, name) for name in chosen} == chosen
    head = json.loads((output / "bundle/value/config.json").read_text())
    assert head["settings"] == {**chosen, "temperature": 0.7}
    model.generate(**chat_inputs(tokenizer, ["w1 w2"]), custom_generate=mavis, max_new_tokens=4)


def test_nothing_is_measured_on_what_was_learned_from_or_chosen_on(fitted):
    output, _, _ = fitted
    names = ("trees", "choosing", "measuring")
    parts = [{row["prompt"] for row in map(json.loads, (output / f"work/{n}.jsonl").open())} for n in names]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 90


def test_the_page_says_what_was_found(fitted):
    output, state, _ = fitted
    page = (output / "report.html").read_text()
    row = state["results"]["settings"]["few"]["few"]
    assert f"few: {row['gain_sd']:+.2f} ± {row['gain_sd_error']:.2f} standard deviations" in page
    assert "left alone" in page
    assert "MavisSampling.from_pretrained" in page
    assert "script" not in page.replace("without scripts", "").replace("description", "")


def test_a_second_run_takes_all_that_is_there(place, fitted):
    output, state, _ = fitted
    before = (output / "bundle/value/model.safetensors").read_bytes()
    trees = sorted((output / "work/trees").iterdir())
    again = fit(config(place, output, "few", "ones"), say=lambda _: None)
    assert (output / "bundle/value/model.safetensors").read_bytes() == before
    assert sorted((output / "work/trees").iterdir()) == trees
    assert again["results"]["settings"] == state["results"]["settings"]
    assert again["spent"] > state["spent"]
    with pytest.raises(ValueError, match="a fit of other settings: max_new_tokens was 8, is now 9"):
        fit(config(place, output, "few", "ones", max_new_tokens=9))


def rounded(content):
    """Numbers to five digits: where a matrix lies in memory shows in the last ones of its products."""
    return json.loads(json.dumps(content), parse_float=lambda number: float(f"{float(number):.5g}"))


def test_a_run_that_was_cut_off_goes_on(place, fitted, tmp_path):
    output, state, _ = fitted
    shutil.copytree(output, tmp_path / "cut")
    kept = json.loads((tmp_path / "cut/fit.json").read_text())
    for name in ("collected", "chosen", "tried", "results", "seeds"):
        del kept[name]
    (tmp_path / "cut/fit.json").write_text(json.dumps(kept))
    for shard in sorted((tmp_path / "cut/work/trees").glob("trees-?????.h5"))[-3:]:
        shard.unlink()
    for folder in ("value", "states", "trials", "completions"):
        shutil.rmtree(tmp_path / "cut/work" / folder)
    again = fit(config(place, tmp_path / "cut", "few", "ones"), say=lambda _: None)
    found, expected = (rounded(one["results"]["settings"]) for one in (again, state))
    assert found == expected  # the same trees, the same values


def test_a_value_model_of_a_local_base_is_whole(place, tmp_path):
    train = {"num_layers": 1, "learning_rate": 1e-2, "epochs": 1}
    state = fit(config(place, tmp_path / "out", "few", kind="model", train=train, trees=30, kl="best"))
    model, tokenizer = load_chat_model(str(place / "chat"))
    mavis = MavisSampling.from_pretrained(str(tmp_path / "out/bundle"), model=model, tokenizer=tokenizer)
    assert not (tmp_path / "out/bundle/value/adapter_config.json").exists()
    assert mavis.functions.value_models
    assert state["collected"] == 30


def test_policies_are_tuned_for_each_reward_and_leave_the_model_alone(place, tmp_path):
    model, tokenizer = load_chat_model(str(place / "chat"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given, said = config(place, tmp_path / "out", "few", "ones", kind="policy", train={"learning_rate": 1e-2}), []
    state = fit(given, model, tokenizer, said.append)
    assert "seconds each with the tuning" in "\n".join(said)
    assert model.config._attn_implementation == "sdpa"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(dict(model.named_parameters()))
    for name, tensor in model.state_dict().items():  # nor has it adapters now
        assert torch.equal(tensor, before.pop(name))
    assert not before
    mavis = MavisSampling.from_pretrained(str(tmp_path / "out/bundle"), model=model, tokenizer=tokenizer)
    assert mavis.objectives == ["few", "ones"]
    assert mavis.config.beta == mavis.functions.all[0].config.settings["beta"]
    with pytest.raises(ValueError, match="a folder that nobody else has"):
        push_folder(tmp_path / "out/bundle", "org/fitted")
    for name in ("few", "ones"):
        assert state["results"]["settings"][name][name]["gain_sd"] > 0.3


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("same", "is 1 for all of .* there is nothing to steer by"),
        ("prompt", "depends on the prompt alone"),
        ("broken", "nan"),
    ],
)
def test_a_reward_that_teaches_nothing_is_told_after_a_few_trees(place, tmp_path, reward, message):
    with pytest.raises(ValueError, match=message):
        fit(config(place, tmp_path / "out", reward), say=lambda _: None)
    assert len(list((tmp_path / "out/work/trees").glob("trees-?????.h5"))) == 1  # they are kept


def test_a_budget_too_small_is_told_and_what_was_sampled_is_kept(place, tmp_path):
    with pytest.raises(ValueError, match="the budget is too small: a tree takes"):
        fit(config(place, tmp_path / "out", "few", budget="0.1s"), say=lambda _: None)
    assert list((tmp_path / "out/work/trees").glob("trees-?????.h5"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "soon"}, "budget must be a time such as 30m"),
        ({"budget": "0m"}, "budget must be"),
        ({"kl": -1.0}, "kl must be a number of nats above 0, or 'best'"),
        ({"kind": "both"}, "head, model"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"train": {"widht": 3}}, "did you mean 'width'"),
        ({"train": {"store": "x"}}, "train must not give store"),
        ({"rewards": {}}, "rewards is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(place, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(place, tmp_path, "few", **changes)


def test_prompts_that_are_held_out_too_or_too_few_are_refused(place, tmp_path):
    lines = (place / "prompts.txt").read_text().splitlines()
    (tmp_path / "held.txt").write_text("\n".join([*(f"w1 w{i} w{i}" for i in range(20)), lines[3].upper()]))
    with pytest.raises(ValueError, match="1 of the prompts are also held out"):
        fit(config(place, tmp_path / "out", "few", held_out=str(tmp_path / "held.txt")))
    (tmp_path / "few.txt").write_text("\n".join(lines[:20]))
    with pytest.raises(ValueError, match=f"20 different prompts are too few: give at least {FEWEST_PROMPTS}"):
        fit(config(place, tmp_path / "out", "few", prompts=str(tmp_path / "few.txt")))
    assert not (tmp_path / "out").exists()


def test_the_command_reads_rewards_by_name(place, tmp_path, capsys):
    options = ["--prompts", str(place / "prompts.txt"), "--model", str(place / "chat"), "--output", str(tmp_path / "o")]
    assert cli.main(["fit", *options, "--reward", "few"]) == 2
    assert "expected NAME=SPEC" in capsys.readouterr().err
    more = [
        "--reward",
        f"few={place / 'rewards.py'}:few",
        "--max_new_tokens",
        "8",
        "--trees",
        "30",
        "--train.width",
        "8",
    ]
    assert cli.main(["fit", *options, *more]) == 0
    shown = capsys.readouterr().out
    assert "standard deviations at" in shown
    assert f'from_pretrained("{tmp_path / "o/bundle"}"' in shown


@given(st.integers(FEWEST_PROMPTS, 2000), st.integers(0, 9))
def test_prompts_are_shared_out(count, seed):
    rows = [{"id": str(i), "prompt": f"prompt {i}"} for i in range(count)]
    shared = split([*rows, *rows], None, seed)  # repeats count once
    parts = [shared.trees, shared.choosing, shared.measuring]
    assert sorted(row["id"] for part in parts for row in part) == sorted(row["id"] for row in rows)
    assert min(map(len, parts)) >= 5


def test_time_becomes_trees():
    assert trees_within(1800, 80, 2.0, 10_000, None) == 500
    assert trees_within(1800, 80, 2.0, 300, None) == 300
    assert trees_within(1800, 80, 2.0, 10_000, 100) == 100
    with pytest.raises(ValueError, match="Give at least 2m"):
        trees_within(60, 10, 2.0, 100, None)


def test_what_is_left_of_the_time_becomes_answers():
    assert answers_within(1000, 10) == 3
    assert answers_within(30, 10) == 2
    assert answers_within(-5, 10) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("90s", 90), ("45", 2700), ("1.5h", 5400), ("1h 5m", 3900)],
)
def test_a_budget_is_a_time(text, expected):
    assert seconds(text) == expected
    assert told(expected)


@given(st.floats(0.05, 5.0), st.floats(1.0, 20.0), st.sampled_from(["head", "model"]))
def test_strength_is_found_for_a_divergence(slope, kl, kind):
    """KL grows with the square of the strength, min-max from the price of its cut; more of it always pays."""

    def measure(settings):
        cut = 0.0 if settings["top_k"] == 200 else 0.5
        found = cut + slope * settings["beta"] ** 2 / 2
        return Trial(settings, found, {"a": math.sqrt(found)})

    best, tried = choose(measure, GRIDS[kind], kl, lambda: True)
    assert abs(best.kl - kl) <= 0.3 * kl
    assert best in tried
    assert len(tried) <= 4 * len(GRIDS[kind])


def test_most_reward_is_where_it_turns_down():
    def measure(settings):
        return Trial(settings, settings["beta"], {"a": 1 - (settings["beta"] - 8) ** 2 / 100})

    best, _ = choose(measure, GRIDS["head"][:1], None, lambda: True)
    assert 5 < best.settings["beta"] < 11


def test_without_time_the_first_strengths_must_do():
    trials = []

    def measure(settings):
        trials.append(settings)
        return Trial(settings, 1.0, {"a": 0.1})

    best, tried = choose(measure, GRIDS["head"], 5.0, lambda: False)
    assert len(trials) == 2
    assert best in tried


def test_what_may_be_chance_is_called_so():
    row = {"kl": 3.0, "a": {"gain_sd": 0.3, "gain_sd_error": 0.2}}
    assert "no more than chance" in verdict("a", row)
    assert "+0.30 ± 0.10" in verdict("a", {"kl": 3.0, "a": {"gain_sd": 0.3, "gain_sd_error": 0.1}})
    assert "does not vary" in verdict("a", {"kl": 3.0, "a": {"gain_sd": None, "gain_sd_error": None}})
