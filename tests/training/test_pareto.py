"""`mavis pareto`: cells of methods, numbers of trade-offs as laws, intervals that cover, a run on a tiny model."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("moocore")

from chat_model import chat_model, save_chat_and_head
from mavis_training.pareto.analysis import (
    Points,
    bootstrap,
    coverage,
    front,
    holm,
    hypervolume,
    interval,
    mean_inner_product,
    p_value,
    resampled,
    spacing,
)
from mavis_training.pareto.config import ParetoConfig
from mavis_training.pareto.run import pareto

REWARDS = """
def ones(prompts, completions, **columns):
    return [sum(word in ("w1", "w5", "w9", "w13", "w17") for word in text.split()) for text in completions]

def twos(prompts, completions, **columns):
    return [sum(word in ("w2", "w6", "w10", "w14", "w18") for word in text.split()) for text in completions]

def same(prompts, completions, **columns):
    return [1.0] * len(prompts)
"""
CLOUDS = st.lists(st.tuples(st.floats(-1, 2), st.floats(-1, 2)), min_size=1, max_size=8).map(np.array)


def volume_of(points, corner) -> float:
    """By the boxes between all coordinates: the slow twin in two dimensions."""
    xs, ys = (sorted({corner[i], *(p[i] for p in points if (p > corner).all())}) for i in (0, 1))
    total = 0.0
    for (x0, x1), (y0, y1) in itertools.product(itertools.pairwise(xs), itertools.pairwise(ys)):
        if any(p[0] >= x1 and p[1] >= y1 for p in points):
            total += (x1 - x0) * (y1 - y0)
    return total


@given(CLOUDS)
def test_hypervolume_is_that_of_the_boxes(points) -> None:
    corner = np.array([-1.0, -1.0])
    assert hypervolume(points, corner) == pytest.approx(volume_of(points, corner), abs=1e-9)
    own = points[front(points)]
    assert hypervolume(own, corner) == pytest.approx(hypervolume(points, corner))  # the front is all that counts


@given(CLOUDS, st.tuples(st.floats(-1, 2), st.floats(-1, 2)))
def test_another_point_never_takes_volume_away(points, further) -> None:
    corner = np.array([-1.0, -1.0])
    assert hypervolume(np.vstack([points, further]), corner) >= hypervolume(points, corner) - 1e-12


@given(CLOUDS)
def test_the_front_is_what_nothing_dominates(points) -> None:
    for point, kept in zip(points, front(points), strict=True):
        better = [(other >= point).all() and (other > point).any() for other in points]
        if kept:
            assert not any(better)
    assert coverage(points, points) == 1.0
    assert coverage(points + 0.5, points) == 1.0
    assert coverage(points[:0], points) == 0.0


def test_spacing_and_mip_of_known_points() -> None:
    line = np.array([[0.0, 3.0], [1.0, 2.0], [2.0, 1.0], [3.0, 0.0]])
    assert spacing(line) == 0.0
    assert spacing(line[:2]) is None
    weights = np.array([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    assert mean_inner_product(line, weights) == pytest.approx((3 + 1.5 + 3) / 3)


def test_intervals_cover_the_truth_under_a_null() -> None:
    """Two methods of one distribution: the difference of their volumes is 0, and 95 % of the intervals say so."""
    rng, inside, corner, trials = np.random.default_rng(0), 0, np.array([-1.0, -1.0]), 200
    p_values = []
    for trial in range(trials):
        shared = rng.normal(size=(1, 60, 2))  # a prompt is as hard for both
        methods = {
            name: Points(
                np.array([[[0.5, 0.0]], [[0.3, 0.3]], [[0.0, 0.5]]]) + shared + 0.5 * rng.normal(size=(3, 60, 2)),
                np.array([[1, 0], [0.5, 0.5], [0, 1]]), np.zeros(3),
            )
            for name in ("a", "b")
        }  # fmt: skip
        found = bootstrap(
            lambda means: hypervolume(means["a"], corner) - hypervolume(means["b"], corner),
            methods, resampled(60, 200, trial),
        )  # fmt: skip
        low, high = interval(found, 0.95)
        inside += low <= 0 <= high
        p_values.append(p_value(found, 0.0))
    assert 0.90 <= inside / trials <= 0.99
    assert np.mean(np.array(p_values) < 0.05) < 0.1


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, 1), min_size=1, max_size=6))
def test_a_correction_only_raises_and_keeps_the_order(p_values) -> None:
    found = holm(p_values)
    assert list(found) == list(p_values)
    for a, b in itertools.product(p_values, repeat=2):
        assert p_values[a] <= found[a] <= 1
        if p_values[a] <= p_values[b]:
            assert found[a] <= found[b]
    smallest = min(p_values, key=p_values.__getitem__)
    assert found[smallest] == pytest.approx(min(1.0, len(p_values) * p_values[smallest]))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Prompts, rewards and a head of the chat model."""
    folder = tmp_path_factory.mktemp("pareto")
    (folder / "rewards.py").write_text(REWARDS)
    kinds = ["harmful", "helpful"]
    rows = [{"id": str(i), "prompt": f"w{i} w{i + 1}", "kind": kinds[i % 2]} for i in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_chat_and_head(folder)
    return folder


def config(place: Path, output: Path, **changes) -> ParetoConfig:
    given_settings = {
        "prompts": str(place / "prompts.jsonl"), "output": str(output / "pareto.json"),
        "completions": str(output / "cells"), "model": str(place / "chat"), "value_functions": str(place / "head"),
        "rewards": {name: f"{place / 'rewards.py'}:{name}" for name in ("ones", "twos")},
        "methods": {
            "head": {"beta": [1.0, 3.0], "top_k": None, "normalize": "none"},
            "prompt": {"system": {"ones": "w1 w5", "twos": "w2 w6"}},
            "best of n": {"samples": [4]},
        },
        "steps": 2, "resamples": 50, "seeds": [0], "max_new_tokens": 6, "batch_size": 24, "limit": None,
    } | changes  # fmt: skip
    return ParetoConfig(**given_settings)


def test_a_whole_run(place, tmp_path) -> None:
    results = pareto(config(place, tmp_path), chat_model())
    assert len(results["cells"]) == 3 * 2 + 3 + 3
    assert results["methods"]["head"]["hypervolume"] > 0
    low, high = results["methods"]["prompt"]["ratio_interval"]
    assert low <= high
    best = results["cells"]["best of n - ones 1, twos 0 - samples 4"]
    assert best["gains"]["ones"] > 0.5  # the best of four by that very reward
    assert best["kl"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-3)
    cells = {path.name for path in (tmp_path / "cells").iterdir()}
    assert "head - ones 0.5, twos 0.5 - beta 3.0.json" in cells
    page = (tmp_path / "pareto.html").read_text()
    assert page.count("<circle") == 2 * 12
    assert "<script" not in page
    shown = re.findall("<summary>(.*?)</summary>", page)
    assert shown == [f"w{i} w{i + 1}" for i in (1, 3, 5, 7, 9, 11)]  # none of the harmful kind
    assert {path.name for path in tmp_path.glob("pareto.*")} == {
        f"pareto.{end}" for end in ("json", "md", "png", "html")
    }
    assert (tmp_path / "pareto.png").stat().st_size > 1000
    table = (tmp_path / "pareto.md").read_text()
    assert "| head |" in table
    again = pareto(config(place, tmp_path / "again"), chat_model())  # the same numbers from nothing
    for name, cell in results["cells"].items():
        assert again["cells"][name]["gains"] == cell["gains"]
    assert again["methods"] == results["methods"]


def test_methods_of_another_run_are_compared_as_if_they_were_of_this_one(place, tmp_path) -> None:
    prompts, best = ({name: config(place, tmp_path).methods[name]} for name in ("prompt", "best of n"))

    def run(name: str, **changes) -> dict:
        return pareto(config(place, tmp_path / name, **changes), chat_model())

    expected, other = run("whole", methods=best | prompts), tmp_path / "first" / "pareto.json"
    results = run("first", methods=prompts)
    found = run("rest", methods=best, beside=[str(other)])
    assert found["methods"] == expected["methods"]
    assert found["cells"].keys() == expected["cells"].keys()
    for changes, message in (
        ({"seeds": [1]}, r"was measured with seeds \[0\], this run has \[1\]"),
        ({"methods": prompts}, "both measure prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            run("other", beside=[str(other)], **{"methods": best} | changes)
    assert not (tmp_path / "other").exists()  # told before anything is computed
    for change, message in (
        (lambda: results["unsteered"]["ones"].update(reward=-7.0), "the unsteered model has ones -7.0000 in"),
        (lambda: results["cells"]["prompt - ones 1, twos 0"].pop("by_prompt"), "run it again with this version"),
        (results.clear, "holds no results of mavis pareto"),
    ):
        change()
        other.write_text(json.dumps(results))
        with pytest.raises(ValueError, match=message):
            run("rest", methods=best, beside=[str(other)])


def test_the_best_of_n_is_the_best_by_the_weighted_reward(place, tmp_path) -> None:
    given_settings = config(place, tmp_path, methods={"n": {"samples": [3]}})
    results = pareto(given_settings, chat_model())
    plain = json.loads((tmp_path / "cells" / "unsteered.rewards.json").read_text())["rewards"]
    for name, cell in results["cells"].items():
        kept = json.loads((tmp_path / "cells" / f"{name}.rewards.json").read_text())["rewards"]
        standard = {
            o: (np.array(kept[o]["values"]) - np.mean(plain[o]["values"])) / np.std(plain[o]["values"])
            for o in ("ones", "twos")
        }
        for prompt, row in enumerate(cell["which"]):
            utility = [
                sum(cell["weights"][o] * standard[o][i] for o in standard) for i in range(3 * prompt, 3 * prompt + 3)
            ]
            assert row == 3 * prompt + int(np.argmax(utility))


def test_lambda_goes_where_the_method_has_its_place(place, tmp_path) -> None:
    methods = {
        "soup": {"adapters": {"ones": "x/a", "twos": "x/b"}},
        "mod": {"mixture": {"ones": "x/a", "twos": "x/b"}, "temperature": 0.7},
        "genarm": {"token_rewards": {"ones": "x/a", "twos": "x/b"}, "strength": [1, 2]},
        "prompt": {"system": {"ones": "One.", "twos": "Two.", "0.5,0.5": "Both."}},
        "morlhf": {"by_weights": {"0,1": {"adapters": {"x/c": 1.0}}}},
        "shown": {"by_weights": {"0,1": {"examples": [["q", "two"], ["p", "twos"]]}}},
        "ours": {"beta": 2.0, "system": {"ones": "One.", "twos": "Two."}},
    }
    given_settings = config(place, tmp_path, methods=methods)
    cells = {cell.name: cell.setting for cell in given_settings.cells()}
    assert cells["soup - ones 0.5, twos 0.5"] == {"adapters": {"x/a": 0.5, "x/b": 0.5}}
    assert cells["soup - ones 0, twos 1"] == {"adapters": {"x/a": 0.0, "x/b": 1.0}}
    assert cells["mod - ones 1, twos 0"] == {"mixture": {"x/a": 1.0, "x/b": 0.0}, "temperature": 0.7}
    assert cells["genarm - ones 0.5, twos 0.5 - strength 2"] == {"token_rewards": {"x/a": 1.0, "x/b": 1.0}}
    assert cells["prompt - ones 0.5, twos 0.5"] == {"system": "Both."}
    assert cells["prompt - ones 1, twos 0"] == {"system": "One."}
    assert cells["ours - ones 0.5, twos 0.5"] == {
        "beta": 2.0, "system": "One. Two.", "weights": {"ones": 0.5, "twos": 0.5}
    }  # fmt: skip
    assert [name for name in cells if name.startswith("morlhf")] == ["morlhf - ones 0, twos 1"]
    assert cells["shown - ones 0, twos 1"] == {"examples": [["q", "two"], ["p", "twos"]]}  # no values to try
    assert given_settings.missing() == [f"{name} - {key}" for name in ("morlhf", "shown") for key in ("0.5,0.5", "1,0")]


@pytest.mark.parametrize("objectives", [["ones", "twos"], ["twos", "ones"]])
def test_a_weighting_by_names_means_the_same_in_any_order(place, tmp_path, objectives) -> None:
    mixed = {"adapters": {"x/c": 0.3, "x/d": 0.7}}
    methods = {
        "soup": {"by_weights": {"twos 0.75, ones 0.25": mixed, "ones 1": {"adapters": {"x/c": 1.0}}}},
        "prompt": {"system": {"ones": "One.", "twos": "Two.", "ones 0.25,twos 0.75": "Both."}},
    }
    made = config(place, tmp_path, methods=methods, objectives=objectives, steps=4)
    found = {(cell.method, cell.weights["ones"]): cell.setting for cell in made.cells()}
    assert {key for key in found if key[0] == "soup"} == {("soup", 0.25), ("soup", 1.0)}
    assert found["soup", 0.25] == mixed
    assert found["prompt", 0.25] == {"system": "Both."}
    assert found["prompt", 0.0] == {"system": "Two."}
    assert found["prompt", 0.75] == {"system": "One. Two."}


@given(st.integers(1, 6), st.integers(2, 3))
def test_weightings_are_all_of_a_grid(steps, count) -> None:
    names = ["a", "b", "c"][:count]
    made = ParetoConfig("p", "o", "c", dict.fromkeys(names, "r.py:f"), {"x": {"temperature": 0.7}}, steps=steps)
    found = made.lambdas()
    assert len(found) == math.comb(steps + count - 1, count - 1)
    assert len({tuple(weights.values()) for weights in found}) == len(found)
    for weights in found:
        assert sum(weights.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ["ones"]}, "two or three of the rewards"),
        ({"objectives": ["ones", "threes"]}, "two or three of the rewards"),
        ({"methods": {}}, "methods must name"),
        ({"methods": {"x": {"bta": 1.0}}}, "the method 'x': .*bta"),
        ({"methods": {"x": {"adapters": {"ones": "a"}}}}, "must have an entry for the objective 'twos'"),
        ({"methods": {"x": {}}}, "it says nothing"),
        ({"methods": {"x": {"by_weights": {"0.1,0.9": {"adapters": {"a": 1.0}}}}}}, "none of the weightings"),
        ({"methods": {"x": {"by_weights": {"one 1": {"adapters": {"a": 1.0}}}}}}, "'one 1' names one; the objectives"),
        ({"against": "x"}, "against must be one of"),
        ({"level": 1.0}, "level must be"),
        ({"most_kl": 0.0}, "most_kl above 0"),
    ],
)
def test_settings_that_are_none_are_refused(place, tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(place, tmp_path, **changes)


def test_too_few_prompts_and_rewards_without_units_are_refused(place, tmp_path) -> None:
    with pytest.raises(ValueError, match="too few to say how sure"):
        pareto(config(place, tmp_path, limit=5), chat_model())
    rewards = {name: f"{place / 'rewards.py'}:{name}" for name in ("ones", "same")}
    methods = {"hot": {"temperature": 1.5}}
    with pytest.raises(ValueError, match="same does not vary"):
        pareto(config(place, tmp_path, rewards=rewards, methods=methods), chat_model())
