"""Experts: layers that go through Transformers' experts interface call one opaque op, which asks the platform."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from engine.interfaces import ExpertsMethod, ExpertsSpec, ExpertWeights, Platform

IMPLEMENTATION = "engine"
"""The name under which Transformers finds `engine_experts`."""


@dataclass
class ExpertsLayer:
    """One layer of experts: the platform's method and the layer's parameters."""

    method: ExpertsMethod
    weights: ExpertWeights


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, ExpertsLayer] = weakref.WeakValueDictionary()

_library = torch.library.Library("engine", "FRAGMENT")
_library.define("experts(Tensor x, Tensor expert_ids, Tensor scores, Tensor handle) -> Tensor")


def _experts(x: Tensor, expert_ids: Tensor, scores: Tensor, handle: Tensor) -> Tensor:
    layer = _layers[int(handle.item())]
    return layer.method.apply(x, expert_ids, scores, layer.weights)


_library.impl("experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("engine::experts", lambda x, *_: torch.empty_like(x), lib=_library)


def engine_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A layer of experts as Transformers calls it: tokens [N, hidden], ids and weights [N, top_k], to [N, hidden]."""
    handle = getattr(module, "engine_handle", None)
    if handle is None:  # what `attach` left to Transformers
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
    return torch.ops.engine.experts(hidden_states, top_k_index, top_k_weights, handle)  # type: ignore[no-any-return]


ExpertsInterface.register(IMPLEMENTATION, engine_experts)


def attach(seen: Observations, platform: Platform) -> None:
    """Make the layers of experts that a probe saw, whose weights are loaded by now, call the platform's method.

    Layers with a norm after each expert keep Transformers' own function, which the contract cannot express.
    """
    for module, top_k in seen.experts.items():
        if module.has_post_expert_norm:
            continue
        up = module.gate_up_proj if module.has_gate else module.up_proj
        weights = ExpertWeights(
            up=up.data,
            down=module.down_proj.data,
            activate=module._apply_gate if module.has_gate else module.act_fn,
            up_bias=(module.gate_up_proj_bias if module.has_gate else module.up_proj_bias) if module.has_bias else None,
            down_bias=module.down_proj_bias if module.has_bias else None,
        )
        spec = ExpertsSpec(
            num_experts=up.shape[0],
            top_k=top_k,
            gated=module.has_gate,
            transposed=module.is_transposed,
            dtype=up.dtype,
        )
        number = next(_numbers)
        module.engine_experts = _layers[number] = ExpertsLayer(platform.experts(spec), weights)
        module.engine_handle = torch.tensor(number)
