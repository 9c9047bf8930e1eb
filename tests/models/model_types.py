"""A tiny random model of every causal language model type that transformers knows.

A type's default configuration is shrunk by the names of its fields, so that new types need nothing here; what a type
wants otherwise stands in `TWEAKS`. Windows and chunks are shorter than `PROMPT` tokens, so that they matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VOCABULARY = 97
PAD, EOS, BOS = 0, 1, 2
PROMPT = 14  # tokens of the longer prompt
WINDOW = 5  # of sliding and chunked attention
LONGEST = 64
_STD = 0.3

# The first pattern that matches the whole name of a number's field decides; other fields keep their default.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?vocab(_size\w*)?", VOCABULARY),
    (r"original_max_position_embeddings", LONGEST),
    (r"(\w+_)?max_\w*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length|model_max_length", LONGEST),
    (r"sliding_window(_size)?|attention_window_size|local_attention|window_size|attention_chunk_size", WINDOW),
    (r"floor_scale|log_scaling_n_floor", 4),
    (r"index_topk", 4),
    (r"index_topk_blocks|index_local_blocks", 1),
    (r"index_block_size", 4),
    (r"logit_scale|logits_mup_width_multiplier", 1),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_ssm", 64),
    (r"(block|chunk)_size|mamba_chunk_size", 4),
    (r"kv_n_heads|num_kv_heads|(\w+_)?num_key_value_heads|linear_num_key_heads|\w+_kv_heads", 2),
    (r"(\w+_)?((num_)?attention_heads|n_heads?|num_heads|num_query_groups)|linear_num_(value_)?heads", 4),
    (r"(num_)?(\w+_)?expert(s|_num)?_per_tok(en)?|moe_k|moe_top_?k", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|zero_expert_num", 4),
    (r"(moe_num|n|num)_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"num_kv_shared_layers", 0),
    (r"num_global_layers", 1),
    (r"qk_head_dim", 16),
    (r"(global_|index_|v_|qk_nope_|qk_rope_|linear_(key_|value_)?|mamba_|swa_|swa_v_)?head_?dim|kv_channels", 8),
    (r"dim_head|d_head|d_kv|attention_head_(dim|size)|mamba_d_head", 8),
    (r"rotary_dim", 8),
    (r"(\w+_)?(mamba_)?d_state|(ssm_)?state_size", 4),
    (r"(\w+_)?lora_rank|mamba_dt_rank|hc_lowrank|laurel_rank|adapter_rank|d_rel", 4),
    (r"ple_embed_dim|hidden_size_per_layer_input", 8),
    (r"d_model|n_embd|(emb|embed|embedding)_dim|((input|output)_)?embedding_size|lru_width", 32),
    (r"((attention|cross|backbone|out)_)?hidden_size(_global)?|query_pre_attn_scalar|router_hidden_size", 32),
    (r"(\w+_)?(intermediate|ffn_hidden|ffn)_(size|dim)(_mlp)?|n_inner|dff|d_ff|d_inner|dim_ff|feed_forward_size", 32),
    (r"mlp_dim|prompt_mid_dim", 32),
    (r"(num_|n_)?(\w+_)?(hidden_)?layers?|n_layers?|depth|num_blocks|num_layers_per_stack", 2),
    (r"nemo_conv_channels|depthwise_separable_out_channel|ext_pw_out_channel", 32),
    (r"image_size", 16),
    (r"patch_size", 8),
)  # fmt: skip
_KEPT = re.compile(
    r"num_nextn_predict_layers|n_layers_per_attn_res_block|mtp_\w+|\w*cross_attn_every\w*|keep_\w*|global_attn_every_n_layers"
)
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "sep_token_id": EOS, "cls_token_id": BOS}
_UNSET = {"head_dim": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2}
_LEFT_OUT = {"transformers_version", "architectures", "id2label", "label2id", "dtype", "torch_dtype", "problem_type"}
_LEFT_OUT |= {"ignore_keys_at_rope_validation"}

_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
_INDEXER |= {"indexer_compress_ratio": 4}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_SWITCHED = {"use_sliding_window": True, **_MIXED}
# Rotary frequencies of a head are split between positions in time, height and width.
_SPLIT = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
TWEAKS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            f"{kind}_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            for kind in ("full", "sliding")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "doge": {"keep_window_size": WINDOW},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "num_hidden_layers": 4,
             "layer_types": ["sliding_attention", "full_attention"] * 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, **_MIXED},
    "dots3_note_text": {"swa_q_lora_rank": 4, "swa_kv_lora_rank": 4, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8,
                        "swa_v_head_dim": 8},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _MIXED,
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mellum": _MIXED,
    "minimax": {"sliding_window": WINDOW},
    "ministral3": {"sliding_window": WINDOW},
    "mllama_text_model": {"num_hidden_layers": 4, "cross_attention_layers": [3]},
    "mixtral": {"sliding_window": WINDOW},
    "nemotron_h": {"n_groups": 1},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {"sliding_window": WINDOW},
    "qwen2": _SWITCHED,
    "qwen2_moe": _SWITCHED,
    "qwen3": _SWITCHED,
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": WINDOW},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 4},
    "smollm3": _SWITCHED,
    "starcoder2": {"sliding_window": WINDOW},
    "xlm": {"causal": True, "pad_index": PAD, "eos_index": EOS, "bos_index": BOS, "mask_index": 5, "mask_token_id": 5},
    "xmod": {"default_language": "en_XX"},
    "glm4v_moe_text": {"rope_parameters": _SPLIT["rope_parameters"] | {"mrope_section": [1, 1, 0]}},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_hidden_layers": 4,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8, "num_hidden_layers": 4,
               "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1, "sliding_window": WINDOW, "layer_types": ["hybrid_sliding", "hybrid"]},
} | {
    f"{name}_text": _SPLIT
    for name in ("glm4v", "glm_ocr", "glm_image", "glmga", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl")
}  # fmt: skip
# What has a vision or audio tower beside a decoder that writes text from ids alone, and is tiny when shrunk.
WRAPPERS = (
    "aria", "aya_vision", "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_vl",
    "exaone4_5", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmasr", "glmga", "granite_docling",
    "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl", "kimi_k25", "kosmos-2.5", "lfm2_vl", "lfm3_vl",
    "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6",
    "minicpmv4_7", "minimax_m3_vl", "mistral3", "ovis2", "paddleocr_vl", "paligemma", "pp_chart2table", "qianfan_ocr",
    "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "shieldgemma2", "smolvlm", "video_llama_3",
    "video_llava", "vipllava", "voxtral",
)  # fmt: skip
# Settings of a type that change how its attention works, as `type+name`.
VARIANTS: dict[str, dict[str, Any]] = {
    "falcon+alibi": {"alibi": True},
    "falcon+new": {"new_decoder_architecture": True},
    "falcon+alibi+new": {"alibi": True, "new_decoder_architecture": True},
    "gemma3n_text+kvshared": {"num_kv_shared_layers": 2, **_SHARED},
    "gemma4_text+kvshared": {"num_kv_shared_layers": 2, **_SHARED},
    "gpt2+scaleidx": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "gpt_bigcode+mha": {"multi_query": False},
    "gpt_neo+global": {"attention_types": [[["global"], 2]], "attention_layers": ["global", "global"]},
    "llama+dynamicntk": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
                         "max_position_embeddings": PROMPT + 2},
    "llama+eager": {"attn_implementation": "eager"},
    "llama+llama3": {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4,
                                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                         "original_max_position_embeddings": 16}},
    "llama+pad128": {"vocab_size": 128},
    "llama+tied": {"tie_word_embeddings": True},
    "llama+yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                       "original_max_position_embeddings": 16}},
    "opt+350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "phi3+longrope": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                          "long_factor": [4.0] * 4, "original_max_position_embeddings": PROMPT + 2},
                      "original_max_position_embeddings": PROMPT + 2},
}  # fmt: skip


def types() -> list[str]:
    """The names of all causal types, in order, then of wrappers and variants that this transformers has."""
    wrappers = [name for name in WRAPPERS if name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES]
    variants = [name for name in VARIANTS if name.split("+")[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + wrappers + sorted(variants)


def group(name: str) -> str:
    """What a name is of: "causal", "wrapper" or "variant"."""
    return "variant" if "+" in name else "wrapper" if name in WRAPPERS else "causal"


def tiny_config(name: str, **settings: Any) -> PreTrainedConfig:
    """The default configuration of a type or variant, shrunk."""
    model_type = name.split("+")[0]
    settings = TWEAKS.get(model_type, {}) | VARIANTS.get(name, {}) | settings
    return _shrunk(CONFIG_MAPPING[model_type](), settings)


def build(name: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A tiny model of a type or variant with lively random weights in float32.

    Raises:
        Exception: whatever transformers says where a type cannot be built so.
    """
    attention = VARIANTS.get(name, {}).get("attn_implementation")
    config = tiny_config(name, **settings)
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForMultimodalLM
    model = auto.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    enliven(model, seed)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return model


