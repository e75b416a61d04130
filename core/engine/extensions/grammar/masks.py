"""Grammars while an engine runs: compiled on threads of their own, followed token by token, applied on the device.

    request -> prepare: compile, once a form    start -> State -> accept(token) ...
                                                           `-> plan: a bit a token [F, V / 32] -> the logits

F is the rows of a step that have a form, V the vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import DEMO_MODEL
from engine.errors import EngineError, RequestError
from engine.extensions.grammar.forms import grammar, wrong
from engine.request import CoreRequest
from engine.staging import Staging
from engine.text import load_tokenizer

log = logging.getLogger(__name__)

COMPILE_SECONDS = 20.0
"""A form that takes longer to compile is refused."""

KEPT = 256
"""Compiled forms that are kept, the latest ones."""

_WORKERS = 2


class State:
    """Where in its grammar a sequence is.

    Args:
        matcher: of its own, at the beginning.
        request: whose sequence it is.
        output: what it has produced so far.
    """

    def __init__(self, matcher: Any, request: CoreRequest, output: list[int]) -> None:
        self.matcher = matcher
        self.stops = sorted(set(request.params.stop_token_ids or ()) - set(request.eos_token_ids))
        self.request_id = request.request_id
        self._over = False
        for token_id in output:
            self.accept(token_id)

    @property
    def ended(self) -> bool:
        """Whether the output is whole, and only the end can follow."""
        return self._over or bool(self.matcher.is_stopped())

    def accept(self, token_id: int) -> bool:
        """The sequence produced a token; false where it cannot go on, which the log tells the reason of."""
        if self._over or (token_id in self.stops and self.matcher.is_accepting()):
            self._over = True
            return True
        whole = self.matcher.is_accepting() or not self.matcher.is_stopped()
        if whole and self.matcher.consume_token(token_id):
            return True
        reason = str(self.matcher.get_error()).splitlines() or ["no token is allowed"]
        log.warning("%s: its structured output cannot go on: %s", self.request_id, reason[0])
        return False

    def allow(self, words: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Set the bits of a row that a stop token ends: `stops` where the output is whole."""
        if self._over:
            words[:] = -1
        elif self.stops and self.matcher.is_accepting():
            bits = words.view(np.uint8)
            for token_id in self.stops:
                bits[token_id >> 3] |= 1 << (token_id & 7)


