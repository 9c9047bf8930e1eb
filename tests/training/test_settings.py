from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from mavis_training.base.settings import from_mapping
from mavis_training.cli import check_recipe, read_config


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    name: str | None = None

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must be at least 0, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner = field(default_factory=Inner)
    perhaps: Inner | None = None
    several: list[Inner] = field(default_factory=list)


def test_nested_mappings_become_dataclasses():
    content = {"count": 3, "inner": {"rate": 1}, "perhaps": {"name": "x"}, "several": [{"rate": 2.0}]}
    expected = Outer(3, Inner(1.0), Inner(name="x"), [Inner(2.0)])
    assert from_mapping(Outer, content, "here") == expected
    assert from_mapping(Outer, {"count": 3}, "here") == Outer(3)


def test_a_recipe_nests_as_well(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("count: 3\nperhaps: {name: x}\nseveral:\n  - rate: 2e-3\n")
    assert read_config(Outer, ["--config", str(path)], "test") == Outer(3, Inner(), Inner(name="x"), [Inner(0.002)])
    path.write_text("count: 3\nseveral:\n  - {}\n  - rat: 2e-3\n")
    with pytest.raises(ValueError, match=r"several\[1\] has the unknown key 'rat': did you mean 'rate'"):
        check_recipe(path, Outer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cuont": 3}, "here has the unknown key 'cuont': did you mean 'count'"),
        ({"count": 1, "inner": {"rat": 1}}, "here, inner has the unknown key 'rat': did you mean 'rate'"),
        ({"count": 1, "perhaps": {"nme": 1}}, "here, perhaps has the unknown key 'nme': did you mean 'name'"),
        ({"count": 1, "several": [{}, {"rat": 1}]}, r"here, several\[1\] has the unknown key 'rat'"),
        ({"count": "many"}, "here: .*count"),
        ({"count": 1, "inner": {"rate": "fast"}}, "here: .*rate"),
        ({}, "here: .*count"),
        ({"count": 1, "inner": {"rate": -1}}, "here: rate must be at least 0, got -1"),
        ({"count": 1, "several": [{"rate": -1}]}, "here: rate must be at least 0, got -1"),
    ],
)
def test_errors_say_where(content, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(Outer, content, "here")
