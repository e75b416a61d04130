"""Tiny models: every causal-LM architecture of the installed `transformers`, small enough to build in a second.

A tiny config is the architecture's own default config with three things put in, each later one winning:

1. `_COMMON`, the fields that most architectures spell alike (a field the architecture does not have is left out);
2. one layer of every kind that the default config has (full and sliding, dense and sparse, attention and state);
3. `_OVERRIDES`, what one architecture needs beyond that, with the reason.

Weights are drawn so that every part matters: logits spread over a few units, routers choose among all their experts,
attention is neither uniform nor one-hot, and norms, biases and sinks differ from their neutral initial values. A model
that drops a term therefore shows it.
"""

import dataclasses
from collections.abc import Mapping
from itertools import chain, cycle, islice
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_LAYERS = 4
_HEADS = 4
_EXPERTS = 8
_GAIN = 1.5
_ROUTER_BIASES = ("correction_bias", "expert_bias", "balancing_biases")
_LEARNED_BUFFERS = (*_ROUTER_BIASES, "layer_scalar", "tid2eid")  # other buffers follow from the config

_COMMON: Mapping[str, Any] = {
    # width and depth
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"), _LAYERS
    ),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 256),
    # attention
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), _HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), _HEADS),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "use_sliding_window": True,
    "max_window_layers": 2,
    # latent attention and its indexer
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 16,  # scores are sums of rectified ones: with few heads many are zero, and top-k breaks the ties
    # feed-forward
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 96
    ),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    # state-space and linear attention
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    "linear_num_value_heads": _HEADS,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    # special tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,  # an encoder that doubles as a decoder attends backwards only
}

# Latent attention has one key head a query head, and rotates only a part of it, which some call the head size.
_LATENT: Mapping[str, Any] = {"num_key_value_heads": _HEADS, "head_dim": 8}

_SLIDING_AND_FULL = ("sliding_attention", "full_attention")
_DENSE_AND_SPARSE = ("dense", "sparse")
_FULL_ATTENTION = {"attention_type": "original_full"}  # a decoder attends to everything before it
# With scaled embeddings a tied head predicts every token to be its own successor, whatever the layers do.
_UNTIED = {"tie_word_embeddings": False}

_GRANITE = {"attention_multiplier": 0.25}  # its default, 1, makes the attention of random weights one-hot

