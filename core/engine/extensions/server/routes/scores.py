"""``/v1/score``, ``/v1/rerank`` and ``/v1/classify``: how well texts fit, the best of many, and what a text is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from engine.extensions.pooling.outputs import unpack
from engine.extensions.pooling.params import PoolingParams
from engine.extensions.pooling.requests import pairs
from engine.extensions.server.errors import APIError
from engine.extensions.server.pooling import (
    Answer,
    Class,
    ClassifyRequest,
    Pooler,
    PoolingUsage,
    RerankRequest,
    Score,
    ScoreRequest,
)
from engine.extensions.server.streams import answer

router = APIRouter()


@router.post("/v1/score")
@router.post("/score")
async def score(request: Request, body: ScoreRequest) -> Response:
    """How well texts fit: one with each of many, or each with its own."""
    pooler = Pooler(request, body, "score")
    which = pairs(body.text_1, body.text_2)
    first, second = ([x] if isinstance(x, str) else x for x in (body.text_1, body.text_2))
    params = PoolingParams(use_activation=body.use_activation, truncate_prompt_tokens=body.truncate_prompt_tokens)

    async def work() -> Answer:
        scores, outputs = await pooler.score(first, second, which, params, body.instruction)
        return pooler.answer([Score(i, x) for i, x in enumerate(scores)], outputs)

    return await answer(request, work())


@router.post("/v1/rerank")
@router.post("/rerank")
@router.post("/v2/rerank")
async def rerank(request: Request, body: RerankRequest) -> Response:
    """Documents by how well they fit a query, the best first."""
    pooler = Pooler(request, body, "rerank")
    documents = [_text(document, i) for i, document in enumerate(body.documents)]
    if body.max_tokens_per_doc is not None:
        most = body.max_tokens_per_doc
        size = sum(map(len, documents))
        documents = await pooler.service.offload(size, lambda: [pooler.requests.cut(d, most) for d in documents])
    params = PoolingParams(truncate_prompt_tokens=body.truncate_prompt_tokens)
    second = request.url.path.endswith("/v2/rerank")
    shown = not second if body.return_documents is None else body.return_documents

    async def work() -> dict[str, Any]:
        which = [(0, i) for i in range(len(documents))]
        scores, outputs = await pooler.score([body.query], documents, which, params, body.instruction)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n or None]
        results = [
            {"index": i, "relevance_score": scores[i]} | ({"document": {"text": documents[i]}} if shown else {})
            for i in order
        ]
        found = {"id": pooler.call.id, "model": pooler.service.names[0], "results": results}
        return found | {
            "usage": PoolingUsage.of(outputs),
            "meta": {"api_version": {"version": "2" if second else "1"}, "billed_units": {"search_units": 1}},
        }

    return await answer(request, work())


def _text(document: str | dict[str, Any], index: int) -> str:
    text = document if isinstance(document, str) else document.get("text")
    if not isinstance(text, str):
        raise APIError(400, "a document is a text, or an object with one as 'text'", f"documents.{index}")
    return text


@router.post("/v1/classify")
@router.post("/classify")
async def classify(request: Request, body: ClassifyRequest) -> Response:
    """A number a class for each of one or many inputs, and the class of the largest."""
    pooler = Pooler(request, body, "classify")
    params = PoolingParams(
        "classify", use_activation=body.use_activation, truncate_prompt_tokens=body.truncate_prompt_tokens
    )

    async def work() -> Answer:
        outputs = await pooler.pool(body.input, params)
        labels = pooler.requests.model["labels"]
        found = []
        for i, output in enumerate(outputs):
            probs = unpack(output.pooled).tolist()
            found.append(Class(i, labels[max(range(len(probs)), key=probs.__getitem__)], probs, len(probs)))
        return pooler.answer(found, outputs)

    return await answer(request, work())
