"""A forward pass on `meta` tensors: what a model does, seen rather than guessed from its configuration.

The pass costs no memory and no arithmetic. It records every call of an attention function, with the mask that the model
made for it, the input of every linear layer, and the layers of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from engine.errors import UnsupportedModelError

IMPLEMENTATION = "engine_probe"
"""The name under which Transformers finds the recording attention, mask and experts functions."""

NUM_TOKENS = 7
"""Tokens of the pass: no size of a model is likely to equal it."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Transformers' mask functions: (batch, head, query position, key position) -> whether it is seen."""


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees; see `engine.interfaces.AttentionSpec`."""

    window: int | None = None
    chunk: int | None = None
    causal: bool = True

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether `key` positions are seen by `query` positions (int64, broadcast)."""
        seen = key <= query if self.causal else torch.ones_like(key <= query)
        if self.window is not None:
            seen = seen & (key > query - self.window) & (key < query + self.window)
        if self.chunk is not None:
            seen = seen & (key // self.chunk == query // self.chunk)
        return seen


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function, on meta tensors."""

    module: nn.Module
    query: Tensor  # [1, H, N, D]
    key: Tensor  # [1, K, N, D]
    value: Tensor  # [1, K, N, E]
    mask: Tensor | None
    kwargs: Mapping[str, Any]  # the other arguments that are not None


@dataclass
class Observations:
    """What the pass saw."""

    attention: list[AttentionCall] = field(default_factory=list)  # in order
    linears: dict[nn.Module, list[tuple[Tensor, int]]] = field(default_factory=dict)  # inputs in order, their versions
    experts: dict[nn.Module, int] = field(default_factory=dict)  # how many a token goes to
    vocab_size: int = 0  # V of the logits [1, N, V]
    ahead: bool = False  # tokens may attend to later ones
    masks: list[tuple[Tensor, MaskFunction, int | None]] = field(default_factory=list)

    def visibility(self, mask: Tensor) -> Visibility | None:
        """What `mask`, given to a call, lets queries see; None if no mask function that we know made it."""
        base = mask if mask._base is None else mask._base
        for made, function, local_size in self.masks:
            if made is base and made.shape == mask.shape:
                return recognise(function, local_size)
        return None


_observing: ContextVar[Observations] = ContextVar("observing")


def observe(model: PreTrainedModel, run: Callable[[Tensor, Tensor], Any], device: torch.device) -> Observations:
    """Run `model` once over `NUM_TOKENS` tokens and report what it did.

    `model` and its parts must use the implementation `IMPLEMENTATION`. `run` calls it with token ids and positions,
    int64 [N], and returns its output. On `meta`, as the `device` of the parameters and buffers, the pass costs nothing,
    and raises `UnsupportedModelError` where the model's code looks at data.
    """
    seen = Observations()
    token = _observing.set(seen)

    def record(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.linears.setdefault(linear, []).append((inputs[0], inputs[0]._version))

    try:
        with ExitStack() as stack:
            for module in model.modules():
                if type(module) is nn.Linear:
                    stack.callback(module.register_forward_pre_hook(record).remove)
            for context in (torch.no_grad(), device, _WithoutData()):  # type: ignore[no-untyped-call]
                stack.enter_context(context)
            output = run(torch.zeros(NUM_TOKENS, dtype=torch.int64), torch.arange(NUM_TOKENS))
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be run to examine its attention: {type(error).__name__}: {error}"
        ) from error
    finally:
        _observing.reset(token)
    seen.vocab_size = output.logits.shape[-1]
    return seen


class _WithoutData(TorchDispatchMode):
    """Answers what depends on data: every scalar is 1 or true, nothing is found where something is searched."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return args[0].new_empty(0, args[0].dim(), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


def record_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as Transformers calls it, which records the call and gives zeros."""
    given = {name: argument for name, argument in kwargs.items() if argument is not None}
    _observing.get().attention.append(AttentionCall(module, query, key, value, attention_mask, given))
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _record_mask(batch_size: int, q_length: int, kv_length: int, mask_function: MaskFunction, **kwargs: Any) -> Tensor:
    mask = torch.empty(batch_size, 1, q_length, kv_length, dtype=kwargs.get("dtype", torch.float32))
    _observing.get().masks.append((mask, mask_function, kwargs.get("local_size")))
    return mask


def _record_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    _observing.get().experts[module] = top_k_index.shape[-1]
    return torch.empty_like(hidden_states)


AttentionInterface.register(IMPLEMENTATION, record_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _record_mask)
ExpertsInterface.register(IMPLEMENTATION, _record_experts)


def recognise(function: MaskFunction, local_size: int | None) -> Visibility | None:
    """The visibility that `function` describes, found by evaluating it; None if it is none of those that we know.

    `local_size` is the size of its window or chunk, where Transformers says it.
    """
    size = local_size or 1024
    points = sorted({max(0, n * size + i) for n in range(4) for i in (-2, -1, 0, 1, 2)} | set(range(8)))
    query, key = torch.tensor(points)[:, None], torch.tensor(points)[None]
    zero = torch.zeros((), dtype=torch.int64)
    try:
        seen = torch.broadcast_to(_plain_text(function, points[-1] + 1)(zero, zero, query, key), (len(points),) * 2)
    except (IndexError, RuntimeError):
        return None
    choices = [Visibility(), Visibility(causal=False)]
    if local_size is not None:
        choices += [Visibility(local_size), Visibility(chunk=local_size), Visibility(local_size + 1, causal=False)]
    return next((choice for choice in choices if torch.equal(choice(query, key), seen)), None)


def _plain_text(function: Any, length: int, name: str = "") -> Any:
    """`function` with values for the tensors that it closes over: text of `length` without images or padding."""
    if isinstance(function, Tensor):
        # Transformers numbers blocks of image tokens from 0 on; -1 is text. Other tensors count padding.
        value = -1 if name.endswith("block_sequence_ids") else 0
        return torch.full((*function.shape[:-1], length), value) if function.dim() else function
    if isinstance(function, tuple):
        return tuple(_plain_text(part, length) for part in function)
    if not isinstance(function, FunctionType) or function.__closure__ is None:
        return function
    names = function.__code__.co_freevars
    values = (_plain_text(c.cell_contents, length, n) for n, c in zip(names, function.__closure__, strict=True))
    cells = tuple(CellType(value) for value in values)
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
