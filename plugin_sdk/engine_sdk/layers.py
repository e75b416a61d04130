"""Decoder layers of the common structure, for platforms that compute one in a few calls of their own.

    h = x + o(attention(turned(q), turned(k), v))     q, k, v of norm(x), heads of q and k perhaps normed
    y = h + down(silu(gate) * up)                     gate, up of norm(h)

The names of a layer's parts propose it (`find_layers`). What decides is its first pass, while the model is loaded: the
model's own code and the platform's must hand the same to attention, and give the same (`exchange_layer`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.interfaces import AttentionBackend, KVCache, LinearMethod, Plan

log = logging.getLogger(__name__)

LayerForward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [1, N, hidden], cos and sin [1, N, D]) to the layer's result [1, N, hidden]."""

CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Norm of the difference of two ways to compute the same, over the norm of the result: some units of rounding."""


class Projection(Protocol):
    """What linear layers that read one tensor become: one product, of which each takes its slice.

    Attributes:
        members: the layers, in the order of their rows.
        method, packed: what the platform packed the weight with, and what it made of it.
    """

    members: Sequence[nn.Module]
    method: LinearMethod | None
    packed: object

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., rows of all members]."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm's parameters."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class DecoderLayer:
    """The parts of a layer that looks like one of the common structure.

    Attributes:
        module: the layer.
        attention: its attention, which `attend` takes.
        norms: of the layer's input, and of the feed-forward part's.
        head_norms: of the heads of queries and of keys; None where there are none.
        qkv, gate_up: linear layers that read the same tensor; one with the rows of all, or one each.
        o, down: linear layers.
        num_heads, num_kv_heads, head_dim: of attention.
    """

    module: nn.Module
    attention: nn.Module
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, Norm] | None
    qkv: Sequence[nn.Linear]
    o: nn.Linear
    gate_up: Sequence[nn.Linear]
    down: nn.Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int


def find_layers(model: nn.Module) -> list[DecoderLayer]:
    """Layers of `model` that may be exchanged: nothing but the usual parts, nothing of them hooked or exchanged yet."""
    return [layer for module in model.modules() if (layer := _propose(module)) is not None]


def _propose(module: nn.Module) -> DecoderLayer | None:
    parts = _children(module)
    if parts.keys() != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return None
    attention, mlp = parts["self_attn"], parts["mlp"]
    inner, outer = _children(attention), _children(mlp)
    qkv = ["qkv_proj"] if "qkv_proj" in inner else ["q_proj", "k_proj", "v_proj"]
    gate_up = ["gate_up_proj"] if "gate_up_proj" in outer else ["gate_proj", "up_proj"]
    normed = ["q_norm", "k_norm"] if "q_norm" in inner else []
    if inner.keys() != {*qkv, *normed, "o_proj"} or outer.keys() != {*gate_up, "down_proj"}:
        return None
    linears: dict[str, Any] = {name: m for name, m in (inner | outer).items() if name not in normed}
    reading = [linears[name] for name in (*qkv, *gate_up)]
    norms: list[Any] = [_norm(parts["input_layernorm"]), _norm(parts["post_attention_layernorm"])]
    norms += [_norm(inner[name]) for name in normed]
    changed = any("forward" in vars(m) for m in (module, attention, mlp))
    plain = all(isinstance(m, nn.Linear) for m in linears.values()) and None not in norms
    if changed or not plain or any(map(hooked, (module, attention, mlp, *reading))):
        return None
    sizes = _heads(attention, [linears[name].out_features for name in qkv], linears["o_proj"].in_features)
    if sizes is None:
        return None
    return DecoderLayer(
        module,
        attention,
        norms=(norms[0], norms[1]),
        head_norms=(norms[2], norms[3]) if normed else None,
        qkv=[linears[name] for name in qkv],
        o=linears["o_proj"],
        gate_up=[linears[name] for name in gate_up],
        down=linears["down_proj"],
        num_heads=sizes[0],
        num_kv_heads=sizes[1],
        head_dim=sizes[2],
    )


def _heads(attention: nn.Module, rows: list[int], width: int) -> tuple[int, int, int] | None:
    """How many heads queries and keys have, and their size, where `rows` of q, k and v and o's `width` fit together."""
    size = getattr(attention, "head_dim", None)
    if not isinstance(size, int) or width % size or sum(rows) <= width or (sum(rows) - width) % (2 * size):
        return None
    num_heads, num_kv_heads = width // size, (sum(rows) - width) // size // 2
    fitting = len(rows) == 1 or rows == [width, num_kv_heads * size, num_kv_heads * size]
    return (num_heads, num_kv_heads, size) if fitting else None


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Those that compute with weights; what a linear layer's become may lie elsewhere."""
    found = module.named_children()
    return {name: m for name, m in found if isinstance(m, nn.Linear) or next(m.parameters(), None) is not None}


