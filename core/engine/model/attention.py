"""Attention: the models' own code calls one opaque op, which finds its layer by a handle and asks the platform.

    model's attention module -> engine_attention(module, q, k, v) -> op engine::attention(q, k, v, handle, out)
                                                                       handle -> AttentionLayer: backend, cache, plan

The handle is a tensor that hangs on the module: a layer's number as a Python int would make the compiler specialise the
decoder layer for every layer, and any number of models can live in one process.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from engine.errors import UnsupportedModelError
from engine.interfaces import AttentionBackend, AttentionSpec, KVCache, Plan, Platform
from engine.model.probe import NUM_TOKENS, AttentionCall, Observations, Visibility

IMPLEMENTATION = "engine"
"""The name under which Transformers finds `engine_attention`. No mask is built for it."""

NEUTRAL_KWARGS = frozenset({"dropout", "deterministic", "position_ids", "use_cache", "logits_to_keep"})
NEUTRAL_KWARGS |= {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}
"""What modelling code hands to every attention function and what changes nothing about the result."""

MEANINGFUL_KWARGS = frozenset({"scaling", "sliding_window", "softcap", "s_aux", "alibi_slopes", "is_causal"})
"""What the engine's attention acts upon. Anything else that is not None is refused when the model is loaded."""


class StepContext:
    """What the layers of one model read besides their arguments; filled before each step.

    Without plans, as after construction, attention gives each token a mix of its own query, key and value. That needs
    no cache, and serves to measure memory and to check that tokens meet in attention only.
    """

    positions: Tensor  # int64 [N] of the step's tokens, for models that count by themselves

    def __init__(self) -> None:
        self.plans: Sequence[Plan] | None = None
        self.turns: list[Turns] = []  # of the modules that attend several times in a pass

    def begin(self, positions: Tensor) -> None:
        """A forward pass begins."""
        self.positions = positions
        for turns in self.turns:
            turns.next = 0

    def set_plans(self, plans: Sequence[Plan] | None) -> None:
        """The step's plans, in the order that `AttentionLayer.bind` counts."""
        self.plans = plans


@dataclass
class Turns:
    """Handles of a module that attends several times in a pass, with a cache for each time, and which is next."""

    handles: Sequence[Tensor]
    next: int = 0


class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        name: of its module in the model; with the number of the call where the module attends several times.
        spec: what it computes.
        backend: the platform's; layers of one specification share one.
        shares_kv_with: the layer whose keys and values it reads; it has no cache of its own then.
        handle: int64 [], on the host; what the op finds the layer by.
    """

    def __init__(
        self,
        name: str,
        spec: AttentionSpec,
        backend: AttentionBackend,
        context: StepContext,
        owner: AttentionLayer | None = None,
    ) -> None:
        self.name, self.spec, self.backend = name, spec, backend
        self.shares_kv_with = None if owner is None else owner.name
        self.handle = torch.tensor(next(_numbers))
        self._context = context
        self._owner = owner
        self._cache: KVCache = None
        self._plan = 0
        _layers[int(self.handle)] = self

    def bind(self, cache: KVCache, plan: int) -> None:
        """Give the layer, and those that read its keys and values, their cache and the index of their plan."""
        self._cache, self._plan = cache, plan

    def step(self) -> tuple[AttentionBackend, KVCache, Plan] | None:
        """What it runs with in this step; None where a step has no plans."""
        plans, owner = self._context.plans, self._owner or self
        return None if plans is None else (self.backend, owner._cache, plans[owner._plan])

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sinks: Tensor | None, slopes: Tensor | None) -> None:
        """The op's body: see `AttentionBackend.forward`."""
        if (step := self.step()) is None:
            groups = self.spec.num_heads // self.spec.num_kv_heads
            own = v * (1 + k.mean(-1, keepdim=True)) + k.mean(-1, keepdim=True)
            torch.mul(own.repeat_interleave(groups, 1), 1 + q.mean(-1, keepdim=True), out=out)
            return
        backend, cache, plan = step
        new_k, new_v = (k, v) if self._owner is None else (None, None)
        backend.forward(q, new_k, new_v, cache, plan, out, sinks=sinks, alibi_slopes=slopes)


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, AttentionLayer] = weakref.WeakValueDictionary()

_library = torch.library.Library("engine", "FRAGMENT")
_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor handle, Tensor? sinks, Tensor? slopes, Tensor(a!) out) -> ()"
_library.define("attention" + _SCHEMA)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, sinks: Tensor | None, slopes: Tensor | None, out: Tensor
) -> None:
    _layers[int(handle.item())].run(q, k, v, out, sinks, slopes)


