"""Every argument of `generate` with what becomes of it here. `docs/generate.md` is made of this.

PYTHONPATH=src:training:tests python tests/generate_table.py > docs/generate.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)

from strategy_checks import Collector, StopAfter, letter_tokenizer
from tiny import EOS, PAD, VOCABULARY, make_base

WORKS, REFUSED, GENERATE, UNREAD = "works", "refused", "refused by generate", "not read"
ENDS = [EOS, *range(40, 50)]  # so that some rows end early
PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [PAD, PAD, PAD, 10, 11], [PAD, 12, 13, 14, 15]])
Case = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """An argument.

    Attributes:
        name: of the argument.
        processor, sampling, searches: what becomes of it with `MavisLogitsProcessor`, `MavisSampling`, and the others.
        note: a word of reason.
        case: arguments of a call with it.
        one: whether only one prompt may be given.
        strategies: the case for strategies, where it is another one.
    """

    name: str
    processor: str
    sampling: str
    searches: str
    note: str = ""
    case: Callable[[], Case] = dict
    one: bool = False
    strategies: Callable[[], Case] | None = None
    says: Mapping[str, str] = field(default_factory=dict)


def row(name: str, *verdicts: str, note: str = "", **more: Any) -> Row:
    """A row whose `case` may be given as a value of the argument, and one verdict for all strategies, or for all."""
    processor, sampling, searches = (verdicts * 3)[:3] if len(verdicts) == 1 else (*verdicts, verdicts[-1])[:3]
    if "value" in more:
        value = more.pop("value")
        more["case"] = lambda: {name: value}
    return Row(name, processor, sampling, searches, note, **more)


def with_sampling(**more: Any) -> Callable[[], Case]:
    return lambda: {"do_sample": True, "top_k": 0, **more}


def assisted(**more: Any) -> Callable[[], Case]:
    return lambda: {"assistant_model": make_base(seed=7), **more}


def negative() -> Case:
    ids = torch.tensor([[20, 21, 22, 23, 24], [25, 26, 27, 28, 29], [30, 31, 32, 33, 34]])
    return {"guidance_scale": 1.5, "negative_prompt_ids": ids}


def padded_negative() -> Case:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    return {**negative(), "negative_prompt_attention_mask": mask}


def allowed(batch: int, ids: torch.Tensor) -> list[int]:
    """Other tokens for every row, and what ends them."""
    return [*range(3 + batch, VOCABULARY, 3), EOS]


def grown_cache() -> Case:
    cache = DynamicCache()
    make_base()(PROMPTS[:1, :4], past_key_values=cache)
    return {"past_key_values": cache}


def healing_tokenizer() -> Any:
    tokenizer = letter_tokenizer()
    tokenizer.bos_token = "<unk>"
    return tokenizer


def soft_prompt() -> Case:
    return {"inputs_embeds": make_base().get_input_embeddings()(PROMPTS), "input_ids": None}


_BEAMS = "of generate's beam search; the searches here rank by values"
_HUB = "another way of decoding, which generate takes from the Hub"
_DRAFTS = "drafts change the speed, not the text; strategies decode without an assistant"
_READ_WITH_ASSISTANT = "read with an assistant only"
_CACHE = "strategies keep caches of their own"
_STATE = "a state of every row: the searches multiply rows"

FIELDS = [
    row("max_length", WORKS, case=lambda: {"max_length": 8, "max_new_tokens": None}),
    row("max_new_tokens", WORKS, value=3),
    row("min_length", WORKS, value=8),
    row("min_new_tokens", WORKS, value=3),
    row("max_time", WORKS, value=1000.0),
    row("stop_strings", WORKS, GENERATE, note="generate keeps the tokenizer from a strategy: give both to the strategy",
        case=lambda: {"stop_strings": list("ABCDEFGHIJ"), "tokenizer": letter_tokenizer()}),
    row("early_stopping", WORKS, REFUSED, note=_BEAMS, case=lambda: {"num_beams": 3, "early_stopping": True},
        strategies=lambda: {"early_stopping": True}),
    row("do_sample", WORKS, case=with_sampling()),
    row("num_beams", WORKS, REFUSED, note="use MavisBeamSearch, or generate's with a processor", value=3),
    row("num_beam_groups", GENERATE, REFUSED, note=_HUB, case=lambda: {"num_beams": 4, "num_beam_groups": 2},
        strategies=lambda: {"num_beam_groups": 2}),
    row("diversity_penalty", GENERATE, REFUSED, note=_HUB,
        case=lambda: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        strategies=lambda: {"diversity_penalty": 0.5}),
    row("length_penalty", WORKS, REFUSED, note=_BEAMS, case=lambda: {"num_beams": 3, "length_penalty": 2.0},
        strategies=lambda: {"length_penalty": 2.0}),
    row("penalty_alpha", GENERATE, REFUSED, note=_HUB, case=lambda: {"penalty_alpha": 0.6, "top_k": 4}),
    row("low_memory", UNREAD, REFUSED, note="of contrastive search", value=True),
    row("dola_layers", GENERATE, REFUSED, note=_HUB, value="low"),
    row("constraints", GENERATE, REFUSED, note=_HUB, case=lambda: {"constraints": [object()], "num_beams": 2},
        strategies=lambda: {"constraints": [1]}),
    row("force_words_ids", GENERATE, REFUSED, note=_HUB, case=lambda: {"force_words_ids": [[7]], "num_beams": 2},
        strategies=lambda: {"force_words_ids": [[7]]}),
    row("use_cache", WORKS, value=False),
    row("cache_implementation", WORKS, REFUSED, note=_CACHE, value="static"),
    row("cache_config", UNREAD, REFUSED, note=f"{_CACHE}; else of the quantized cache", value={"nbits": 4}),
    row("max_cache_len", WORKS, REFUSED, note=_CACHE,
        case=lambda: {"cache_implementation": "static", "max_cache_len": 32}, strategies=lambda: {"max_cache_len": 32}),
    row("prefill_chunk_size", WORKS, REFUSED, note="strategies read prompts in one piece", value=2),
    row("compile_config", WORKS, REFUSED, note="strategies do not compile the base model", value=CompileConfig()),
    row("disable_compile", WORKS, value=True),
    row("temperature", WORKS, note="before the tilt in strategies, behind it for a processor",
        case=with_sampling(temperature=0.7)),
    row("top_h", WORKS, note="as temperature", case=with_sampling(top_h=0.5)),
    row("top_k", WORKS, note="as temperature", case=lambda: {"do_sample": True, "top_k": 4}),
    row("top_p", WORKS, note="as temperature", case=with_sampling(top_p=0.7)),
    row("min_p", WORKS, note="as temperature", case=with_sampling(min_p=0.1)),
    row("typical_p", WORKS, note="as temperature", case=with_sampling(typical_p=0.7)),
    row("epsilon_cutoff", WORKS, note="as temperature", case=with_sampling(epsilon_cutoff=0.01)),
    row("eta_cutoff", WORKS, note="as temperature", case=with_sampling(eta_cutoff=0.01)),
    row("repetition_penalty", WORKS, value=1.5),
    row("encoder_repetition_penalty", WORKS, value=1.5),
    row("no_repeat_ngram_size", WORKS, value=1),
    row("encoder_no_repeat_ngram_size", WORKS, value=1),
    row("bad_words_ids", WORKS, value=[[50], [51, 52]]),
    row("renormalize_logits", WORKS, value=True),
    row("forced_bos_token_id", WORKS, case=lambda: {"input_ids": PROMPTS[:, -1:], "forced_bos_token_id": 17}),
    row("forced_eos_token_id", WORKS, value=EOS),
    row("remove_invalid_values", WORKS, value=True),
    row("exponential_decay_length_penalty", WORKS, value=(1, 1.5)),
    row("suppress_tokens", WORKS, value=list(range(50, 70))),
    row("begin_suppress_tokens", WORKS, value=list(range(50, 70))),
    row("sequence_bias", WORKS, value=[[[50], 5.0], [[51, 52], -5.0]]),
    row("token_healing", WORKS, GENERATE, note="generate keeps the tokenizer from a strategy", one=True,
        case=lambda: {"token_healing": True, "tokenizer": healing_tokenizer()}),
    row("guidance_scale", WORKS, WORKS, REFUSED, note=f"the guided scores are the reference. {_STATE}", value=1.5),
    row("watermarking_config", WORKS, WORKS, REFUSED, note=f"SynthID keeps {_STATE}; green lists work in all",
        case=with_sampling(watermarking_config=SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=2))),
    row("num_return_sequences", WORKS, case=with_sampling(num_return_sequences=2),
        note="the searches return the best, at most as many as they write"),
    row("output_scores", WORKS, WORKS, REFUSED, note="log pi; the searches take no single steps",
        case=lambda: {"output_scores": True, "return_dict_in_generate": True}),
    row("output_logits", WORKS, WORKS, REFUSED, note="a strategy's are the reference's",
        case=lambda: {"output_logits": True, "return_dict_in_generate": True}),
    row("output_attentions", WORKS, REFUSED, note="strategies keep none",
        case=lambda: {"output_attentions": True, "return_dict_in_generate": True}),
    row("output_hidden_states", WORKS, REFUSED, note="strategies keep none",
        case=lambda: {"output_hidden_states": True, "return_dict_in_generate": True}),
    row("return_dict_in_generate", WORKS, value=True),
    row("pad_token_id", WORKS, note="of ended rows; the processor tells padding by the attention mask, given model=",
        value=95),
    row("bos_token_id", UNREAD, note="a prompt of none: the call without a prompt begins with it", value=3),
    row("eos_token_id", WORKS, value=list(range(30, 90))),
    row("decoder_start_token_id", UNREAD, note="of encoder-decoders", value=3),
    row("prompt_lookup_num_tokens", WORKS, REFUSED, note=_DRAFTS, one=True,
        case=lambda: {"prompt_lookup_num_tokens": 2, "input_ids": torch.tensor([[5, 6, 7, 5, 6]])}),
    row("max_matching_ngram_size", WORKS, UNREAD, note="of prompt lookup", one=True,
        case=lambda: {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1, "eos_token_id": EOS},
        strategies=lambda: {"max_matching_ngram_size": 1}),
    row("num_assistant_tokens", WORKS, UNREAD, note=_READ_WITH_ASSISTANT, one=True,
        case=assisted(num_assistant_tokens=2), strategies=lambda: {"num_assistant_tokens": 2}),
    row("num_assistant_tokens_schedule", WORKS, UNREAD, note=_READ_WITH_ASSISTANT, one=True,
        case=assisted(num_assistant_tokens_schedule="heuristic"),
        strategies=lambda: {"num_assistant_tokens_schedule": "heuristic"}),
    row("assistant_confidence_threshold", WORKS, UNREAD, note=_READ_WITH_ASSISTANT, one=True,
        case=assisted(assistant_confidence_threshold=0.1), strategies=lambda: {"assistant_confidence_threshold": 0.1}),
    row("assistant_ensemble_weight", UNREAD, note=f"{_READ_WITH_ASSISTANT}, whose text it changes", value=0.5),
    row("assistant_lookbehind", UNREAD, note="read with an assistant of another tokenizer only", value=5),
    row("target_lookbehind", UNREAD, note="read with an assistant of another tokenizer only", value=5),
    row("assistant_early_exit", WORKS, REFUSED, note=_DRAFTS, one=True, value=1),
    row("use_mtp", GENERATE, REFUSED, note="of models with layers for it", value=True, one=True),
    row("speculation_type", UNREAD, REFUSED, note=_READ_WITH_ASSISTANT, value="dflash"),
    row("is_assistant", UNREAD, REFUSED, note="set by generate, for an assistant",
        strategies=lambda: {"is_assistant": True}),
    row("continuous_batching_config", UNREAD, note="of generate_batch, which gives processors no history"),
    row("transformers_version", UNREAD),
]  # fmt: skip

CALL = [
    row("inputs", WORKS, case=lambda: {"inputs": PROMPTS, "input_ids": None}),
    row("generation_config", WORKS, case=lambda: {"generation_config": GenerationConfig(
        max_new_tokens=3, pad_token_id=PAD, eos_token_id=ENDS)}),
    row("logits_processor", WORKS, note="in front of a processor of ours, please (see its docstring). One that looks "
        "rows up by number or remembers them is shown the whole batch by MavisSampling; the searches refuse one whose "
        "answers depend on what it has seen",
        case=lambda: {"logits_processor": [MinNewTokensLengthLogitsProcessor(5, 3, ENDS, device="cpu")]}),
    row("stopping_criteria", WORKS, case=lambda: {"stopping_criteria": StoppingCriteriaList([StopAfter(60)])}),
    row("prefix_allowed_tokens_fn", WORKS, note="rows have the numbers that they began with; in the searches those of "
        "their prompts", value=allowed),
    row("synced_gpus", WORKS, REFUSED, note="rows leave the batch, so ranks would wait for each other",
        case=lambda: {"synced_gpus": False}, strategies=lambda: {"synced_gpus": True}),
    row("assistant_model", WORKS, REFUSED, note=_DRAFTS, one=True, case=assisted()),
    row("streamer", WORKS, WORKS, REFUSED, note="the searches know the text only at its end",
        case=lambda: {"streamer": Collector()}),
    row("negative_prompt_ids", WORKS, WORKS, REFUSED, note="as guidance_scale", case=negative,
        says={"searches": "guidance_scale"}),
    row("negative_prompt_attention_mask", WORKS, WORKS, REFUSED, note="as guidance_scale", case=padded_negative,
        says={"searches": "guidance_scale"}),
    row("custom_generate", UNREAD, note="a strategy is given by it; another one calls processors as it likes"),
]  # fmt: skip

MORE = [
    row("attention_mask", WORKS, case=lambda: {"attention_mask": (PROMPTS != PAD).long()}),
    row("position_ids", WORKS, case=lambda: {
        "position_ids": ((PROMPTS != PAD).long().cumsum(1) - 1).clamp(min=0), "attention_mask": (PROMPTS != PAD).long(),
    }),
    row("inputs_embeds", REFUSED, note="value models cannot read them; value heads in a processor can",
        case=soft_prompt),
    row("past_key_values", WORKS, REFUSED, note=_CACHE, case=grown_cache, one=True),
    row("tokenizer", WORKS, UNREAD, note="kept from strategies: give it to the strategy",
        case=lambda: {"tokenizer": letter_tokenizer()}),
    row("assistant_tokenizer", UNREAD, note="read with an assistant of another tokenizer only"),
    row("trust_remote_code", UNREAD),
    row("use_model_defaults", UNREAD, note="of releases before those supported"),
]  # fmt: skip

PAGE = """# generate's own arguments

