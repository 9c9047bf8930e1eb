from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from chat_model import chat_model
from mavis_logits.models import load_chat_model
from mavis_training.collect import CollectConfig, collect
from mavis_training.sft import SftConfig, encode_pair, examples, sft
from mavis_training.train_model import LoraSettings
from tiny_models import tiny_llama, tiny_tokenizer


@pytest.fixture
def config(tmp_path):
    """Questions that are all answered with the same four words."""
    rows = [{"id": f"p{i}", "prompt": f"w{i} w{i * 7 % 40}", "completion": "w5 w6 w7 w8"} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SftConfig(
        [str(path)], str(tmp_path / "tuned"), batch_size=4, learning_rate=0.02, validation_share=0.2, epochs=3,
        lora=LoraSettings(rank=8, alpha=16, dropout=0.0), device="cpu",
    )  # fmt: skip


def saved_base(tmp_path, tokenizer=None):
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    (tokenizer or chat_model()[1]).save_pretrained(folder)
    return str(folder)


def test_the_model_learns_the_answer_and_collects(config, tmp_path):
    config = dataclasses.replace(config, model=saved_base(tmp_path))
    sft(config)
    metrics = json.loads((tmp_path / "tuned" / "metrics.json").read_text())
    assert metrics["training_examples"] + metrics["validation_examples"] == 40
    losses = [entry["loss"] for entry in metrics["log"] if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert metrics["validation_loss"] < losses[0] / 2
    assert not (tmp_path / "tuned" / "checkpoints").exists()

    model, tokenizer = load_chat_model(config.output)
    assert type(model) is LlamaForCausalLM
    sampling = {"layers": 1, "root_children": 2, "max_new_tokens": 8, "device": "cpu"}
    store = collect(CollectConfig(config.data[0], str(tmp_path / "trees"), config.output, limit=10, **sampling))
    texts = [tokenizer.decode(tree.completion(leaf)) for tree in store for leaf in tree.leaves()]
    assert sum(text.startswith("w5") for text in texts) > len(texts) / 4  # one in fifty before


@pytest.mark.parametrize("template", ["auto", "none"])
def test_only_the_completion_and_its_end_count(template):
    _, tokenizer = chat_model()
    row = {"prompt": "w1 w2", "completion": "w3 w4"}
    example = encode_pair(row, tokenizer, template)
    read = tokenizer.decode(example["input_ids"])
    counted = [i for i, mask in zip(example["input_ids"], example["completion_mask"], strict=True) if mask]
    assert tokenizer.decode(counted) == "w3 w4 <eos>"
    assert read == ("w1 w1 w2 w2 w3 w4 <eos>" if template == "auto" else "w1 w2 w3 w4 <eos>")


def test_a_template_that_ends_the_turn_by_itself():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}w2 {% endif %}"
    )
    turns = [{"role": role, "content": f"w{i + 7}"} for i, role in enumerate(["user", "assistant", "user"])]
    example = encode_pair({"prompt": "w9", "conversation": turns, "completion": "w3"}, tokenizer, "auto")
    assert tokenizer.decode(example["input_ids"]) == "w1 w7 <eos> w2 w8 <eos> w1 w9 <eos> w2 w3 <eos>"
    assert sum(example["completion_mask"]) == 2


def test_labels_in_the_trainer_are_masked_outside_the_completion(config, monkeypatch):
    from mavis_training import sft as module

    seen = {}

    class Trainer(module.SFTTrainer):
        def train(self, **kwargs):
            seen["batch"] = self.data_collator([self.train_dataset[i] for i in range(4)])
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "SFTTrainer", Trainer)
    with pytest.raises(KeyboardInterrupt):
        sft(config, *chat_model())
    ids, labels = seen["batch"]["input_ids"], seen["batch"]["labels"]
    answer = torch.tensor([8, 9, 10, 11, 1])
    for row, label in zip(ids, labels, strict=True):
        assert torch.equal(label[label != -100], answer)
        assert torch.equal(row[label != -100], answer)


