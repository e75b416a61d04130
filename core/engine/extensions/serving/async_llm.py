"""The asynchronous API: many requests at once, the core in a process of its own. The server builds on it.

from engine.extensions.serving import AsyncLLM

async with AsyncLLM("path/to/model") as llm:
    async for output in llm.generate("def fibonacci(n):", SamplingParams(), request_id="1"):
        print(output.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator
from dataclasses import fields
from types import TracebackType
from typing import Any

import msgspec

from engine import errors
from engine.config import EngineArgs
from engine.errors import EngineDeadError, EngineError, RequestError
from engine.extensions.serving import core_process as wire
from engine.extensions.serving import tokenizer as tokenizers
from engine.frontend import Frontend, Prompt
from engine.info import EngineInfo
from engine.request import RequestOutput, SamplingParams
from engine.text import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


class _Mailbox:
    """The latest output of one request. Outputs are cumulative, so a slow reader skips some and misses nothing."""

    def __init__(self, final_only: bool) -> None:
        self.final_only = final_only
        self._item: RequestOutput | BaseException | None = None
        self._there = asyncio.Event()

    def put(self, item: RequestOutput | BaseException) -> None:
        self._item = item
        self._there.set()

    async def get(self) -> RequestOutput:
        await self._there.wait()
        self._there.clear()
        item, self._item = self._item, None
        if isinstance(item, BaseException):
            raise item
        assert item is not None
        return item


class AsyncLLM:
    """A model that serves many requests concurrently. All methods run on one event loop.

    Args:
        model: as for `LLM`.
        options: any option of `EngineArgs`, by name.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.args = EngineArgs.of(model=model, **options)
        self.info: EngineInfo
        self._frontend: Frontend | None = None
        self._mail: dict[str, _Mailbox] = {}
        self._ids = itertools.count()
        self._load = wire.Load()
        self._dead: EngineError | None = None
        self._end = asyncio.Event()
        self._closing = False
        self._starting: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, args: EngineArgs) -> AsyncLLM:
        """Of options that were checked."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(args)})

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    async def start(self) -> None:
        """Start the core and wait until the model is loaded; later calls return at once.

        Raises:
            EngineError: whatever the core raised while loading.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        self._child, sock = wire.spawn()
        self._reader, self._writer = await asyncio.open_connection(sock=sock)
        self._send(wire.Start(self.args))
        try:
            message = await self._receive()
        except EOFError:
            raise self._died() from None
        if isinstance(message, wire.Failed):
            await self.shutdown()
            raise _revive(message)
        assert isinstance(message, wire.Ready)
        self.info = msgspec.convert(message.info, EngineInfo)
        tokenizer = tokenizers.unpack(message.tokenizer) if message.tokenizer is not None else None
        if tokenizer is None and not self.args.skip_tokenizer_init:  # written in Python, so it cannot be sent
            tokenizer = await asyncio.to_thread(
                load_tokenizer,
                self.args.tokenizer or self.info.model,
                self.args.tokenizer_mode,
                trust=self.args.trust_remote_code,
                vocab_size=self.info.vocab_size,
            )
        self._frontend = Frontend(self.info, tokenizer, self.args.seed)
        self._reading = asyncio.create_task(self._read())

    @property
    def errored(self) -> bool:
        """Whether the core has ended; `generate` then raises `EngineDeadError`."""
        return self._dead is not None

    @property
    def load(self) -> wire.Load:
        """How busy the core was when it last told."""
        return self._load

    @property
    def process_id(self) -> int:
        """Of the core."""
        return self._child.pid

    async def ended(self) -> EngineError:
        """Wait until the core has ended, and tell why."""
        await self._end.wait()
        assert self._dead is not None
        return self._dead

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return self._front().default_params()

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer, without what only Transformers' own has; raises `RequestError` with `skip_tokenizer_init`."""
        if (tokenizer := self._front().tokenizer) is None:
            raise RequestError("there is no tokenizer (skip_tokenizer_init)")
        return tokenizer

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        final_only: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt, yielding its cumulative output as it grows. Leaving the loop aborts the request.

        With `final_only` nothing but the finished output comes, which spares the caller to wake up at each step.

        Raises:
            RequestError: the prompt or a parameter is wrong.
            EngineDeadError: the core has ended.
        """
        await self.start()
        if self._dead is not None:
            raise self._dead
        params = self._front().default_params() if sampling_params is None else sampling_params
        if params.logits_processors:
            raise RequestError("logits_processors are Python functions, which stay in their process; use LLM for them")
        if request_id is None:
            request_id = f"async-{next(self._ids)}"
        requests = self._front().admit(request_id, prompt, params, priority=priority, cache_salt=cache_salt)
        self._mail[request_id] = mailbox = _Mailbox(final_only)
        try:
            self._send(wire.Add(requests))
            while True:
                output = await mailbox.get()
                yield output
                if output.finished:
                    return
        finally:
            self._mail.pop(request_id, None)
            self.abort(request_id)

    def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored, since it may just have finished."""
        if running := self._front().forget(request_id):
            self._send(wire.Abort(running))
            if mailbox := self._mail.get(request_id):
                mailbox.put(RequestError(f"request {request_id!r} was aborted"))

    def reset_prefix_cache(self) -> None:
        """Forget cached prompts."""
        self._send(wire.ResetPrefixCache())

    async def shutdown(self) -> None:
        """End the core; running requests end with `EngineDeadError`."""
        self._closing = True
        if self._starting is None or not hasattr(self, "_writer"):
            return
        self._fail(EngineDeadError("the engine was shut down"))
        self._writer.close()
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        await asyncio.to_thread(self._child.wait)

    def _front(self) -> Frontend:
        if self._frontend is None:
            raise EngineDeadError("the engine has not started; await start() first")
        return self._frontend

    def _send(self, message: wire.ToCore) -> None:
        if not self._writer.is_closing():
            self._writer.write(wire.pack(message))

    async def _receive(self) -> wire.FromCore:
        """The next message; EOFError when the core is gone."""
        (size,) = wire.LENGTH.unpack(await self._reader.readexactly(wire.LENGTH.size))
        message: wire.FromCore = msgspec.msgpack.decode(await self._reader.readexactly(size), type=wire.FromCore)
        return message

    async def _read(self) -> None:
        """Hand messages out until the core ends."""
        try:
            while True:
                message = await self._receive()
                if isinstance(message, wire.Outputs):
                    self._load = message.load
                    changed, stopped = self._front().process(message.outputs)
                    if stopped:
                        self._send(wire.Abort(stopped))
                    for output in changed:
                        mailbox = self._mail.get(output.request_id)
                        if mailbox is not None and (output.finished or not mailbox.final_only):
                            mailbox.put(output)
                elif isinstance(message, wire.Refused):
                    self._refuse(message)
                elif isinstance(message, wire.Failed):
                    log.error("the engine core failed:\n%s", message.traceback)
                    self._fail(_revive(message, dead=True))
        except (EOFError, OSError):
            if not self._closing:
                self._fail(self._died())
        except Exception as error:  # a fault of ours must not leave callers waiting for ever
            log.exception("the engine's outputs cannot be read")
            self._fail(EngineDeadError(f"the engine's outputs cannot be read: {type(error).__name__}: {error}"))

    def _refuse(self, message: wire.Refused) -> None:
        request_id = self._front().owner(message.request_id)
        if request_id is None:
            return
        self._send(wire.Abort(self._front().forget(request_id)))
        if mailbox := self._mail.get(request_id):
            mailbox.put(RequestError(message.message))

    def _fail(self, error: EngineError) -> None:
        self._dead = self._dead or error
        self._end.set()
        for mailbox in self._mail.values():
            mailbox.put(self._dead)

    def _died(self) -> EngineDeadError:
        try:
            code = self._child.wait(timeout=5)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        except Exception:
            how = "closed its connection"
        return EngineDeadError(f"the engine's process {how}; running requests are lost. Start a new engine")


def _revive(message: wire.Failed, dead: bool = False) -> EngineError:
    """The core's exception here: of its own class where that is one of ours."""
    kind = getattr(errors, message.kind, None)
    if dead or not (isinstance(kind, type) and issubclass(kind, EngineError)) or kind is errors.UnsupportedCapability:
        return EngineDeadError(message.message)
    return kind(message.message)
