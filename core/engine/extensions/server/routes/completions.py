"""``/v1/completions``: text in, text out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import UNSET, UnsetType

from engine.extensions.server import constraints, context
from engine.extensions.server.answers import Completion, TextChoice, TextLogprobs, Usage
from engine.extensions.server.errors import APIError
from engine.extensions.server.logprobs import Entry, namer, text_logprobs
from engine.extensions.server.protocol import CompletionRequest
from engine.extensions.server.service import Call, Job, Service
from engine.extensions.server.streams import EventStream, answer, event
from engine.request import CompletionOutput, RequestOutput
from engine.text import Tokenizer

router = APIRouter()

FILL_IN_THE_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen coder
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<|fim▁begin|>", "<|fim▁hole|>", "<|fim▁end|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek coder
    ("<PRE>", "<SUF>", "<MID>"),
)
"""Tokens before the prompt, before the suffix, and before what fills the gap, of the models that have them."""


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Complete one or many prompts, as text or as token ids."""
    service = context.service(request)
    call = context.call(request, body, "cmpl")
    prompts = body.prompts()
    best_of = body.best_of or body.n
    if not prompts:
        raise APIError(400, "prompt is empty; give at least one", "prompt")
    if best_of < body.n:
        raise APIError(400, f"best_of is {best_of} and n is {body.n}; it must be at least n", "best_of")
    if body.stream and best_of > body.n:
        raise APIError(400, "best_of is not streamed: the best is known at the end only; leave it out", "best_of")
    service.check_room(len(prompts) * best_of)
    given = body.params() | {"n": best_of}
    given["logprobs"] = 0 if best_of > body.n and body.logprobs is None else body.logprobs
    if body.echo and body.logprobs is not None:
        given.setdefault("prompt_logprobs", body.logprobs)
    # An output of no tokens, to get the prompt's log probabilities, takes one that is not shown.
    given["max_tokens"] = body.max_tokens if body.max_tokens or not body.echo else 1
    form = constraints.asked(body)
    params = service.sampling_params(given | (form.given() if form else {}))
    field = form.field if form else ""
    jobs = [Job(await _prompt(service, body, prompt), params, field) for prompt in prompts]
    view = _View(
        body, call.id, service.names[0], int(time.time()), service.llm.get_tokenizer() if _needs(body) else None
    )
    if body.stream:
        return EventStream(_stream(service, call, jobs, view), service.args.sse_keep_alive_interval)
    return await answer(request, _complete(service, call, jobs, view))


def _needs(body: CompletionRequest) -> bool:
    """Whether the answer has text that the output does not bring along."""
    return body.echo or body.logprobs is not None


async def _prompt(service: Service, body: CompletionRequest, prompt: str | list[int]) -> dict[str, object]:
    if body.suffix:
        prompt = _around_gap(service.llm.get_tokenizer(), prompt, body.suffix)
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    special = body.add_special_tokens is not False
    return {"prompt": prompt, "prompt_token_ids": await service.encode(prompt, add_special_tokens=special)}


def _around_gap(tokenizer: Tokenizer, prompt: str | list[int], suffix: str) -> str:
    known = tokenizer.hf.backend_tokenizer.token_to_id if tokenizer.hf.is_fast else tokenizer.hf.get_vocab().get
    if isinstance(prompt, list):
        raise APIError(400, "suffix needs a prompt that is text; put the model's own tokens into the ids", "suffix")
    for before, behind, middle in FILL_IN_THE_MIDDLE:
        if all(known(token) is not None for token in (before, behind, middle)):
            return f"{before}{prompt}{behind}{suffix}{middle}"
    raise APIError(400, "this model cannot fill in the middle; leave suffix out", "suffix", "unsupported_parameter")


@dataclass
class _Shown:
    """What of a choice is out."""

    begun: bool = False
    ended: bool = False
    num_chars: int = 0
    num_tokens: int = 0
    offset: int = 0  # of the next token in the text, as log probabilities count it


