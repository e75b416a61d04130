"""The nouns that users meet: parameters in, outputs out, under the names that vLLM's users know. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import RequestError

LogitsProcessor = Callable[[Sequence[int], Any], Any]
"""``(generated token ids, logits float32 [V]) -> logits``; runs on the engine's thread, for offline use."""

FinishReason = Literal["stop", "length", "abort"]


@dataclass
class SamplingParams:
    """How one request's tokens are chosen.

    Args:
        n: how many completions to make of the prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the fewest tokens whose probabilities sum to at least this, in (0, 1].
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: keep tokens with at least this share of the likeliest token's probability, in [0, 1].
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens in prompt or output.
        presence_penalty: in [-2, 2]; subtracted once from logits of tokens in the output.
        frequency_penalty: in [-2, 2]; subtracted for each occurrence in the output.
        seed: makes the samples reproducible: they depend on the seed and the position only, never on the batch.
        stop: strings that end the output; the text is cut before them.
        stop_token_ids: token ids that end the output.
        include_stop_str_in_output: keep the stop string in the text.
        bad_words: strings that must not be produced.
        ignore_eos: go on after the end-of-sequence token.
        max_tokens: at most this many tokens; None goes on to the model's limit.
        min_tokens: at least this many before a stop token may be produced.
        logprobs: log probabilities of this many likeliest tokens, and of the sampled one, per output token; they are of
            the model's own distribution, before temperature and penalties. -1 for the whole vocabulary.
        prompt_logprobs: the same for each prompt token but the first.
        detokenize: make text, not only token ids.
        skip_special_tokens: leave special tokens out of the text.
        logit_bias: token id to a number that is added to its logit.
        allowed_token_ids: only these may be produced.
        logits_processors: functions that change the logits; offline only.
        structured_outputs: the form that the output must have, as `StructuredOutputsParams` describes it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    bad_words: list[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    logits_processors: list[LogitsProcessor] | None = None
    structured_outputs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model; raises `RequestError`."""
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(self.stop_token_ids or [])
        self.bad_words = list(self.bad_words or [])
        self.top_k = 0 if self.top_k == -1 else self.top_k

        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise RequestError(f"{name} must be {rule}, got {getattr(self, name)!r}")

        def number(name: str) -> bool:
            value = getattr(self, name)
            return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")

        def whole(name: str, low: int) -> bool:
            value = getattr(self, name)
            return isinstance(value, int) and not isinstance(value, bool) and value >= low

        need(whole("n", 1), "n", "a whole number of at least 1")
        need(number("temperature") and self.temperature >= 0, "temperature", "a number of at least 0 (0 is greedy)")
        need(number("top_p") and 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(whole("top_k", 0), "top_k", "a positive whole number, or 0 or -1 for all tokens")
        need(number("min_p") and 0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        need(number("repetition_penalty") and self.repetition_penalty > 0, "repetition_penalty", "a number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            need(number(name) and -2 <= getattr(self, name) <= 2, name, "in [-2, 2]")
        need(self.seed is None or whole("seed", 0), "seed", "a whole number of at least 0")
        need(self.max_tokens is None or whole("max_tokens", 1), "max_tokens", "a whole number of at least 1, or None")
        need(whole("min_tokens", 0), "min_tokens", "a whole number of at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            need(getattr(self, name) is None or whole(name, -1), name, "a whole number of at least 0, or -1 for all")
        need(all(isinstance(s, str) and s for s in self.stop), "stop", "non-empty strings")
        need(all(isinstance(s, str) and s for s in self.bad_words), "bad_words", "non-empty strings")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True; use stop_token_ids without it")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty, so no token could be produced")
        form, asked = self.structured_outputs, "structured_outputs"
        need(form is None or (isinstance(form, dict) and bool(form)), asked, "a StructuredOutputsParams")
        if self.temperature == 0 and self.n > 1:
            raise RequestError("n above 1 with temperature 0 would make the same completion n times; set a temperature")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True)
class Logprob:
    """One token: `logprob`, a natural logarithm; `rank`, 1 for the likeliest; `decoded_token`, its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the request's `n`.
        text: the text so far.
        token_ids: the tokens so far, the stop token included.
        cumulative_logprob: sum of the sampled tokens' log probabilities, when they were asked for.
        logprobs: per token, token id to `Logprob`, when they were asked for.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"``, or None while it runs.
        stop_reason: the stop string or stop token id that ended it; None for the end-of-sequence token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times of one request, in seconds of `time.monotonic`; None until they happen."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass
class RequestOutput:
    """What came of one prompt.

    Attributes:
        request_id: unique in the engine.
        prompt: the prompt's text, when it was text.
        prompt_token_ids: the prompt as the model saw it.
        prompt_logprobs: per prompt token, None for the first, when they were asked for.
        outputs: the `n` completions.
        finished: nothing more will come.
        metrics: when things happened.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        pooled: what became of the prompt in a model that does not generate, as its runner writes it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    pooled: bytes | None = None


@dataclass
class CoreRequest:
    """One sequence as the engine core takes it: token ids in, nothing left to resolve. Plain data, fit for a socket."""

    request_id: str  # unique in the core
    prompt_token_ids: list[int]  # at least one
    params: SamplingParams  # with `n` of 1, and `seed` and `max_tokens` filled in
    eos_token_ids: tuple[int, ...] = ()  # ids that end the output unless `ignore_eos`
    # token sequences that must not be produced (from `bad_words`)
    bad_token_ids: list[list[int]] = field(default_factory=list)
    priority: int = 0  # lower runs first under the priority policy
    cache_salt: str | None = None  # joins the prefix cache's hash, so that only requests of equal salt share blocks
    arrival: float = 0.0  # order of arrival; ties of priority are broken by it
    pooling: dict[str, Any] | None = None  # what a runner that pools makes of the prompt, in place of tokens


@dataclass
class TokenLogprobs:
    """Log probabilities at one position: the chosen token first, then the likeliest in order."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the chosen token, from 1


@dataclass
class CoreOutput:
    """What one step brought for one sequence."""

    request_id: str  # whose
    token_ids: list[int]  # the new tokens, possibly none
    finish_reason: FinishReason | None = None  # finish_reason, stop_reason: set when the sequence ended
    stop_reason: int | None = None
    logprobs: list[TokenLogprobs] | None = None  # one entry a new token, when they were asked for
    # entries for the prompt positions that this step computed, when they were asked for
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    num_preemptions: int = 0  # so far
    scheduled_time: float | None = None  # when it was first scheduled, `time.monotonic`
    pooled: bytes | None = None  # what the runner made in place of tokens; the sequence has ended