What becomes of every argument of `generate` when a `MavisLogitsProcessor` or a strategy decodes. "Works" means: exactly
as an obvious slow twin says that re-reads every text from scratch. "Refused" means: a `ValueError` that names the
argument. The table is made and held by `tests/decoding/test_generate_arguments.py`, which knows every argument of the
supported releases of transformers; one that a newer release adds is refused by strategies until it is known.

Some things `generate` decides alone, and nothing here can help: with `cache_implementation="paged"` it hands over to
continuous batching and drops logits processors and strategies without a word. It hands neither `streamer` nor
`assistant_model` nor `synced_gpus` to a strategy, which looks these up in the call that runs it; `tokenizer` is gone by
then. A value model reads the ids of the text and nothing else: prompts in `inputs_embeds`, images, sounds and what an
encoder has read are refused with value models, and work with value heads. A processor can tell only if it is given
`model=`. The soft prompt of a prompt-, prefix- or P-tuned PEFT model is part of the base model, not of the text.

| argument | `MavisLogitsProcessor` | `MavisSampling` | other strategies | |
|---|---|---|---|---|
"""


def page() -> str:
    """The text of `docs/generate.md`."""
    text = PAGE
    for title, rows in (("GenerationConfig", FIELDS), ("generate", CALL), ("model and others", MORE)):
        text += f"| **{title}** | | | | |\n"
        text += "".join(f"| `{r.name}` | {r.processor} | {r.sampling} | {r.searches} | {r.note} |\n" for r in rows)
    return text


if __name__ == "__main__":
    print(page(), end="")