@torch.no_grad()
def enliven(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights large enough that every part of a model shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=_STD, generator=generator)
        elif parameter.is_floating_point():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def _shrunk(config: PreTrainedConfig, given: Mapping[str, Any]) -> PreTrainedConfig:
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_") and k not in _LEFT_OUT}
    layers = getattr(config, "num_hidden_layers", None)
    kept = _kept_layers(fields, layers) if isinstance(layers, int) else []
    settings: dict[str, Any] = {}
    for name, value in fields.items():
        own = given.get(name)
        if isinstance(value, PreTrainedConfig):
            settings[name] = _shrunk(value, TWEAKS.get(value.model_type, {}) | (own or {}))
        elif name == "is_decoder":
            settings[name] = True
        elif re.search(r"drop|jitter", name) and isinstance(value, float):
            settings[name] = 0.0
        elif value is None and name in _UNSET:
            settings[name] = _UNSET[name]
        elif name in _SPECIAL:
            settings[name] = _SPECIAL[name]
        elif isinstance(value, int) and re.search(r"token_(id|index)$", name):
            settings[name] = min(value, VOCABULARY - 1)
        elif name == "rope_parameters" and value and "mrope_section" in value:
            settings[name] = value | {"mrope_section": _SPLIT["rope_parameters"]["mrope_section"]}
        elif isinstance(value, list | tuple) and value and kept:
            settings[name] = _of_layers(name, value, layers, kept)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            settings[name] = _smaller(name, value, len(kept) or 2)
        else:
            settings[name] = value
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # latent attention has a key for every query
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= {
        k: v for k, v in given.items() if k != "attn_implementation" and not isinstance(fields.get(k), PreTrainedConfig)
    }
    return type(config)(**settings)


