"""Collectives between the ranks of one group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GroupSpec:
    """A group of ranks with a role.

    Attributes:
        role: what the group is for: ``"tp"``, ``"pp"``, ``"ep"``, ``"dp"``, ``"cp"``, ``"world"``.
        ranks: global ranks in group order.
        rank: this process's global rank; a member.
        timeout: seconds after which a collective that some rank did not enter ends in an error.
    """

    role: str
    ranks: tuple[int, ...]
    rank: int
    timeout: float = 300.0


class Communicator(ABC):
    """Collectives over one group. Inputs are never changed; results are the same bits on every rank.

    Every rank must call with the same shapes and dtypes; a mismatch ends in a `CommunicatorError` within the
    group's timeout.
    """

    def __init__(self, group: GroupSpec) -> None:
        self.group = group

    @property
    def rank(self) -> int:
        """This process's position in the group."""
        return self.group.ranks.index(self.group.rank)

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return len(self.group.ranks)

    @property
    def capturable(self) -> bool:
        """Whether the collectives may run inside a captured graph."""
        return False

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks; same shape and dtype as `x`."""

    @abstractmethod
    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """The ranks' tensors concatenated along `dim` in rank order.

        Args:
            x: this rank's; they may differ in size along `dim` only, and then `sizes` says so.
            dim: where to concatenate.
            sizes: every rank's size along `dim`, in rank order; None: they are equal. Asking the others would wait
                for the device.
        """

    @abstractmethod
    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """Rank r gets the r-th equal part along `dim` of the sum over ranks."""

    @abstractmethod
    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows ``x[sum(send[:r]):][:send[r]]`` go to rank r; ``receive[r]`` rows come from it, in rank order."""

    @abstractmethod
    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """Group rank `src`'s tensor; the others pass one of the same shape and dtype."""

    @abstractmethod
    def send(self, x: Tensor, dst: int) -> None:
        """Send to group rank `dst`, which must call `receive`."""

    @abstractmethod
    def receive(self, like: Tensor, src: int) -> Tensor:
        """A tensor of the shape and dtype of `like` from group rank `src`."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has entered."""

    @abstractmethod
    def close(self) -> None:
        """Release the group; further calls are errors."""