class Grammars:
    """Of one engine; `engine.hooks.engine_grammars` describes the methods. Only `plan` is bound to one thread.

    Args:
        options: of the engine, by name.
        vocab_size: V, the width of the logits.
    """

    def __init__(self, options: Mapping[str, Any], vocab_size: int) -> None:
        self._options, self._vocab_size = options, vocab_size
        self._num_words = -(-vocab_size // 32)
        self._tokenizers: dict[tuple[int, ...], Any] = {}
        self._ready: OrderedDict[str, Any] = OrderedDict()
        self._coming: dict[str, Future[None]] = {}
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._parallel: Any = None

    def prepare(self, request: CoreRequest) -> Future[None] | None:
        """Compile the request's form unless that was done; the future's exception is a `RequestError`."""
        key = _key(request)
        with self._lock:
            if key in self._ready:
                self._ready.move_to_end(key)
                return None
            if key not in self._coming:
                self._coming[key] = Future()
                self._pool = self._pool or ThreadPoolExecutor(_WORKERS, "grammar")
                self._pool.submit(self._make, key, request, self._coming[key])
            return self._coming[key]

    def start(self, request: CoreRequest, output: list[int]) -> State:
        """The state of a sequence that has produced `output`."""
        key = _key(request)
        while (found := self._ready.get(key)) is None:  # another process compiled it, or it was dropped since
            if (coming := self.prepare(request)) is not None:
                coming.result()
        return State(found.deep_copy(), request, output)

    def plan(self, states: dict[int, State], staging: Staging) -> Callable[[Tensor], None]:
        """Stage what each state allows; see `engine.hooks.engine_grammars`."""
        words = np.zeros((len(states), self._num_words), np.int32)
        size = words.strides[0]
        if len(states) == 1:
            (state,) = states.values()
            state.matcher.unsafe_compute_mask_ptr(words.ctypes.data, size)
        else:
            if self._parallel is None:
                from llguidance import LLExecutor

                self._parallel = LLExecutor(max(1, min(8, (os.cpu_count() or 1) // 2)))
            matchers = [(state.matcher, i) for i, state in enumerate(states.values())]
            self._parallel.unsafe_compute_mask_ptr(matchers, words.ctypes.data, size, len(states))
        for row, state in zip(words, states.values(), strict=True):
            state.allow(row)
        rows, bits = staging.add(np.array(list(states), np.int64)), staging.add(words)
        return lambda logits: forbid(logits, rows.device, bits.device)

    def _make(self, key: str, request: CoreRequest, coming: Future[None]) -> None:
        """On a worker: compile and keep a form, or tell why not. What comes too late is kept for the next request."""
        error: Exception | None = None
        try:
            tokenizer = self._tokenizer(request)
            timer = threading.Timer(COMPILE_SECONDS, _settle, [coming, wrong(_TOO_LONG)])
            timer.daemon = True
            timer.start()
            try:
                made = _compile(tokenizer, request.params.structured_outputs or {})
            finally:
                timer.cancel()
        except EngineError as caught:
            error = caught if isinstance(caught, RequestError) else wrong(str(caught))
        except Exception as caught:  # the library's own, of any class
            error = wrong(f"{type(caught).__name__}: {caught}")
        with self._lock:
            if error is None:
                self._ready[key] = made
                while len(self._ready) > KEPT:
                    self._ready.popitem(last=False)
            del self._coming[key]
        _settle(coming, error)

    def _tokenizer(self, request: CoreRequest) -> Any:
        """The vocabulary as the library wants it, with the tokens that end an output."""
        ends = tuple(request.eos_token_ids or request.params.stop_token_ids or ())
        if not ends:
            raise wrong("the model has no end-of-sequence token; name one that ends the output in stop_token_ids")
        with self._loading:
            if ends not in self._tokenizers:
                self._tokenizers[ends] = self._load(ends)
            return self._tokenizers[ends]

    def _load(self, ends: tuple[int, ...]) -> Any:
        from llguidance import LLTokenizer

        options = self._options
        if options["skip_tokenizer_init"]:
            raise wrong("there is no tokenizer (skip_tokenizer_init)")
        folder = options["tokenizer"] or options["model"] or str(DEMO_MODEL)
        hf = load_tokenizer(
            folder, options["tokenizer_mode"], trust=options["trust_remote_code"], vocab_size=self._vocab_size
        ).hf
        if not hf.is_fast:
            raise wrong("the model's tokenizer is written in Python; it needs one with a tokenizer.json")
        return LLTokenizer(hf.backend_tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=list(ends))


_TOO_LONG = f"the form took more than {COMPILE_SECONDS:g} s to compile; make it simpler"


def _key(request: CoreRequest) -> str:
    """Equal for requests that one compiled form serves."""
    ends = request.eos_token_ids or request.params.stop_token_ids
    return json.dumps([request.params.structured_outputs, ends], default=repr)


def _settle(future: Future[None], error: Exception | None) -> None:
    """End it, unless it has ended."""
    with contextlib.suppress(InvalidStateError):  # of two the other was first
        future.set_exception(error) if error is not None else future.set_result(None)


def _compile(tokenizer: Any, wanted: Mapping[str, Any]) -> Any:
    """A matcher at its beginning; raises `RequestError` with the library's reason."""
    from llguidance import LLMatcher

    def literal(text: str) -> list[str | int]:
        ids: list[int] = tokenizer.tokenize_str(text, parse_special=True)
        if not any(map(tokenizer.is_special_token, ids)):
            return [text] if text else []
        parts = itertools.groupby(ids, tokenizer.is_special_token)
        pieces = [[*part] if special else [tokenizer.decode_str([*part])] for special, part in parts]
        return [piece for part in pieces for piece in part]

    matcher = LLMatcher(tokenizer, grammar(wanted, literal), log_level=0)
    if matcher.is_error():
        raise wrong(" ".join(str(matcher.get_error()).split())[:400])
    matcher.compute_bitmask()
    if matcher.is_stopped() and not matcher.is_accepting():
        raise wrong("no text has this form")
    return matcher


def forbid(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """Ban in logits fp32 [S, V] where a row's bit is 0; rows int64 [F], words int32 [F, V / 32], low bits first."""
    eights = _banned_by_byte(words.device).index_select(0, words.view(torch.uint8).flatten().int())
    banned = eights.view(torch.uint8).view(torch.bool).view(len(words), -1)[:, : logits.shape[1]]
    if len(rows) == len(logits):
        logits.masked_fill_(banned, -torch.inf)
    else:
        logits[rows] = logits[rows].masked_fill(banned, -torch.inf)


@functools.cache
def _banned_by_byte(device: torch.device) -> Tensor:
    """Of each byte of bits eight bytes, 1 where a bit is 0, as one number: int64 [256]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy((1 - bits).view(np.int64).ravel()).to(device)
