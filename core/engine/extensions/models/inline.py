"""Models that do by themselves what others leave to Transformers' interfaces: attend, and count positions.

They are found by the names of their classes, or by what their `forward` takes, and given methods that do the same
through the engine. The mask goes along where there is one, so that a probe still sees what the model meant.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.falcon import modeling_falcon

from engine.model import probe
from engine.model.attention import StepContext, engine_attention

Method = Callable[..., Any]

_MPNET_REACH = 128
"""From this distance on MPNet's bias, of 32 buckets, is one."""


def adopt(model: nn.Module, context: StepContext) -> int:
    """Exchange the methods of those parts of `model` that need it. `context` tells positions to parts that count.

    Returns how many of the model's positions no token can have.
    """
    reserved = 0
    module: Any
    for module in model.modules():
        methods = dict(_METHODS.get(type(module).__name__, {}))
        parameters = list(inspect.signature(module.forward).parameters)
        if isinstance(module, nn.Embedding) and "position_ids" in parameters[1:]:
            methods["forward"] = _told_positions(type(module).forward, parameters)
        elif hasattr(module, "create_position_ids_from_input_ids") or type(module).__name__ == "MPNetEmbeddings":
            methods["forward"] = _behind_padding
            reserved = module.padding_idx + 1
        if methods:
            cls = type(module)
            module.__class__ = type(cls.__name__, (cls,), {"engine_context": context, **methods})
    return reserved


def _told_positions(forward: Method, parameters: list[str]) -> Method:
    """`forward` of an embedding of positions, which would count from 0 in every step."""

    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(parameters, args, strict=False)) | kwargs
        return forward(self, **{**given, "position_ids": self.engine_context.positions})

    return told