# By model type. `layer_types` and `mlp_layer_types` are kinds, repeated to the number of layers; a sub-config is
# None or fields on top of its own tiny config, with a `model_type` where the architecture leaves that open.
_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},  # none by default
    "big_bird": _FULL_ATTENTION,
    "bigbird_pegasus": _FULL_ATTENTION,
    "blt": {"encoder_hash_byte_group_vocab": 64, "local_attention_window_len": 8},
    "blt_global_transformer": {"num_key_value_heads": _HEADS},
    "blt_local_decoder": {"num_key_value_heads": _HEADS, "hidden_size_global": 64},
    "blt_local_encoder": {"num_key_value_heads": _HEADS, "hidden_size_global": 64},
    "blt_patcher": {"num_key_value_heads": _HEADS},
    "codegen": {"rotary_dim": 8},  # of the 16 of a head
    "cohere": {"logit_scale": 1.25},  # a sixteenth by default: logits too close
    "cohere2": {"logit_scale": 1.25},
    "cohere2_moe": {"logit_scale": 1.25, "mlp_layer_types": _DENSE_AND_SPARSE},
    "cohere_compass_text": {
        "layer_types": _SLIDING_AND_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "cpmant": {"dim_head": 16, "dim_ff": 96, "position_bias_num_buckets": 16, "position_bias_max_distance": 64},
    "ctrl": {"dff": 96},
    "dbrx": {
        # the attention reads a rope_theta that its config does not declare
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": _EXPERTS, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v4": {
        "layer_types": ("sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"),
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "doge": {"keep_window_size": 8},
    "dots1": {"layer_types": _SLIDING_AND_FULL},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_text": {
        "head_dim": 24,
        "shared_experts_intermediate_size": 32,
        # what the sliding layers have of their own
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 24,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64, "mlp_layer_types": _DENSE_AND_SPARSE},
    "flint": {"mlp_only_layers": [0]},
    "fuyu": {"text_config": {"model_type": "persimmon"}, "patch_size": 4, "image_size": 16},
    "gemma2": _UNTIED,
    "gemma3": {**_UNTIED, "vision_config": {"model_type": "siglip_vision_model"}},
    "gemma3_text": _UNTIED,
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gemma4": _UNTIED,
    "gemma4_text": {
        **_UNTIED,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "global_head_dim": 32,
    },
    "gemma4_vision": {"position_embedding_size": 64},
    "gemma4_unified_vision": {"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64, "patch_size": 4},
    "gemma4_unified": _UNTIED,
    "gemma4_unified_text": {
        **_UNTIED,
        "attention_k_eq_v": True,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
    },
    "got_ocr2": {"text_config": {"model_type": "qwen2"}},
    "got_ocr2_vision": {"output_channels": 16, "mlp_dim": 96, "image_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"), _GRANITE),
    "granitemoehybrid": {**_GRANITE, "layer_types": ("mamba", "attention")},
    "hrm_text": {"num_hidden_layers": 2},
    "inkling2_text": {
        "swa_num_attention_heads": _HEADS,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 16,
        "sliding_window_size": 8,
        "rel_extent": 16,
        "log_scaling_n_floor": 8,
        "n_layers_per_attn_res_block": 2,
        "unpadded_vocab_size": 120,
    },
    "inkling_text": {
        "swa_num_attention_heads": _HEADS,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 16,
        "sliding_window_size": 8,
        "rel_extent": 16,
        "log_scaling_n_floor": 8,
        "logits_mup_width_multiplier": 1.0,
        "mlp_layer_types": _DENSE_AND_SPARSE,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 2},
    "jetmoe": {"kv_channels": 16},
    "laguna": {"layer_types": _SLIDING_AND_FULL},
    "lfm2": {"layer_types": ("conv", "full_attention"), "block_multiple_of": 32},
    "lfm2_moe": {"layer_types": ("conv", "full_attention")},
    "llama4_text": {
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": 8,
        "floor_scale": 8,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
    },
    "longcat_flash": {"num_layers": 2, "expert_ffn_hidden_size": 32, "zero_expert_num": 4},
    "mamba2": {"head_dim": 32, "n_groups": 2},
    "mellum": {"layer_types": _SLIDING_AND_FULL, "mlp_layer_types": _DENSE_AND_SPARSE},
    "minicpm3": {"scale_emb": 2, "dim_model_base": 64},
    "minimax": {"block_size": 8},
    "minimax_m3_vl_text": {
        "layer_types": ("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": _DENSE_AND_SPARSE,
        "dense_intermediate_size": 96,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "modernbert-decoder": {"local_attention": 16},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "nemotron_h": {
        "n_groups": 2,
        "mamba_num_heads": _HEADS,
        "mamba_head_dim": 16,
        "moe_shared_expert_intermediate_size": 32,
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
    },
    "phi4_multimodal_audio": {"ext_pw_out_channel": 64, "nemo_conv_channels": 8, "num_blocks": 1, "left_chunk": 4},
    "qwen2": {"layer_types": _SLIDING_AND_FULL},
    "qwen2_moe": {"layer_types": _SLIDING_AND_FULL, "mlp_only_layers": [0]},
    "qwen3": {"layer_types": _SLIDING_AND_FULL},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp_text": {
        "hc_lowrank": 16,
        "ple_layer_ids": [1],
        "heads_per_ngram": 4,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"attention_window_size": 8},
    "reformer": {
        "attention_head_size": 16,
        "feed_forward_size": 96,
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (32, 32),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "hash_seed": 0,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 64},
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "pronunciation_embed_dim": 16,
        "shape_vocab_size": 64,
        "shape_embed_dim": 16,
    },
    "smollm3": {"layer_types": _SLIDING_AND_FULL, "no_rope_layers": [1, 1, 0, 0]},
    "xlm": {"emb_dim": 64, "causal": True},
    "xlnet": {"d_inner": 96, "attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "n_mamba_heads": _HEADS,
        "adapter_rank": 8,
        "use_mem_rope": True,
    },
    "zaya": {"layer_types": ("hybrid", "hybrid_sliding"), "num_experts_per_tok": 1, "router_hidden_size": 32},
}

# Names that `AutoModelForCausalLM` lists but whose tiny model cannot read a row of token ids, and why.
UNRUNNABLE: Mapping[str, str] = {
    "gemma3n": "its vision tower comes from the timm package; `gemma3n_text` is the same decoder",
    "gemma4_assistant": "a drafter: reads the hidden states and shared keys and values of another model",
    "gemma4_unified_assistant": "a drafter: reads the hidden states and shared keys and values of another model",
    "musicgen": "the class takes the config of the decoder alone, and a row of codes for each codebook",
    "musicgen_melody": "the class takes the config of the decoder alone, and a row of codes for each codebook",
}


def causal_lm_names() -> tuple[str, ...]:
    """Every model type that the installed `transformers` maps to a causal language model, sorted."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_config(name: str) -> PreTrainedConfig:
    """A config of model type `name` with a few layers, heads and experts.

    Raises KeyError where the installed `transformers` has no such model type. `UNRUNNABLE` names those whose model does
    not build or run.
    """
    return _tiny(CONFIG_MAPPING[name])


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """The model of `tiny_config(name)`, with other `fields` if given, on the CPU, in eval mode, frozen, and eager.

    The weights depend on `seed` alone and are drawn in float32: another `dtype` only rounds them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(name)
        for field, value in fields.items():
            setattr(config, field, value)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        if dtype is torch.float32:
            _redraw(model)
        else:
            model.load_state_dict(tiny_model(name, seed, **fields).state_dict())
    model.train(False).requires_grad_(False)
    return model


def _redraw(model: PreTrainedModel) -> None:
    """Give each matrix outputs of variance `_GAIN`**2 for inputs of variance one, and disturb vectors a little."""
    learned = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(_LEARNED_BUFFERS)]
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *learned):
            noise = torch.randn(tensor.shape)
            if name.endswith("tid2eid"):  # the experts of each token id: distinct ones
                tensor.copy_(torch.rand(len(tensor), _EXPERTS).argsort(-1)[:, : tensor.shape[-1]])
            elif name.endswith(_ROUTER_BIASES):  # among scores that sum to one
                tensor.add_(0.02 * noise)
            elif tensor.numel() == tensor.shape[-1:].numel():
                tensor.add_(0.1 * noise)
            else:
                tensor.copy_(_GAIN * tensor.shape[-1] ** -0.5 * noise)


def _tiny(config_class: type[PreTrainedConfig], extra: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedConfig:
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in _COMMON.items() if name in fields}
    if "kv_lora_rank" in fields:
        values |= {name: value for name, value in _LATENT.items() if name in fields}
    values |= _OVERRIDES.get(config_class.model_type, {})
    values |= extra
    for name, sub_class in config_class.sub_configs.items():
        sub = dict(values.get(name, {}) or {})
        if "model_type" in sub:
            sub_class = CONFIG_MAPPING[sub.pop("model_type")]
        if sub_class is not AutoConfig and values.get(name, {}) is not None:
            values[name] = _tiny(sub_class, sub)
    length = values.get("num_hidden_layers", _LAYERS)
    for name in {"layer_types", "mlp_layer_types"} & fields:
        if kinds := tuple(dict.fromkeys(values.get(name) or getattr(config_class(), name) or ())):
            # Attention kinds take turns and the last feed-forward kind goes on, so that kinds meet in all combinations.
            rest = kinds if name == "layer_types" else kinds[-1:]
            values[name] = list(islice(chain(kinds, cycle(rest)), length))
    return config_class(**values)