def _smaller(name: str, value: float, layers: int) -> float:
    if not _KEPT.fullmatch(name):
        for pattern, size in _SIZES:
            if re.fullmatch(pattern, name):
                size = layers if pattern == _LAYERS else size
                return type(value)(size) if value > 0 else value
    return value


def _kept_layers(fields: Mapping[str, Any], layers: int) -> list[int]:
    """Numbers of the first layers of every kind, two at least and four at most."""
    lists = {k: v for k, v in fields.items() if isinstance(v, list | tuple)}
    each = [v for v in lists.values() if len(v) == layers]
    numbers = [set(v) for k, v in lists.items() if _are_numbers(k, v, layers)]
    first: dict[Any, int] = {}
    for layer in range(layers):
        kind = (*(str(v[layer]) for v in each), *(layer in some for some in numbers))
        first.setdefault(kind, layer)
    kept = sorted(first.values())[:4]
    rest = [layer for layer in range(layers) if layer not in kept]
    return sorted(kept + rest[: max(0, 2 - len(kept))])


def _are_numbers(name: str, value: Any, layers: int) -> bool:
    """Whether a list names layers by number."""
    whole = all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < layers for x in value)
    return bool(value) and len(value) < layers and whole and list(value) == sorted(set(value)) and "layer" in name


def _of_layers(name: str, value: Any, layers: int, kept: list[int]) -> Any:
    if len(value) == layers:
        own = [value[layer] for layer in kept]
        return [_smaller(name, x, len(kept)) if type(x) is int else x for x in own]
    if _are_numbers(name, value, layers):
        return [new for new, old in enumerate(kept) if old in value]
    return value


_LAYERS = _SIZES[[size for _, size in _SIZES].index(2, 20)][0]
