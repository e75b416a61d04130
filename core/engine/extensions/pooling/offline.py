"""The methods of `LLM` for models that do not generate; each takes the `LLM` first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.errors import RequestError
from engine.extensions.pooling.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Numbers,
    PoolingOutput,
    PoolingRequestOutput,
    RerankResult,
    ScoringOutput,
    ScoringRequestOutput,
    T,
    unpack,
)
from engine.extensions.pooling.params import PoolingParams, Task
from engine.extensions.pooling.requests import Request, Requests, as_list, pairs
from engine.frontend import Prompt
from engine.request import RequestOutput

if TYPE_CHECKING:
    from engine.llm import LLM

Texts = str | Sequence[str]


def encode(
    llm: LLM,
    prompts: Prompt | Sequence[Prompt],
    pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
    *,
    pooling_task: Task | None = None,
    prompt_name: str | None = None,
    truncate_prompt_tokens: int | None = None,
    use_tqdm: bool = True,
) -> list[PoolingRequestOutput[PoolingOutput]]:
    """What the model makes of prompts, as arrays; outputs come in the order of the prompts.

    Args:
        llm: the model.
        prompts: one or many; each is text, token ids, or a dictionary, as for `LLM.generate`.
        pooling_params: one for all, or one each.
        pooling_task: the task, where the parameters leave it open; else the model's first.
        prompt_name: which of the checkpoint's named prompts comes before each text.
        truncate_prompt_tokens: as in `PoolingParams`, where these leave it open.
        use_tqdm: show a progress bar on a terminal.

    Raises:
        RequestError: a prompt or parameter is wrong, or the model does not serve the task; none of the prompts is run.
    """
    options = (pooling_params, pooling_task, prompt_name, truncate_prompt_tokens, use_tqdm)
    return [_output(o, PoolingOutput(unpack(o.pooled))) for o in _run_all(llm, prompts, *options)]


def embed(
    llm: LLM,
    prompts: Prompt | Sequence[Prompt],
    *,
    pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
    prompt_name: str | None = None,
    truncate_prompt_tokens: int | None = None,
    use_tqdm: bool = True,
) -> list[EmbeddingRequestOutput]:
    """An embedding a prompt; arguments and errors as in `encode`."""
    task: Task = "embed"
    options = (pooling_params, task, prompt_name, truncate_prompt_tokens, use_tqdm)
    return [_output(o, EmbeddingOutput(unpack(o.pooled).tolist())) for o in _run_all(llm, prompts, *options)]


def classify(
    llm: LLM,
    prompts: Prompt | Sequence[Prompt],
    *,
    pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
    truncate_prompt_tokens: int | None = None,
    use_tqdm: bool = True,
) -> list[ClassificationRequestOutput]:
    """A number a class for each prompt, probabilities unless the parameters say otherwise; otherwise as `encode`."""
    task: Task = "classify"
    options = (pooling_params, task, None, truncate_prompt_tokens, use_tqdm)
    return [_output(o, ClassificationOutput(unpack(o.pooled).tolist())) for o in _run_all(llm, prompts, *options)]


def reward(
    llm: LLM,
    prompts: Prompt | Sequence[Prompt],
    *,
    pooling_params: PoolingParams | None = None,
    truncate_prompt_tokens: int | None = None,
    use_tqdm: bool = True,
) -> list[PoolingRequestOutput[PoolingOutput]]:
    """Rewards as the model gives them, without an activation unless the parameters say otherwise.

    Numbers [labels] a prompt of a model for sequence classification, [n, labels] of one that judges each token.
    """
    params = pooling_params or PoolingParams(use_activation=False)
    task: Task = requests_of(llm).task(None)
    if task not in ("classify", "token_classify"):
        raise RequestError(f"the model serves {task}, and rewards need one that classifies texts or tokens")
    options = (params, task, None, truncate_prompt_tokens, use_tqdm)
    return [_output(o, PoolingOutput(unpack(o.pooled))) for o in _run_all(llm, prompts, *options)]


def score(
    llm: LLM,
    data_1: Texts,
    data_2: Texts,
    /,
    *,
    pooling_params: PoolingParams | None = None,
    instruction: str | None = None,
    truncate_prompt_tokens: int | None = None,
    use_tqdm: bool = True,
) -> list[ScoringRequestOutput]:
    """How well texts fit: one with each of many, or many with as many. Higher is better.

    A cross-encoder or reranker reads both texts of a pair; of other models, embeddings are compared.

    Args:
        llm: the model.
        data_1: the query, or one a text of `data_2`.
        data_2: what is judged.
        pooling_params: ``use_activation=False`` gives the model's own numbers.
        instruction: of models with a template, in place of its usual one.
        truncate_prompt_tokens: as in `PoolingParams`.
        use_tqdm: show a progress bar on a terminal.

    Raises:
        RequestError: the texts do not pair, or the model cannot judge them.
    """
    requests, which = requests_of(llm), pairs(data_1, data_2)
    params = _with(pooling_params or PoolingParams(), None, truncate_prompt_tokens)
    first, second = ([x] if isinstance(x, str) else list(x) for x in (data_1, data_2))
    if requests.scores_pairs:
        made = [requests.pair(first[i], second[j], params, instruction) for i, j in which]
        return [_output(o, ScoringOutput(float(unpack(o.pooled)[0]))) for o in _run(llm, made, use_tqdm)]
    requests.no_instruction(instruction)
    params = replace(params, task="embed")
    outputs = _run(llm, [requests.single(text, params) for text in (*first, *second)], use_tqdm)
    vectors: list[Numbers] = [unpack(o.pooled) for o in outputs]
    found = []
    for i, j in which:
        a, b = outputs[i], outputs[len(first) + j]
        joined = replace(b, prompt_token_ids=a.prompt_token_ids + b.prompt_token_ids)
        found.append(_output(joined, ScoringOutput(requests.similarity(vectors[i], vectors[len(first) + j]))))
    return found


def rerank(
    llm: LLM,
    query: str,
    documents: Sequence[str],
    *,
    top_n: int | None = None,
    instruction: str | None = None,
    truncate_prompt_tokens: int | None = None,
    use_tqdm: bool = True,
) -> list[RerankResult]:
    """Documents by how well they fit a query, the best first; at most `top_n`. Otherwise as `score`."""
    outputs = score(
        llm,
        query,
        list(documents),
        instruction=instruction,
        truncate_prompt_tokens=truncate_prompt_tokens,
        use_tqdm=use_tqdm,
    )
    scores = [o.outputs.score for o in outputs]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_n]
    return [RerankResult(i, scores[i], documents[i]) for i in order]


def requests_of(llm: LLM) -> Requests:
    """What makes requests for the model of `llm`."""
    return Requests(llm.info, None if llm.args.skip_tokenizer_init else llm.get_tokenizer())


def _run_all(
    llm: LLM,
    prompts: Prompt | Sequence[Prompt],
    given: PoolingParams | Sequence[PoolingParams] | None,
    task: Task | None,
    prompt_name: str | None,
    truncate: int | None,
    use_tqdm: bool,
) -> list[RequestOutput]:
    """Outputs of prompts, each by itself; arguments as in `encode`."""
    many, given = as_list(prompts), given or PoolingParams()
    params = [given] * len(many) if isinstance(given, PoolingParams) else list(given)
    if len(params) != len(many):
        raise RequestError(f"{len(many)} prompts and {len(params)} pooling_params; give one for all, or one each")
    requests = requests_of(llm)
    made = [requests.single(p, _with(q, task, truncate), prompt_name) for p, q in zip(many, params, strict=True)]
    return _run(llm, made, use_tqdm)


def _with(params: PoolingParams, task: Task | None, truncate: int | None) -> PoolingParams:
    if task is not None and params.task not in (None, task):
        raise RequestError(f"pooling_params ask for {params.task}, and the call for {task}; leave one of them out")
    truncate = truncate if params.truncate_prompt_tokens is None else params.truncate_prompt_tokens
    return replace(params, task=params.task or task, truncate_prompt_tokens=truncate)


def _run(llm: LLM, made: Sequence[Request], use_tqdm: bool) -> list[RequestOutput]:
    return llm.generate([prompt for prompt, _ in made], [params for _, params in made], use_tqdm=use_tqdm)


def _output(output: RequestOutput, made: T) -> PoolingRequestOutput[T]:
    return PoolingRequestOutput(output.request_id, made, output.prompt_token_ids, output.num_cached_tokens)
