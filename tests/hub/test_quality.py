"""What validation says of a value function decides whether it becomes a part of something: if it says anything."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from mavis_logits.hub.quality import foresight, require_foresight


def folder_of(path: Path, r2: float, trees: int) -> Path:
    (path / "config.json").write_text(json.dumps({"objectives": ["a"]}))
    (path / "metrics.json").write_text(json.dumps({"a": {"r2": r2}, "trees": trees}))
    return path


def test_one_that_foresees_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a \(R2 -0.20\) worse than their mean on held-out trees.*--allow-weak"):
        require_foresight(folder_of(tmp_path, -0.2, trees=8))


def test_too_few_trees_say_nothing_and_that_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="seen on 3 held-out trees only, too few to say"):
        require_foresight(folder_of(tmp_path, -0.2, trees=3))


def test_one_that_foresees_something_is_taken(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_foresight(folder_of(tmp_path, 0.1, trees=8))
        require_foresight(tmp_path / "elsewhere")  # one without metrics


@pytest.mark.parametrize(
    ("r2", "accuracy", "words"),
    [
        (-0.1, 0.9, "not worth using"),
        (0.1, 0.5, "steering by it is a gamble"),
        (0.5, 0.5, "no more than chance where trees branch: measure what it does"),
        (0.1, 0.8, "good"),
    ],
)
def test_a_judgement_in_words(r2, accuracy, words):
    assert words in foresight({"r2": r2, "ranking": {"accuracy": accuracy, "pairs": 400}})
