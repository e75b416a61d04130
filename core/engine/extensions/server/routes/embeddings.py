"""``/v1/embeddings`` and ``/pooling``: vectors of texts, and whatever else a model makes of them."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from engine.extensions.pooling.outputs import unpack
from engine.extensions.pooling.params import PoolingParams
from engine.extensions.server.pooling import (
    Answer,
    Embedding,
    EmbeddingsRequest,
    Pooled,
    Pooler,
    PoolRequest,
    numbers,
)
from engine.extensions.server.streams import answer

router = APIRouter()


@router.post("/v1/embeddings")
async def create_embedding(request: Request, body: EmbeddingsRequest) -> Response:
    """A vector for each of one or many inputs, text or token ids."""
    pooler = Pooler(request, body, "embd")
    params = PoolingParams("embed", body.dimensions, body.normalize, None, body.truncate_prompt_tokens)

    async def work() -> Answer:
        outputs = await pooler.pool(body.input, params, body.prompt_name)
        found = [Embedding(i, numbers(unpack(o.pooled), body.encoding_format)) for i, o in enumerate(outputs)]
        return pooler.answer(found, outputs)

    return await answer(request, work())


@router.post("/pooling")
async def pool(request: Request, body: PoolRequest) -> Response:
    """What the model makes of each input: a vector, a vector a token, numbers of classes."""
    pooler = Pooler(request, body, "pool")
    params = PoolingParams(body.task, body.dimensions, body.normalize, body.use_activation, body.truncate_prompt_tokens)

    async def work() -> Answer:
        outputs = await pooler.pool(body.input, params, body.prompt_name)
        found = [Pooled(i, numbers(unpack(o.pooled), body.encoding_format)) for i, o in enumerate(outputs)]
        return pooler.answer(found, outputs)

    return await answer(request, work())