def _behind_padding(self: Any, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
    """Embeddings of Roberta's kind: a text's positions begin behind the padding token's index."""
    return super(type(self), self).forward(*args, position_ids=position_ids + self.padding_idx + 1, **kwargs)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Attention [1, N, H, E] of [1, heads, N, size] tensors: recorded by a probe, the engine's afterwards."""
    function = engine_attention if hasattr(module, "engine_handle") else probe.record_attention
    out: Tensor = function(module, query.to(value.dtype), key.to(value.dtype), value, mask, **kwargs)[0]
    return out


def _heads(x: Tensor, size: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, size).transpose(1, 2)


def _attn(scale: Callable[[Any], float]) -> Method:
    """A method ``_attn(query, key, value, mask)`` of heads [1, H, N, D], for GPT-J and its kin."""

    def method(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        return attend(self, query, key, value, attention_mask, scaling=scale(self)).transpose(1, 2), None

    return method


def _gpt_neo(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
    window = self.config.window_size if self.attention_type == "local" else None
    return attend(self, query, key, value, scaling=1.0, sliding_window=window).transpose(1, 2), None


def _openai(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> list[Tensor]:
    scale = v.shape[-1] ** -0.5 if self.scale else 1.0
    return [attend(self, q, k.transpose(-1, -2), v, scaling=scale).transpose(1, 2)]


def _bert(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Any:
    """Heads of `query`, `key` and `value`, for encoders of Bert's kind that are used as decoders."""
    query, key, value = (_heads(p(hidden_states), self.attention_head_size) for p in (self.query, self.key, self.value))
    return attend(self, query, key, value, attention_mask).flatten(2), None


def _roformer(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None, sinusoidal_pos: Tensor, *_: Any, **__: Any
) -> Any:
    query, key, value = (_heads(p(hidden_states), self.attention_head_size) for p in (self.query, self.key, self.value))
    if self.rotary_value:
        query, key, value = self.apply_rotary_position_embeddings(sinusoidal_pos, query, key, value)
    else:
        query, key = self.apply_rotary_position_embeddings(sinusoidal_pos, query, key)
    return attend(self, query, key, value, attention_mask).flatten(2), None


def _decoder(self: Any, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **_: Any) -> Any:
    """Heads of `q_proj`, `k_proj` and `v_proj`, for decoders of Bart's kind without an encoder."""
    query, key, value = (_heads(p(hidden_states), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
    mixed = attend(self, query, key, value, attention_mask, scaling=self.scaling)
    return self.out_proj(mixed.flatten(2)), None


def _bloom(self: Any, hidden_states: Tensor, residual: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    slopes = alibi_slopes(self.num_heads, hidden_states.device)
    mixed = attend(self, query, key, value, attention_mask, scaling=self.inv_norm_factor, alibi_slopes=slopes)
    return self.dense(mixed.flatten(2)) + residual, None


def _mpt(self: Any, hidden_states: Tensor, position_bias: Tensor, **_: Any) -> Any:
    mixed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = (_heads(x, self.head_dim) for x in mixed.chunk(3, dim=2))
    slopes = -position_bias[:, 0, -2]  # the bias of the key before the query's own
    out = attend(self, query, key, value, scaling=self.softmax_scale, alibi_slopes=slopes)
    return self.out_proj(out.flatten(2)), None


def _mpt_model(self: Any, *args: Any, attention_mask: object = None, **kwargs: Any) -> Any:
    mask = torch.ones(1, 1, 1, 1, device=self.engine_context.positions.device)  # the code wants one; nothing reads it
    return super(type(self), self).forward(*args, attention_mask=mask, **kwargs)


def _mpnet_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Its bias goes along as a table by distance: beyond some, all distances have one bias."""
    distances = torch.arange(-_MPNET_REACH, _MPNET_REACH + 1, device=self.engine_context.positions.device)
    table = self.relative_attention_bias(self.relative_position_bucket(distances)).T.float().contiguous()
    for layer in self.layer:
        layer.attention.attn.engine_bias = table
    return super(type(self), self).forward(*args, **kwargs)


def _no_bias(self: Any, *_: Any, **__: Any) -> None:
    """In place of a tensor of the step's length squared."""


def _mpnet(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    query, key, value = (_heads(p(hidden_states), self.attention_head_size) for p in (self.q, self.k, self.v))
    mixed = attend(self, query, key, value, alibi_slopes=self.engine_bias, is_causal=False)
    return (self.o(mixed.flatten(2)),)


def _falcon(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> Any:
    query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    if self.new_decoder_architecture:  # keys and values come repeated for every query head
        key, value = (x[:, :: self.num_heads // self.num_kv_heads] for x in (key, value))
    query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
    return self.dense(attend(self, query, key, value, attention_mask).flatten(2)), None


class _Counting:
    """Stands in for a cache where a layer asks one how many tokens came before, to count positions from there."""

    def __init__(self, positions: Tensor) -> None:
        self._before = positions - torch.arange(positions.shape[0], device=positions.device)

    def get_seq_length(self, layer: int) -> Tensor:
        """[N]: what to add to the place of each token in the step."""
        return self._before

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values as they are; the engine keeps them."""
        return key, value


def _llama4(self: Any, *args: Any, past_key_values: object = None, **kwargs: Any) -> Any:
    return super(type(self), self).forward(*args, past_key_values=_Counting(self.engine_context.positions), **kwargs)


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """Slopes of the heads, float32 [H], as Press et al. (2021) choose them."""
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / whole * torch.arange(1, whole + 1, device=device))
    between = 2.0 ** (-4.0 / whole * torch.arange(1, 2 * (num_heads - whole) + 1, 2, device=device))
    return torch.cat((slopes, between))


_METHODS: dict[str, dict[str, Method]] = {
    "Attention": {"_attn": _openai},
    "BigBirdSelfAttention": {"forward": _bert},
    "BloomAttention": {"forward": _bloom},
    "CodeGenAttention": {"_attn": _attn(lambda self: 1 / self.scale_attn)},
    "FalconAttention": {"forward": _falcon},
    "GitSelfAttention": {"forward": _bert},
    "GPTJAttention": {"_attn": _attn(lambda self: 1 / self.scale_attn)},
    "GPTNeoSelfAttention": {"_attn": _gpt_neo},
    "GPTNeoXJapaneseAttention": {"_attn": _attn(lambda self: 1 / self.norm_factor)},
    "Llama4TextAttention": {"forward": _llama4},
    "MegatronBertSelfAttention": {"forward": _bert},
    "MPNetEncoder": {"forward": _mpnet_encoder, "compute_position_bias": _no_bias},
    "MPNetSelfAttention": {"forward": _mpnet},
    "MptAttention": {"forward": _mpt},
    "MptModel": {"forward": _mpt_model},
    "MvpAttention": {"forward": _decoder},
    "RemBertSelfAttention": {"forward": _bert},
    "RoFormerSelfAttention": {"forward": _roformer},
    "TrOCRAttention": {"forward": _decoder},
    "XGLMAttention": {"forward": _decoder},
}
"""Methods by class name."""