_library.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("engine::attention", lambda *args: None, lib=_library)


def engine_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as Transformers calls it, on the flattened tokens of a step.

    Takes query [1, H, N, D], key [1, K, N, D] and value [1, K, N, E] and gives [1, N, H, E], and None in place of the
    weights. What a token sees follows from the specification and the step's plan. `kwargs` are as seen when the model
    was loaded, where everything unknown was refused.
    """
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} makes a mask of its own, which is not built yet")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    handle = module.engine_handle
    if isinstance(handle, Turns):
        turns, handle = handle, handle.handles[handle.next]
        turns.next += 1
    torch.ops.engine.attention(q, k, v, handle, kwargs.get("s_aux"), kwargs.get("alibi_slopes"), out)
    return out.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, engine_attention)


def attach(
    model: nn.Module, seen: Observations, platform: Platform, kv_dtype: torch.dtype, context: StepContext
) -> dict[str, AttentionLayer]:
    """Make the attention modules of `model` call the platform's backends, as a probe saw that they need it.

    Returns the layers by name, in the order in which they run. Raises `UnsupportedModelError` for what a specification
    cannot express, and `UnsupportedCapability` for what the platform does not have.
    """
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, list[AttentionLayer]] = {}
    backends: dict[AttentionSpec, AttentionBackend] = {}
    owners: dict[tuple[int, int], AttentionLayer] = {}  # by the tensors of keys and values
    for call in seen.attention:
        earlier = calls.setdefault(call.module, [])
        name = names[call.module] + (f"#{len(earlier)}" if earlier else "")
        try:
            spec = specify(call, seen, kv_dtype)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{name} {error}") from None
        backend = backends.get(spec) or backends.setdefault(spec, platform.attention(spec))
        owner = owners.get((id(call.key), id(call.value)))
        if owner is not None and owner.spec != spec:
            raise UnsupportedModelError(f"{name} reads the KV cache of {owner.name}, which has another specification")
        layer = AttentionLayer(name, spec, backend, context, owner)
        owners.setdefault((id(call.key), id(call.value)), layer)
        earlier.append(layer)
    for module, layers in calls.items():
        found = vars(module)  # by the op, and the SDK's `attention_step`
        if len(layers) > 1:
            context.turns.append(Turns([layer.handle for layer in layers]))
        elif layers[0].shares_kv_with is None:
            found["engine_step"] = layers[0].step
        found["engine_handle"] = context.turns[-1] if len(layers) > 1 else layers[0].handle
    return {layer.name: layer for layers in calls.values() for layer in layers}


def specify(call: AttentionCall, seen: Observations, kv_dtype: torch.dtype) -> AttentionSpec:
    """What a call computes; raises `UnsupportedModelError` with the end of a sentence that the layer's name begins."""
    if strange := sorted(set(call.kwargs) - NEUTRAL_KWARGS - MEANINGFUL_KWARGS):
        raise UnsupportedModelError(f"passes {', '.join(strange)} to attention, which is not built yet")
    _, num_heads, num_tokens, head_dim = call.query.shape
    _, num_kv_heads, num_keys, _ = call.key.shape
    if (num_tokens, num_keys) != (NUM_TOKENS, NUM_TOKENS):
        raise UnsupportedModelError("attends to something else than the sequence's own tokens, which is not built yet")
    causal = call.kwargs.get("is_causal", getattr(call.module, "is_causal", True))
    plain = Visibility(window=call.kwargs.get("sliding_window"), causal=causal)
    visibility = plain if call.mask is None else seen.visibility(call.mask)
    if visibility is None:
        raise UnsupportedModelError("has a mask or bias that is none of causal, sliding window and chunked")
    if not visibility.causal and not seen.ahead:
        raise UnsupportedModelError("attends to later tokens, which generation cannot; see the option runner")
    slopes: Tensor | None = call.kwargs.get("alibi_slopes")
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=call.value.shape[3],
        scale=float(call.kwargs.get("scaling", head_dim**-0.5)),
        dtype=call.query.dtype,
        kv_dtype=kv_dtype,
        window=visibility.window,
        chunk=visibility.chunk,
        softcap=call.kwargs.get("softcap"),
        sinks="s_aux" in call.kwargs,
        alibi=slopes is not None and slopes.dim() == 1,
        relative=slopes.shape[1] // 2 if slopes is not None and slopes.dim() == 2 else None,
        causal=visibility.causal,
    )
