"""The seam of parallel models: what the engine asks of one rank's share. A model that is whole has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from engine.model.adapt import AdaptedModel


class Share(Protocol):
    """One rank's share of a model, made by its executor. All ranks make the same calls in the same order."""

    capturable: bool  # its collectives may run inside captured graphs

    def cut(self, adapted: AdaptedModel) -> None:
        """Cut parameters and exchange modules, on `meta`; raises `UnsupportedModelError` or `ConfigError`."""

    def loaded(self, adapted: AdaptedModel) -> None:
        """The weights have been read here; returns once they have on all ranks."""

    def least(self, value: int) -> int:
        """The least value that a rank has."""

    def same(self, token_ids: Tensor) -> Tensor:
        """The token ids, int64 [S], of the rank whose count."""
