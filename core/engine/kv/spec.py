"""What one kind of layer keeps of a sequence, in blocks of `block_size` tokens. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class KVCacheSpec(ABC):
    """One kind of layer. Layers with equal specifications can share block tables; the KV manager asks nothing else.

    Block i of a sequence covers tokens ``[i * block_size, (i + 1) * block_size)``.

    Attributes:
        block_size: tokens in a block.
    """

    block_size: int

    def num_blocks(self, num_tokens: int) -> int:
        """Entries of the block table once `num_tokens` tokens are computed, dead ones included."""
        return -(-num_tokens // self.block_size)

    @abstractmethod
    def num_dead(self, num_computed: int) -> int:
        """Leading blocks that no token from position `num_computed` on needs."""

    @abstractmethod
    def max_blocks(self, num_tokens: int, step_tokens: int) -> int:
        """Most live blocks of a sequence while it grows to `num_tokens`, at most `step_tokens` a step."""

    def longest_hit(self, page: Callable[[int], int], num_tokens: int, align: int) -> int:
        """The longest prefix that need not be computed.

        Args:
            page: of a block's index, the page that has it cached, 0 for none.
            num_tokens: at most this many.
            align: the prefix is a multiple of it; it is a multiple of `block_size`.
        """
        hit = num_tokens // align * align
        while hit:
            live = range(self.num_dead(hit), hit // self.block_size)
            missing = next((i for i in reversed(live) if not page(i)), None)
            if missing is None:
                break
            hit = missing * self.block_size // align * align
        return hit


@dataclass(frozen=True)
class FullSpec(KVCacheSpec):
    """Every token sees all before it."""

    def num_dead(self, num_computed: int) -> int:
        """None: a block is needed to the end."""
        return 0

    def max_blocks(self, num_tokens: int, step_tokens: int) -> int:
        """All."""
        return self.num_blocks(num_tokens)

    def longest_hit(self, page: Callable[[int], int], num_tokens: int, align: int) -> int:
        """The chain of cached blocks from the first on; asking in that order costs nothing when there is none."""
        end = num_tokens // align * align // self.block_size
        first_missing = next((i for i in range(end) if not page(i)), end)
        return first_missing * self.block_size // align * align


class _LocalSpec(KVCacheSpec):
    """Every token sees a bounded number of tokens before it."""

    @property
    @abstractmethod
    def reach(self) -> int:
        """Most earlier tokens that one sees."""

    @abstractmethod
    def first_visible(self, position: int) -> int:
        """The first token that `position` sees; never decreases with it."""

    def num_dead(self, num_computed: int) -> int:
        """Blocks wholly before what the next token sees."""
        return self.first_visible(num_computed) // self.block_size

    def max_blocks(self, num_tokens: int, step_tokens: int) -> int:
        """Blocks that the reach and one step's tokens touch at the worst offset."""
        touched = (self.reach + step_tokens - 2) // self.block_size + 2
        return min(touched, self.num_blocks(num_tokens))


@dataclass(frozen=True)
class SlidingWindowSpec(_LocalSpec):
    """Key j is seen by query i when ``i - window < j <= i``.

    Attributes:
        window: tokens that one sees, itself included.
    """

    window: int

    @property
    def reach(self) -> int:
        """All of the window but the token itself."""
        return self.window - 1

    def first_visible(self, position: int) -> int:
        """The window's first token."""
        return max(0, position - self.window + 1)


@dataclass(frozen=True)
class ChunkedSpec(_LocalSpec):
    """Key j is seen by query i when ``j // chunk == i // chunk`` and ``j <= i``.

    Attributes:
        chunk: tokens in a chunk.
    """

    chunk: int

    @property
    def reach(self) -> int:
        """All of the chunk but its last token."""
        return self.chunk - 1

    def first_visible(self, position: int) -> int:
        """The chunk's first token."""
        return position // self.chunk * self.chunk


@dataclass(frozen=True)
class KVGroup:
    """Layers that share block tables.

    Attributes:
        spec: what each layer keeps.
        layers: their names.
    """

    spec: KVCacheSpec
    layers: tuple[str, ...]
