"""Models that do not generate: embeddings, classes, scores and rewards. A plugin like any other's.

Registered in the entry-point group ``engine.runners``; torch is imported only where a model runs. `requests` and
`outputs` are what front-ends need, `runner` and what it imports is the core's side, `offline` has the methods of `LLM`.
"""

from __future__ import annotations

from engine.extensions.pooling.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RerankResult,
    ScoringOutput,
    ScoringRequestOutput,
)
from engine.extensions.pooling.params import PoolingParams

__all__ = [
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RerankResult",
    "ScoringOutput",
    "ScoringRequestOutput",
]