def test_an_adapter_alone_loads_as_a_model(config, tmp_path):
    config = dataclasses.replace(config, model=saved_base(tmp_path), merge=False, epochs=1)
    tuned = sft(config)
    assert (tmp_path / "tuned" / "adapter_config.json").is_file()
    model, _ = load_chat_model(config.output)
    ids = torch.tensor([[4, 8, 5]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tuned(ids).logits, atol=1e-4, rtol=1e-4)


def test_it_stops_at_a_step_or_when_validation_no_longer_improves(config):
    sft(dataclasses.replace(config, stop_at_step=4, eval_steps=3, lora=LoraSettings(rank=0)), *chat_model())
    path = Path(config.output) / "metrics.json"
    metrics = json.loads(path.read_text())
    assert metrics["steps"] == 4
    patient = dataclasses.replace(config, eval_steps=2, patience=1, learning_rate=100.0, epochs=3, fresh=True)
    sft(patient, *chat_model())
    metrics = json.loads(path.read_text())
    losses = [entry["eval_loss"] for entry in metrics["log"] if "eval_loss" in entry]
    assert metrics["steps"] < 3 * metrics["training_examples"] // 4
    assert metrics["validation_loss"] == pytest.approx(min(losses), abs=1e-4)


def test_a_killed_run_goes_on(config, monkeypatch):
    from mavis_training import sft as module

    whole = dataclasses.replace(config, eval_steps=3, epochs=1)
    expected = sft(dataclasses.replace(whole, output=config.output + "-whole"), *chat_model()).state_dict()
    monkeypatch.setattr(module, "_callbacks", lambda c: [module.StopAtStep(5)])
    monkeypatch.setattr(module.SFTTrainer, "evaluate", lambda *a, **k: {"eval_loss": 0.0})
    monkeypatch.setattr(module, "_save", lambda *a: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        sft(whole, *chat_model())
    monkeypatch.undo()
    resumed = sft(whole, *chat_model()).state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(resumed[name], weight)


def test_bad_input(config, tmp_path):
    for settings, message in (
        ({"data": []}, "data is empty"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"validation_share": 0.0}, "between 0 and 1"),
        ({"dtype": "float33"}, "dtype must name a torch dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **settings)
    rows = [{"prompt": "w1", "completion": "w2"}] * 3
    with pytest.raises(ValueError, match=r"of 3 examples, 3 have more than 2 tokens; 0 are left for training"):
        examples(rows, tiny_tokenizer(), dataclasses.replace(config, max_length=2))
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "w1"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl: the row 'a' has no completion"):
        sft(dataclasses.replace(config, data=[str(tmp_path / "prompts.jsonl")]), *chat_model())


def test_an_interrupted_fine_tuning_refuses_other_settings_and_a_finished_one_is_not_done_again(config, monkeypatch):
    from mavis_training import sft as module

    class Interrupted(module.SFTTrainer):
        def _save_checkpoint(self, *arguments, **options):
            super()._save_checkpoint(*arguments, **options)
            raise KeyboardInterrupt

    config = dataclasses.replace(config, epochs=2, lora=LoraSettings(rank=0), learning_rate=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(module, "SFTTrainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            sft(config, *chat_model())
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001, is now 1e-09") as refused:
        sft(dataclasses.replace(config, learning_rate=1e-9), *chat_model())
    assert "fresh: true" in str(refused.value)
    done = sft(config, *chat_model())
    monkeypatch.setattr(module.SFTTrainer, "train", lambda *a, **k: pytest.fail("it is finished"))
    ids = torch.tensor([[4, 8, 5]])
    with torch.no_grad():
        torch.testing.assert_close(sft(config, *chat_model())(ids).logits, done(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"), [({"learning_rate": 1e18}, "diverged"), ({"dtype": "bfloat16"}, "bf16: true")]
)
def test_what_cannot_work_is_not_saved(config, changes, message):
    config = dataclasses.replace(config, lora=LoraSettings(rank=0), epochs=1, **changes)
    model, tokenizer = chat_model()
    with pytest.raises(ValueError, match=message):
        sft(config, model.to(getattr(torch, config.dtype)), tokenizer)
    assert not list(Path(config.output).glob("*.safetensors"))