@dataclass
class _View:
    """How outputs become answers."""

    body: CompletionRequest
    id: str
    model: str
    created: int
    tokenizer: Tokenizer | None

    def answer(self, choices: list[TextChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def prompt(self, output: RequestOutput) -> str:
        """What `echo` shows before the completion."""
        if not self.body.echo:
            return ""
        if output.prompt is not None:
            return output.prompt
        assert self.tokenizer is not None
        return self.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    def hidden(self, output: RequestOutput) -> RequestOutput:
        """Without the token that was made only because the engine makes at least one."""
        if self.body.max_tokens != 0:
            return output
        empty = [replace(c, text="", token_ids=[], logprobs=c.logprobs and []) for c in output.outputs]
        return replace(output, outputs=empty)

    def piece(self, index: int, output: RequestOutput, c: CompletionOutput, shown: _Shown) -> TextChoice | None:
        """What is new of a choice, if it is worth an event."""
        body = self.body
        text = c.text[shown.num_chars :]
        # Text may be held back as the beginning of a stop string; tokens alone count if they were asked for.
        new_tokens = len(c.token_ids) > shown.num_tokens and (body.logprobs is not None or body.return_token_ids)
        if shown.ended or not (text or new_tokens or c.finished()):
            return None
        choice = TextChoice(
            index=index,
            text=text if shown.begun else self.prompt(output) + text,
            logprobs=self.logprobs(output, c, shown),
            finish_reason=c.finish_reason,
            stop_reason=c.stop_reason,
            token_ids=c.token_ids[shown.num_tokens :] if body.return_token_ids else UNSET,
            prompt_token_ids=output.prompt_token_ids if body.return_token_ids and not shown.begun else UNSET,
        )
        shown.begun, shown.ended = True, c.finished()
        shown.num_chars, shown.num_tokens = len(c.text), len(c.token_ids)
        return choice

    def logprobs(self, output: RequestOutput, c: CompletionOutput, shown: _Shown) -> TextLogprobs | None:
        """Of the new tokens, and of the prompt's at the very beginning."""
        if self.body.logprobs is None:
            return None
        assert self.tokenizer is not None
        tokens = c.token_ids[shown.num_tokens :]
        entries: list[Entry | None] = [*(c.logprobs or [])[shown.num_tokens :]]
        if self.body.echo and not shown.begun:
            tokens = output.prompt_token_ids + tokens
            entries = [*(output.prompt_logprobs or []), *entries]
        name = namer(self.body.return_tokens_as_token_ids)
        found = text_logprobs(tokens, entries, name, shown.offset, self.body.logprobs, self.tokenizer)
        shown.offset += sum(len(self.tokenizer.token_text(i)) for i in tokens)
        return found


async def _complete(service: Service, call: Call, jobs: list[Job], view: _View) -> Completion:
    body = view.body
    choices = []
    outputs = [view.hidden(o) for o in await service.complete(call, jobs)]
    for i, output in enumerate(outputs):
        best = output.outputs
        if len(best) > body.n:
            best = sorted(best, key=lambda c: (c.cumulative_logprob or 0.0) / max(1, len(c.token_ids)), reverse=True)
        echo = view.prompt(output)
        for j, c in enumerate(best[: body.n]):
            choices.append(
                TextChoice(
                    index=i * body.n + j,
                    text=echo + c.text,
                    logprobs=view.logprobs(output, c, _Shown()),
                    finish_reason=c.finish_reason,
                    stop_reason=c.stop_reason,
                    prompt_logprobs=(output.prompt_logprobs or []) if body.prompt_logprobs is not None else UNSET,
                    token_ids=c.token_ids if body.return_token_ids else UNSET,
                    prompt_token_ids=output.prompt_token_ids if body.return_token_ids else UNSET,
                )
            )
    return view.answer(choices, Usage.of(outputs))


async def _stream(service: Service, call: Call, jobs: list[Job], view: _View) -> AsyncGenerator[bytes, None]:
    body = view.body
    options = body.stream_options
    wants_usage = service.args.enable_force_include_usage or (options is not None and options.include_usage)
    running_usage = options is not None and options.continuous_usage_stats
    latest: dict[int, RequestOutput] = {}
    shown: dict[int, _Shown] = {}
    async with aclosing(service.stream(call, jobs)) as outputs:
        async for i, raw in outputs:
            latest[i] = output = view.hidden(raw)
            usage = Usage.of(latest.values()) if running_usage else None if wants_usage else UNSET
            for c in output.outputs:
                index = i * body.n + c.index
                if choice := view.piece(index, output, c, shown.setdefault(index, _Shown())):
                    yield event(view.answer([choice], usage))
    if wants_usage:
        yield event(view.answer([], Usage.of(latest.values())))
