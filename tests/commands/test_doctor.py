"""`mavis doctor` without a model, and for programs."""

from __future__ import annotations

import json

import pytest

from chat_model import chat_model
from mavis_logits import cli
from mavis_logits.commands import doctor
from mavis_logits.values.value_head import ValueHead


def test_without_a_model_it_tells_what_is_there(capsys) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert "cpu" in found["devices"]
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"transformers      {found['versions']['transformers']}" in shown
    assert "extra vllm" in shown


def test_what_is_missing_is_told_with_what_to_type(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "rich" else "1.0")
    assert 'not there: rich; pip install "mavis-logits[demo]"' in "\n".join(doctor.described(doctor.environment()))


def test_value_functions_in_the_cache_are_found(tmp_path, monkeypatch) -> None:
    model, _ = chat_model()
    snapshot = tmp_path / "models--org--my-head" / "snapshots" / "abc"
    ValueHead.for_model(model, ["a"], width=8).save_pretrained(snapshot)
    refs = tmp_path / "models--org--my-head" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    other = tmp_path / "models--org--plain" / "snapshots" / "def"
    model.save_pretrained(other)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert doctor.environment()["value_functions"] == ["org/my-head"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert doctor.environment()["value_functions"] == []


def test_of_a_model_it_tells_the_same_as_fields(tmp_path, capsys) -> None:
    model, _ = chat_model()
    model.save_pretrained(tmp_path)
    assert cli.main(["doctor", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["value model"].startswith("packed")
    assert found["packed training"] == "yes"


def test_lines_without_a_name_go_on_with_the_one_before() -> None:
    assert doctor.as_fields(["model             x", "                  more"]) == {"model": "x; more"}
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--jsn"])
