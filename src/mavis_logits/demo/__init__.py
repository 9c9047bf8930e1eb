"""A small real language model to try the library on, without a network."""

from mavis_logits.demo.smollm2 import load_chat_model, load_smollm2

__all__ = ["load_chat_model", "load_smollm2"]
