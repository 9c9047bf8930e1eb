"""Tiny models that read any text: byte tokenizers, a chat template, and folders as documentation names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mavis_logits import ValueHead, ValueModel
from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.core.config import MavisConfig
from mavis_logits.hub.bundle import BUNDLE_FILE, Bundle, BundleEntry

OBJECTIVES = ["helpful", "harmless", "humour", "concise", "positive", "formal"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(
    merges: list[tuple[str, str]], specials: dict[str, str], begins: bool = False, shift: int = 0
) -> Any:
    """Bytes and some merges of them; `specials` come first, by role (a name that ends in _token) or under any name."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = letters[shift:] + letters[:shift]
    vocabulary = {token: i for i, token in enumerate([*specials.values(), *letters, *(a + b for a, b in merges)])}
    backend = Tokenizer(BPE(vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if begins:
        bos = specials["bos_token"]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    own = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left")
    more = [token for role, token in specials.items() if not role.endswith("_token")]
    own.add_special_tokens(
        {role: token for role, token in specials.items() if role.endswith("_token")} | {"extra_special_tokens": more}
    )
    own.model_input_names = ["input_ids", "attention_mask"]
    return own


def byte_llama(vocabulary: int, seed: int, **more: Any) -> Any:
    """A random Llama of width 32 whose ids 0, 1 and 2 pad, end and begin texts."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape, **ids, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def chat_tokenizer() -> Any:
    """With SmolLM2's turns."""
    own = byte_tokenizer(
        [], {"pad_token": "<pad>", "eos_token": "<|im_end|>", "bos_token": "<s>", "turn": "<|im_start|>"}
    )
    own.chat_template = TEMPLATE
    return own


def lay_out(folder: Path) -> tuple[Any, Any]:
    """Write what the pages name into `folder`: models, value functions, prompts. Returns model and tokenizer."""
    tokenizer = chat_tokenizer()
    model = byte_llama(len(tokenizer), seed=0, max_position_embeddings=512)
    of_base = {"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer), "base_model": "org/model-or-folder"}
    for place in ("org/model-or-folder",):
        model.save_pretrained(folder / place)
        tokenizer.save_pretrained(folder / place)
    torch.manual_seed(1)
    settings = {"beta": 5.6, "top_k": 200, "normalize": "standard"}
    head = ValueHead.for_model(model, OBJECTIVES, width=16, settings=settings, **of_base)
    head.save_pretrained(folder / "model_cards" / "smollm2-135m-value-head")
    entries = {name: BundleEntry(subfolder="smollm2-135m-value-head") for name in OBJECTIVES}
    bundle = Bundle(entries, MavisConfig.from_dict(settings)).to_json()
    (folder / "model_cards" / BUNDLE_FILE).write_text(bundle, encoding="utf-8")
    for name in ("helpful", "humour"):
        value_model = ValueModel.from_backbone(model, [name], num_layers=1, **of_base)
        with torch.no_grad():
            value_model.head.weight.normal_(std=0.5)
        value_model.save_pretrained(folder / "model_cards" / f"smollm2-135m-value-{name}")
    things = ["tea", "milk", "rain", "snow", "wood", "iron", "salt", "wool", "corn", "rice", "fire", "time"]
    asked = ("What is", "Why is there", "Who has", "How much is", "Is it")
    questions = [f"{ask} {what}?" for what in things for ask in asked]
    (folder / "prompts.txt").write_text("\n".join(questions), encoding="utf-8")
    return model, tokenizer
