"""`mavis verify`: passes on what works, and fails on what does not."""

from __future__ import annotations

import torch

from chat_model import chat_model
from mavis_logits import MavisLogitsProcessor, cli
from mavis_logits.commands import verify as module
from mavis_logits.commands.verify import verify
from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_model import ValueModel

WORDS = ("w1 w2 w3", "w4", "w5 w6 w7 w8")


def processor(monkeypatch, kind: str = "head", **settings):
    monkeypatch.setattr(module, "PROMPTS", WORDS)
    model, tokenizer = chat_model()
    torch.manual_seed(0)
    if kind == "head":
        value = ValueHead.for_model(model, ["a"], width=16)
        torch.nn.init.normal_(value.out.weight)
    else:
        value = ValueModel.from_backbone(chat_model()[0], ["a"])
        torch.nn.init.normal_(value.head.weight)
    return model, tokenizer, MavisLogitsProcessor(value, model=model, tokenizer=tokenizer, beta=3.0, **settings)


def test_what_works_passes_and_is_put_back(monkeypatch) -> None:
    for kind in ("head", "model"):
        model, tokenizer, mavis = processor(monkeypatch, kind)
        before = mavis.config, mavis.weights.tolist(), float(mavis.beta)
        checks = verify(model, tokenizer, mavis, tokens=6, runs=1)
        assert [check.passed for check in checks] == [True] * 4, checks
        assert (mavis.config, mavis.weights.tolist(), float(mavis.beta)) == before


def test_values_that_differ_nowhere_do_not_fire(monkeypatch) -> None:
    model, tokenizer, mavis = processor(monkeypatch, top_k=None)
    with torch.no_grad():
        mavis.functions.all[0].out.weight.zero_()
    checks = {check.name: check.passed for check in verify(model, tokenizer, mavis, tokens=5, runs=1)}
    assert not checks["steering fires"]
    assert checks["strength 0 is the model itself"]


def test_a_processor_that_touches_its_neighbours_is_found(monkeypatch) -> None:
    model, tokenizer, mavis = processor(monkeypatch)
    call = type(mavis).__call__

    def leaking(self, input_ids, scores):
        found = call(self, input_ids, scores)
        return found + 0.1 * torch.linspace(0, 1, found.shape[1]) if self.beta.ndim else found

    monkeypatch.setattr(type(mavis), "__call__", leaking)
    checks = {check.name: check.passed for check in verify(model, tokenizer, mavis, tokens=5, runs=1)}
    assert not checks["neighbours in a batch are untouched"]
    assert checks["strength 0 is the model itself"]


def test_the_command_prints_one_block_and_tells_by_its_status(tmp_path, monkeypatch, capsys) -> None:
    model, tokenizer, mavis = processor(monkeypatch)
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    head = mavis.functions.all[0]
    head.save_pretrained(tmp_path / "head")
    words = ["verify", "--model", str(tmp_path / "chat"), "--values", str(tmp_path / "head"), "--max-new-tokens", "5"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("```\nmavis verify: ")
    assert shown.count("\nok  ") == 4
    with torch.no_grad():
        head.out.weight.zero_()
    head.config.settings = {"top_k": None}
    head.save_pretrained(tmp_path / "head")
    assert cli.main(words) == 1
    assert "FAIL steering fires" in capsys.readouterr().out
