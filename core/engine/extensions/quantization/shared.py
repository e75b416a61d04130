"""A head and an embedding that share one quantised weight: the head multiplies by it, the embedding reads its rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.interfaces import LinearMethod, QuantScheme
from engine.model.load import frozen

log = logging.getLogger(__name__)


def share(model: PreTrainedModel, linear: Callable[[QuantScheme], LinearMethod | None]) -> Sequence[SharedHead]:
    """The head, if it is to be rounded, and nothing but the embedding has its weight too."""
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    weight: Any = getattr(head, "weight", None)
    recipe: Any = getattr(head, "quant", None)
    if recipe is None or not hasattr(table, "weight") or weight is not table.weight:
        return []
    users = sum(parameter is weight for _, parameter in model.named_parameters(remove_duplicate=False))
    if users != 2 or not isinstance(table, nn.Embedding) or table.max_norm is not None:
        return []
    method = linear(recipe.scheme)
    if method is None or type(method).rows is LinearMethod.rows:
        log.warning("the head stays in %s: the platform's %s gives no rows to the embedding that shares its weight",
                    weight.dtype, recipe.scheme.name)  # fmt: skip
        return []
    return [SharedHead(head, table, method)]


class SharedHead:
    """The two modules, and what the platform keeps for both."""

    def __init__(self, head: nn.Linear, table: nn.Embedding, method: LinearMethod) -> None:
        self._head, self._table, self._method = head, table, method
        self._packed: object = None

    def allocate(self, device: torch.device) -> None:
        """Wait for the tensor."""
        weight: Any = self._head.weight
        weight.sink = lambda tensor: self._take(tensor.to(device))

    def pack(self, method: LinearMethod | None) -> None:
        """It was packed as it came."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """What the embedding reads."""
        return self._method.rows(ids, self._packed).to(dtype)

    def _take(self, tensor: Tensor) -> None:
        self._packed = self._method.pack(tensor, None)
        for module in (self._head, self._table):
            del module._parameters["weight"]
            module.__dict__["weight"] = tensor.to("meta")
        self._head.quantised = frozen(torch.empty(tensor.numel() + len(tensor) * 2, dtype=torch.uint8, device="meta"))
        self._head.forward = self._multiply  # type: ignore[method-assign]
        self._table.shared = self  # type: ignore[assignment]
        kind: Any = type(self._table)
        self._table.__class__ = _reading(kind)

    def _multiply(self, input: Tensor) -> Tensor:
        y = self._method.apply(input, self._packed)
        return y if self._head.bias is None else y + self._head.bias


class _Reading(nn.Embedding):
    shared: Any

    def forward(self, input: Tensor) -> Tensor:
        rows: Tensor = self.shared.rows(input, self.weight.dtype)
        return rows


@functools.cache
def _reading(kind: Any) -> type[nn.Embedding]:
    """A class that reads rows where `kind`, which may do more with them, calls what `nn.Embedding` does."""
    return _Reading if kind is nn.Embedding else type(f"Reading{kind.__name__}", (kind, _Reading), {})
