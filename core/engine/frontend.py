"""Between users and the core: prompts become token ids, tokens become text, `n` completions become one output.

Used alike where the core runs in this process (`LLM`) and where it runs in another (`extensions/serving`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import RequestError
from engine.info import EngineInfo
from engine.request import (
    CompletionOutput,
    CoreOutput,
    CoreRequest,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from engine.text import SequenceOutput, Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or ``{"prompt": str}`` / ``{"prompt_token_ids": [...]}`` with ``"cache_salt"`` or ``"pooling"``."""


@dataclass
class _Request:
    """One request while it runs."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[SequenceOutput]
    metrics: RequestMetrics
    running: set[str]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    pooled: bytes | None = None
    preemptions: dict[str, int] = field(default_factory=dict)

    def output(self) -> RequestOutput:
        self.metrics.num_preemptions = sum(self.preemptions.values())
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[_snapshot(s.completion) for s in self.sequences],
            finished=not self.running,
            prompt_logprobs=self.prompt_logprobs,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
            pooled=self.pooled,
        )


class Frontend:
    """Admits requests and assembles their outputs. Touches no device."""

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None, seed: int = 0) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._seeds = (((seed << 32) + i) % 2**63 for i in itertools.count())
        self._requests: dict[str, _Request] = {}
        self._sequences: dict[str, tuple[_Request, int]] = {}

    def running(self) -> list[str]:
        """Ids of the requests that run."""
        return list(self._requests)

    def owner(self, core_id: str) -> str | None:
        """The request that a core request belongs to, while it runs."""
        known = self._sequences.get(core_id)
        return known and known[0].request_id

    def default_params(self) -> SamplingParams:
        """Parameters for requests that bring none: what the model's generation_config.json recommends."""
        return SamplingParams(**self.info.default_sampling_params)

    def admit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> list[CoreRequest]:
        """Check a request against the model and split it into core requests, one a completion.

        Raises:
            RequestError: naming what is wrong, and the limits.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is running already; ids must be unique")
        text, ids, salt = self._read(prompt)
        pooling = prompt.get("pooling") if isinstance(prompt, Mapping) else None
        if self.info.pooling and pooling is None:
            raise RequestError(f"the model does not generate; it serves {', '.join(self.info.pooling['tasks'])}")
        room = self.info.max_model_len - len(ids) + (pooling is not None)  # its one token is never made
        self._check_prompt(ids, room)
        self._check_params(params)
        seed = next(self._seeds) if params.seed is None else params.seed
        bad = self._bad_words(params)
        now = time.monotonic()
        requests = [
            CoreRequest(
                request_id=request_id if params.n == 1 else f"{request_id}/{i}",
                prompt_token_ids=ids,
                params=replace(params, n=1, seed=seed + i, max_tokens=min(params.max_tokens or room, room)),
                eos_token_ids=self.info.eos_token_ids,
                bad_token_ids=bad,
                priority=priority,
                cache_salt=cache_salt if cache_salt is not None else salt,
                arrival=now,
                pooling=pooling,
            )
            for i in range(params.n)
        ]
        self._requests[request_id] = state = _Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=ids,
            sequences=[SequenceOutput(i, params, self.tokenizer, ids) for i in range(params.n)],
            metrics=RequestMetrics(arrival_time=now),
            running={r.request_id for r in requests},
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        for i, request in enumerate(requests):
            self._sequences[request.request_id] = (state, i)
        return requests

    def forget(self, request_id: str) -> list[str]:
        """Drop a request, whose core ids are returned so that the core can abort them."""
        state = self._requests.pop(request_id, None)
        if state is None:
            return []
        running = sorted(state.running)
        for core_id in running:
            del self._sequences[core_id]
        return running

    def process(
        self, outputs: Iterable[CoreOutput], *, only_finished: bool = False
    ) -> tuple[list[RequestOutput], list[str]]:
        """Take in what a step brought: requests that changed (or finished), and core ids to abort (stop strings)."""
        changed: dict[str, _Request] = {}
        stopped: list[str] = []
        now = time.monotonic()
        for output in outputs:
            known = self._sequences.get(output.request_id)
            if known is None:  # ended by a stop string or by the caller; the core hears of it later
                continue
            state, index = known
            sequence = state.sequences[index]
            self._record(state, output, now)
            sequence.push(output)
            if sequence.completion.finished():
                if output.finish_reason is None:
                    stopped.append(output.request_id)
                state.running.discard(output.request_id)
                del self._sequences[output.request_id]
                if not state.running:
                    state.metrics.finished_time = now
                    del self._requests[state.request_id]
            changed[state.request_id] = state
        return [s.output() for s in changed.values() if not (only_finished and s.running)], stopped

    def _record(self, state: _Request, output: CoreOutput, now: float) -> None:
        metrics = state.metrics
        state.preemptions[output.request_id] = output.num_preemptions
        state.num_cached_tokens = max(state.num_cached_tokens, output.num_cached_tokens)
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = output.scheduled_time
        if (output.token_ids or output.pooled is not None) and metrics.first_token_time is None:
            metrics.first_token_time = now
        state.pooled = output.pooled
        if output.prompt_logprobs and state.prompt_logprobs is not None and self._sequences[output.request_id][1] == 0:
            sequence = state.sequences[0]
            state.prompt_logprobs.extend(sequence.logprob_dict(entry) for entry in output.prompt_logprobs)

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int], str | None]:
        """Text if there is one, token ids, cache salt."""
        salt = None
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt", "pooling"}
            if unknown or not {"prompt", "prompt_token_ids"} & set(prompt):
                raise RequestError(
                    f"a prompt given as a dictionary has 'prompt' or 'prompt_token_ids', and may have 'cache_salt'; "
                    f"this one has {sorted(prompt)}"
                )
            salt = prompt.get("cache_salt")
            if (given := prompt.get("prompt_token_ids")) is not None:
                return prompt.get("prompt"), _token_ids(given), salt
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("there is no tokenizer (skip_tokenizer_init); give prompt_token_ids instead of text")
            return prompt, self.tokenizer.encode(prompt), salt
        if not isinstance(prompt, Sequence):
            raise RequestError(f"a prompt is text, token ids or a dictionary, not {type(prompt).__name__}")
        return None, _token_ids(prompt), salt

    def _check_prompt(self, ids: list[int], room: int) -> None:
        if not ids:
            raise RequestError("the prompt is empty; it needs at least one token")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.info.vocab_size:
            raise RequestError(
                f"token id {low if low < 0 else high} is out of the model's vocabulary of {self.info.vocab_size}"
            )
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and max_model_len is {self.info.max_model_len}, prompt and output "
                f"together; shorten the prompt or raise max_model_len"
            )

    def _check_params(self, params: SamplingParams) -> None:
        for name, ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids),
        ):
            for i in ids or ():
                if not 0 <= i < self.info.vocab_size:
                    raise RequestError(f"{name} has {i}, out of the model's vocabulary of {self.info.vocab_size}")
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise RequestError("stop and bad_words need a tokenizer, and there is none (skip_tokenizer_init)")

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Each bad word as token ids, at the start of a text and after a space."""
        if not params.bad_words:
            return []
        assert self.tokenizer is not None
        found: list[list[int]] = []
        for word in params.bad_words:
            for text in (word, " " + word.lstrip()):
                ids = self.tokenizer.encode(text, add_special_tokens=False)
                if ids and ids not in found:
                    found.append(ids)
        return found


def _snapshot(completion: CompletionOutput) -> CompletionOutput:
    """What a user may keep while the sequence goes on."""
    logprobs = completion.logprobs
    return replace(completion, token_ids=list(completion.token_ids), logprobs=logprobs and list(logprobs))


def _token_ids(given: Sequence[Any]) -> list[int]:
    ids = list(given)
    for i in ids if set(map(type, ids)) != {int} else ():
        if not isinstance(i, int) or isinstance(i, bool):
            raise RequestError(f"prompt_token_ids has {i!r}; token ids are whole numbers")
    return ids
