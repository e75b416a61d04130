"""What the routes of models that do not generate share: their requests' fields, how they run, and their answers."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Request as HTTPRequest
from pydantic import Field

from engine.extensions.pooling.outputs import Numbers, unpack
from engine.extensions.pooling.params import PoolingParams, Task
from engine.extensions.pooling.requests import Request as Made
from engine.extensions.pooling.requests import Requests
from engine.extensions.server import context
from engine.extensions.server.answers import CachedTokens
from engine.extensions.server.errors import APIError
from engine.extensions.server.protocol import Request, TokenId
from engine.extensions.server.service import Call, Job, Service
from engine.request import RequestOutput

Texts = str | Annotated[list[str], Field(min_length=1)]
Inputs = str | list[TokenId] | list[str] | list[list[TokenId]]
"""Text or token ids, one or many."""


class PoolingRequest(Request):
    """What every request for pooling may have."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="cut longer inputs to so many tokens; -1 cuts to the model's limit"
    )
    user: str | None = Field(None, description="accepted for OpenAI's clients; changes nothing")
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = Field(0, description="lower runs first")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="only requests of equal salt share cached prompts"
    )
    timeout: Annotated[float, Field(gt=0, le=1e9)] | None = Field(None, description="seconds until it ends with 408")

    def check(self, allow_unknown: bool) -> None:
        """Refuse what this server does not have; raises `APIError` with the field."""
        self.check_unknown(allow_unknown)


class Embeds(PoolingRequest):
    """What shapes vectors."""

    input: Inputs
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(None, description="for Matryoshka models")
    normalize: bool | None = Field(None, description="scale to length 1; by default as the checkpoint says")
    prompt_name: str | None = Field(None, description="which of the model's named prompts comes before a text")
    encoding_format: Literal["float", "base64"] = "float"


class EmbeddingsRequest(Embeds):
    """``POST /v1/embeddings``."""


class PoolRequest(Embeds):
    """``POST /pooling``: whatever the model serves."""

    task: Task | None = None
    use_activation: bool | None = Field(None, description="softmax or sigmoid; by default as the checkpoint says")


class ClassifyRequest(PoolingRequest):
    """``POST /v1/classify``."""

    input: Inputs
    use_activation: bool | None = Field(None, description="false gives the model's own numbers")


class ScoreRequest(PoolingRequest):
    """``POST /v1/score``: one text with many, or as many pairs."""

    text_1: Texts
    text_2: Texts
    instruction: str | None = Field(None, description="of models with a score template")
    use_activation: bool | None = Field(None, description="false gives the model's own numbers")


class Document(msgspec.Struct):
    """As Jina and Cohere wrap a text."""

    text: str


class RerankRequest(PoolingRequest):
    """``POST /v1/rerank``, as Jina and Cohere have it."""

    query: str
    documents: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(0, description="only so many; 0 is all")
    return_documents: bool | None = Field(None, description="texts in the answer; by default not on /v2/rerank")
    max_tokens_per_doc: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None, description="longer ones are cut"
    )
    instruction: str | None = Field(None, description="of models with a score template")


class PoolingUsage(msgspec.Struct):
    """Tokens that a request took."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput]) -> PoolingUsage:
        """The sum over all prompts."""
        read = sum(len(o.prompt_token_ids) for o in outputs)
        return cls(read, read, CachedTokens(sum(o.num_cached_tokens for o in outputs)))


class Answer(msgspec.Struct, kw_only=True):
    """What every route for pooling answers with; `data` has an item an input."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Any]
    usage: PoolingUsage


class Embedding(msgspec.Struct):
    """An item of ``/v1/embeddings``."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Pooled(msgspec.Struct):
    """An item of ``/pooling``."""

    index: int
    data: list[Any] | str
    object: Literal["pooling"] = "pooling"


class Class(msgspec.Struct):
    """An item of ``/v1/classify``."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Score(msgspec.Struct):
    """An item of ``/v1/score``."""

    index: int
    score: float
    object: Literal["score"] = "score"


def texts(given: Inputs) -> list[Any]:
    """One or many, as a list of many."""
    if not given and isinstance(given, list):
        raise APIError(400, "input is empty; give at least one", "input")
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def numbers(data: Numbers, encoding: str) -> list[Any] | str:
    """As JSON's numbers, or as base64 of float32, which the order of bytes of the wire is little-endian."""
    if encoding == "base64":
        return base64.b64encode(data.astype("<f4").tobytes()).decode()
    found: list[Any] = data.tolist()
    return found


class Pooler:
    """Runs one request's inputs.

    Args:
        request: of HTTP.
        body: of the request; what does not depend on the inputs is checked.
        prefix: of the answer's id.
    """

    def __init__(self, request: HTTPRequest, body: PoolingRequest, prefix: str) -> None:
        self.service: Service = context.service(request)
        self.call: Call = context.call(request, body, prefix)
        llm = self.service.llm
        self.requests = Requests(llm.info, None if llm.args.skip_tokenizer_init else llm.get_tokenizer())
        _ = self.requests.model  # refuses one that generates

    async def run(self, size: int, make: Callable[[], Sequence[Made]]) -> list[RequestOutput]:
        """The outputs of what `make` makes of texts of `size` characters, so many at a time as the engine runs."""
        made = await self.service.offload(size, make)
        jobs = [Job(prompt, params) for prompt, params in made]
        at_once, end = 2 * self.service.llm.info.max_num_seqs, None
        if self.call.deadline is not None:
            end = time.monotonic() + self.call.deadline
        outputs: list[RequestOutput] = []
        for begin in range(0, len(jobs), at_once):
            left = None if end is None else max(1e-3, end - time.monotonic())
            outputs += await self.service.complete(replace(self.call, deadline=left), jobs[begin : begin + at_once])
        return outputs

    async def pool(self, given: Inputs, params: PoolingParams, prompt_name: str | None = None) -> list[RequestOutput]:
        """An output an input."""
        many = texts(given)
        size = sum(len(x) for x in many)
        return await self.run(size, lambda: [self.requests.single(x, params, prompt_name) for x in many])

    async def score(
        self, first: list[str], second: list[str], which: list[tuple[int, int]], params: PoolingParams, how: str | None
    ) -> tuple[list[float], list[RequestOutput]]:
        """A score for each pair of texts, by their places in `first` and `second`, and the outputs; `how` instructs."""
        size = sum(map(len, first)) + sum(map(len, second))
        if self.requests.scores_pairs:
            outputs = await self.run(
                size, lambda: [self.requests.pair(first[i], second[j], params, how) for i, j in which]
            )
            return [float(unpack(o.pooled)[0]) for o in outputs], outputs
        self.requests.no_instruction(how)
        vector = replace(params, task="embed", use_activation=None)
        outputs = await self.run(size, lambda: [self.requests.single(x, vector) for x in (*first, *second)])
        vectors = [unpack(o.pooled) for o in outputs]
        return [self.requests.similarity(vectors[i], vectors[len(first) + j]) for i, j in which], outputs

    def answer(self, data: list[Any], outputs: Sequence[RequestOutput]) -> Answer:
        """Of all items."""
        names = self.service.names[0]
        return Answer(id=self.call.id, created=int(time.time()), model=names, data=data, usage=PoolingUsage.of(outputs))
