"""What comes of requests for pooling, under the names that vLLM's users know; and how it crosses a socket. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float32]
"""Float32: [E], [labels], [1], or with a row a token before these."""


@dataclass
class PoolingOutput:
    """`data`, float32: whatever the task made, as a numpy array."""

    data: Numbers


@dataclass
class EmbeddingOutput:
    """`embedding`: its numbers."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers."""
        return len(self.embedding)


@dataclass
class ClassificationOutput:
    """`probs`: a number a class, in the order of the model's labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many classes."""
        return len(self.probs)


@dataclass
class ScoringOutput:
    """`score`: how well the two texts fit."""

    score: float


T = TypeVar("T", PoolingOutput, EmbeddingOutput, ClassificationOutput, ScoringOutput)


@dataclass
class PoolingRequestOutput(Generic[T]):
    """What came of one prompt.

    Attributes:
        request_id: unique in the engine.
        outputs: what the task made.
        prompt_token_ids: the prompt as the model saw it.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        finished: always true; as other outputs have it.
    """

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PoolingRequestOutput[ClassificationOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]


@dataclass
class RerankResult:
    """A document with its place.

    Attributes:
        index: in the documents as they were given.
        relevance_score: how well it fits the query.
        document: its text.
    """

    index: int
    relevance_score: float
    document: str


def pack(shape: Sequence[int], data: bytes) -> bytes:
    """Float32 numbers with their shape: the number of dimensions and each of them as int32, then the data."""
    return np.array([len(shape), *shape], np.int32).tobytes() + data


def unpack(packed: Any) -> Numbers:
    """What `pack` was given."""
    num = int(np.frombuffer(packed, np.int32, 1)[0])
    shape = np.frombuffer(packed, np.int32, num, offset=4)
    return np.frombuffer(packed, np.float32, offset=4 * (num + 1)).reshape(shape)