def _norm(module: nn.Module) -> Norm | None:
    return None if hooked(module) or len(list(module.parameters())) != 1 else norm_of(module)


def norm_of(module: nn.Module) -> Norm | None:
    """What a module that looks like an RMS norm has of one; None where it has no such thing."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    return Norm(weight, eps) if isinstance(weight, Tensor) and isinstance(eps, float) else None


def hooked(module: nn.Module) -> bool:
    """Whether more happens when `module` is called than its forward, as where ranks share a layer."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def projection_of(linears: Sequence[nn.Linear]) -> Projection | None:
    """The product whose members are `linears`, all of them and in order; None where they are no such."""
    projection: Projection | None = getattr(linears[0], "projection", None)
    members = [] if projection is None else projection.members
    return projection if list(members) == list(linears) else None


def attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the module `attention` gives for q [N, H, D], k [N, K, D] and v [N, K, D] before its last projection."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    torch.ops.engine.attention(q, k, v, attention.engine_handle, None, None, out)
    return out


def attention_step(attention: nn.Module) -> tuple[AttentionBackend, KVCache, Plan] | None:
    """What `AttentionBackend.forward` of the module `attention` gets in this step, for a kernel that does its work.

    None where `attend` has to be called: in a step without plans, as after construction, and for attention that reads
    another layer's keys and values or is called several times.
    """
    step = getattr(attention, "engine_step", None)
    return None if step is None else step()


def exchange_layer(layer: DecoderLayer, make: Callable[[], LayerForward | None]) -> None:
    """Let `layer` run what `make` gives, from its second pass on, if both do the same in the first.

    `make` is called in the first pass, when all weights are packed; None leaves the layer as it is. The layer's own
    code stays for calls with anything but states and the angles of their positions.
    """
    own = layer.module.forward

    def first(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        ready = isinstance(getattr(layer.attention, "engine_handle", None), Tensor)
        if args or not ready or not _plain(**kwargs):
            return own(hidden_states, *args, **kwargs)
        with _Calls() as wanted:
            want = own(hidden_states, **kwargs)
        forward = make()
        same = False
        if forward is not None and isinstance(want, Tensor):
            try:
                with _Calls() as given:
                    got = forward(hidden_states, *kwargs["position_embeddings"])
                same = _agree(wanted.seen, given.seen) and same_result(got, want, hidden_states)
            except (RuntimeError, TypeError, ValueError) as error:
                log.debug("%s stays as it is: %s", type(layer.module).__name__, error)
        layer.module.forward = _served(own, forward) if same and forward is not None else own
        return want

    layer.module.forward = first


def _plain(
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_embeddings: Any = None,
    output_attentions: Any = None,
    **kwargs: Any,
) -> bool:
    """Whether a call of a layer has what a `LayerForward` takes, and nothing beyond."""
    absent = attention_mask is None and past_key_values is None and not output_attentions
    return absent and position_embeddings is not None


def _served(own: Callable[..., Any], forward: LayerForward) -> Callable[..., Any]:
    def served(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or not _plain(**kwargs):
            return own(hidden_states, *args, **kwargs)
        return forward(hidden_states, *kwargs["position_embeddings"])

    return served


class _Calls(TorchDispatchMode):
    """Keeps what attention is called with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.engine.attention.default:
            self.seen.append(tuple(x.clone() for x in args[:3]) + args[3:6])
        return func(*args, **(kwargs or {}))


def _agree(want: Sequence[tuple[Any, ...]], got: Sequence[tuple[Any, ...]]) -> bool:
    """Whether attention was called once, with the same queries, keys and values, and nothing else, in both."""
    if len(want) != 1 or len(got) != 1 or want[0][4:] != (None, None):
        return False
    return torch.equal(want[0][3], got[0][3]) and all(map(same_result, got[0][:3], want[0][:3]))


def same_result(got: Tensor, want: Tensor, x: Tensor | None = None) -> bool:
    """Whether two tensors differ by rounding only; where `x` was added to both, what was added to it."""
    if got.shape != want.shape or got.dtype != want.dtype or got.dtype not in CLOSE:
        return False
    added = want.double() if x is None else want.double() - x.double()
    rounding = 0 if x is None else torch.finfo(want.dtype).eps * want.double().norm()
    return bool((got.double() - want.double()).norm() <= CLOSE[want.dtype] * added.norm() + rounding)
