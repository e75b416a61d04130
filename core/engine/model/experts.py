"""Experts: layers that go through Transformers' experts interface call one opaque op, which asks the platform."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate, grouped_mm_experts_forward

from engine.compile import arguments
from engine.interfaces import CompilerOptions, ExpertsSpec, ExpertWeights, Platform
from engine.model.attention import IMPLEMENTATION
from engine.model.probe import Observations

_numbers = itertools.count()
_modules: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

_library = torch.library.Library("engine", "FRAGMENT")
_library.define("experts(Tensor x, Tensor expert_ids, Tensor scores, Tensor handle) -> Tensor")


def _experts(x: Tensor, expert_ids: Tensor, scores: Tensor, handle: Tensor) -> Tensor:
    module = _modules[int(handle.item())]
    result: Tensor = module.engine_method.apply(x, expert_ids, scores, module.engine_weights)
    return result


_library.impl("experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("engine::experts", lambda x, *_: torch.empty_like(x), lib=_library)


def engine_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A layer of experts as Transformers calls it: tokens [N, hidden], ids and weights [N, top_k], to [N, hidden]."""
    if not hasattr(module, "engine_handle"):  # what `attach` left to Transformers
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    result: Tensor = torch.ops.engine.experts(hidden_states, top_k_index, top_k_weights, module.engine_handle)
    return result


ExpertsInterface.register(IMPLEMENTATION, engine_experts)


def attach(seen: Observations, platform: Platform, compiler: CompilerOptions | None) -> None:
    """Make the layers of experts that a probe saw, whose weights are loaded by now, call the platform's method.

    The activation between its products is compiled where there is a compiler. Layers with a norm after each expert keep
    Transformers' own function: the contract cannot express them.
    """
    module: Any
    for module, top_k in seen.experts.items():
        if getattr(module, "has_post_expert_norm", False):
            continue
        up = "gate_up_proj" if module.has_gate else "up_proj"
        activate = module._apply_gate if module.has_gate else module.act_fn
        if compiler is not None:
            activate = torch.compile(activate, **arguments(compiler))
        weights = ExpertWeights(
            up=getattr(module, up).data,
            down=module.down_proj.data,
            activate=activate,
            up_bias=getattr(module, f"{up}_bias").data if module.has_bias else None,
            down_bias=module.down_proj_bias.data if module.has_bias else None,
        )
        silu = type(module)._apply_gate is _default_apply_gate and type(module.act_fn) is type(ACT2FN["silu"])
        shape = len(weights.up), top_k, module.has_gate, module.is_transposed
        spec = ExpertsSpec(*shape, weights.up.dtype, silu=module.has_gate and silu)
        module.engine_method, module.engine_weights = platform.experts(spec), weights
        module.engine_handle = torch.tensor(next(_numbers))
        _modules[int(module.engine_handle)] = module
