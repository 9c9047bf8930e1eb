"""What is expected of every model type: that all is exact, but for the exceptions named here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Verdicts other than "exact" that are right for any type. What packed trees cost a type is speed alone: it is trained
# on one sequence a node.
_ALLOWED = {"packed": {"refused"}, "lora": {"-"}, "states": {"-"}}

# By check and type: the verdict, and why it is no other.
_NOT_BUILT: dict[str, str] = {
    "blt": "its tokens are bytes that a second model groups; it has no configuration without weights of both",
    "dots3_note": "the shrunk sizes of its vision and audio towers contradict each other (dots3_note_text is tried)",
    "gemma3n": "needs the package timm for its vision tower (gemma3n_text is tried)",
    "gemma4_assistant": "drafts for another model, whose keys it reads; it cannot write alone",
    "gemma4_unified_assistant": "drafts for another model, whose keys it reads; it cannot write alone",
    "musicgen": "writes music, not text; transformers builds its decoder from another configuration",
    "musicgen_melody": "writes music, not text; transformers builds its decoder from another configuration",
    "xlstm": "fails in transformers at the shapes of its own states without the package xlstm",
}
EXCEPTIONS: dict[tuple[str, str], tuple[str, str]] = {
    (name, "built"): ("crash", why) for name, why in _NOT_BUILT.items()
}


def expect(names: Iterable[str], checks: Iterable[str], verdict: str, why: str) -> None:
    """Note an exception."""
    checks = list(checks)
    EXCEPTIONS.update({(name, check): (verdict, why) for name in names for check in checks})


def why(name: str, check: str) -> str:
    """The reason of an exception; empty if there is none."""
    return EXCEPTIONS.get((name, check), ("", ""))[1]


def unexpected(row: Mapping[str, Any]) -> list[str]:
    """What is not as expected in the row of a type."""
    found = []
    for check, cell in row["cells"].items():
        expected = EXCEPTIONS.get((row["name"], check), ("exact", ""))[0]
        if cell["verdict"] != expected and cell["verdict"] not in _ALLOWED.get(check, set()):
            found.append(f"{check}: expected {expected}, got {cell['verdict']} ({cell['detail']})")
    return found


_AS_VALUE_MODEL = ("value", "value_sampling", "states", "reload", "truncated", "lora", "packed", "nodes")
_INNER = ("processor_inner", "sampling_inner")

expect(
    ["cpmant", "paligemma", "xlnet"], _AS_VALUE_MODEL, "refused",
    "it reads text in both directions, so that no state is of what was written so far",
)  # fmt: skip
expect(
    ["cpmant"], _INNER, "refused", "its decoder's layers lie inside an encoder, and start from a prompt of their own"
)
expect(["xlnet"], _INNER, "-", "it has two streams of hidden states, and writes from the second")
expect(["hrm_text"], _INNER, "refused", "its layers run in cycles, so that none is the state after so many")
expect(["hrm_text"], ["truncated"], "refused", "its layers run in cycles, so that none comes first")
expect(["dory"], (*_INNER, "truncated"), "refused", "some of its layers run several times, one after another")
expect(["reformer"], (*_INNER, "truncated"), "refused", "its layers are reversible and pass on two states at once")
expect(
    ["reformer"], ("packed", "nodes"), "crash",
    "transformers trains it only on texts whose length is a multiple of its chunks",
)  # fmt: skip
expect(
    ["prophetnet"],
    (*_INNER, "truncated"),
    "refused",
    "its layers pass on the states of several streams of n-grams at once",
)
expect(
    ["zamba", "zamba2"], ["lora"], "refused", "one layer runs several times, each time with other adapters of its own"
)  # fmt: skip
_ALONE = {
    "falcon_h1": "transformers cannot run one layer of it alone",
    "gpt_neox_japanese": "only its last layer has a bias, so that the first alone is another layer",
    "longcat_flash": "its configuration counts half layers",
    "minicpm3": "it scales what its layers add by their number, so that fewer are other layers",
    "dots3_note_text": "its configuration names layers by number that would be gone",
    "nemotron_h": "its configuration has no number of layers, only their kinds",
    "olmo_hybrid": "transformers wants a layer of attention among them, and the first is recurrent",
    "rwkv": "transformers cannot make it with a single layer",
}
_GEMMA_4 = ("gemma4", "gemma4_text", "gemma4_text+kvshared", "gemma4_unified", "gemma4_unified_text")
_ALONE |= dict.fromkeys(_GEMMA_4, "its last layer has to be one of full attention, and the first is not")
for _name, _reason in _ALONE.items():
    expect([_name], ["truncated"], "refused", _reason)
