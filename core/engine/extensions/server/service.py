"""The engine as the routes see it: started in the background, watched, bounded, and brought back when it dies.

starting -> serving -> draining
    ^          |
    +-- dead <-+
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import EngineError, RequestError
from engine.extensions.server.args import ServerArgs
from engine.extensions.server.errors import APIError, unavailable
from engine.extensions.server.metrics import Metrics
from engine.extensions.serving import AsyncLLM
from engine.extensions.serving.core_process import Load
from engine.frontend import Prompt
from engine.info import EngineInfo
from engine.request import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from engine.extensions.server.tracing import Tracer

log = logging.getLogger(__name__)
T = TypeVar("T")

_INLINE = 20_000  # characters that are worked on at once; more go to a thread, so that no stream waits for them


class State(Enum):
    """Of the server."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True)
class Job:
    """One prompt of a request, with how to complete it.

    Attributes:
        prompt, params: for the engine.
        constrained_by: the request's field that asks for the answer's form, which errors name.
    """

    prompt: Prompt
    params: SamplingParams
    constrained_by: str = "structured_outputs"


@dataclass(frozen=True)
class Call:
    """What all prompts of a request share.

    Attributes:
        id: of the request, for logs and clients; need not be unique.
        deadline: seconds that it may take.
        priority: lower runs first.
        cache_salt: only requests of equal salt share cached blocks.
        traced: headers that tell of what trace the request is a part.
    """

    id: str
    deadline: float | None = None
    priority: int = 0
    cache_salt: str | None = None
    traced: Mapping[str, str] = field(default_factory=dict)


class Service:
    """One model behind a bounded queue.

    Args:
        args: the server's options.
        make: makes an engine that is not started; called again for each restart.
        fatal: called when the engine has ended and is not restarted.
    """

    def __init__(self, args: ServerArgs, make: Callable[[], AsyncLLM], fatal: Callable[[EngineError], None]) -> None:
        self.args = args
        self.state = State.STARTING
        self.created = int(time.time())
        self._make = make
        self._fatal = fatal
        self._llm = make()
        self._past = Load()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ids = 0
        self._life: asyncio.Task[None] | None = None
        folder = self._llm.args.folder
        self.names = list(args.served_model_name) or [folder.name or str(folder)]
        self.metrics = Metrics(self.names[0], self.load)
        self.tracer: Tracer | None = None
        if args.otlp_traces_endpoint is not None:
            from engine.extensions.server.tracing import Tracer

            self.tracer = Tracer(args.otlp_traces_endpoint, self.names[0])

    def start(self) -> None:
        """Begin to load the model; returns at once."""
        self._life = asyncio.create_task(self._live())

    async def close(self) -> None:
        """End the engine; requests that run end with an error."""
        self.state = State.DRAINING
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        await self._llm.shutdown()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)

    async def drain(self) -> None:
        """Take no more requests, and wait until those that run have finished or the time is over."""
        self.state = State.DRAINING
        log.info("draining: %d sequences run, for at most %.0f s", self._in_flight, self.args.drain_timeout)
        try:
            await asyncio.wait_for(self._idle.wait(), self.args.drain_timeout)
        except TimeoutError:
            log.warning("%d sequences did not finish in time and are aborted", self._in_flight)

    @property
    def llm(self) -> AsyncLLM:
        """The engine that serves; raises 503 while there is none."""
        if self.state is State.SERVING and not self._llm.errored:
            return self._llm
        reason = {
            State.STARTING: "the model is being loaded; try again soon",
            State.DRAINING: "the server is shutting down; ask another",
        }
        raise unavailable(reason.get(self.state, "the engine's process has ended"), retry_after=5)

    @property
    def info(self) -> EngineInfo:
        """Of the engine; only once it has started."""
        return self._llm.info

    @property
    def in_flight(self) -> int:
        """Sequences that are in the server."""
        return self._in_flight

    def load(self) -> Load:
        """How busy the core is; its counters go on over restarts."""
        now, past = self._llm.load, self._past
        alive = not self._llm.errored
        return Load(
            num_running=now.num_running * alive,
            num_waiting=now.num_waiting * alive,
            kv_usage=now.kv_usage * alive,
            prefix_queries=past.prefix_queries + now.prefix_queries,
            prefix_hits=past.prefix_hits + now.prefix_hits,
            num_preemptions=past.num_preemptions + now.num_preemptions,
            num_steps=past.num_steps + now.num_steps,
        )

    def check_model(self, name: str | None) -> None:
        """Raise 404 for a model that is not here; none at all is the one that is."""
        if name and name not in self.names:
            raise APIError(
                404, f"there is no model {name!r}; this server has {', '.join(self.names)}", "model", "model_not_found"
            )

    def check_room(self, num_sequences: int) -> None:
        """Raise 429 where so many more sequences would make the queue too long, and 400 where they always would."""
        places = self.llm.info.max_num_seqs + self.args.max_waiting
        if num_sequences > places:
            raise APIError(
                400, f"the request makes {num_sequences} sequences, and the server takes {places} at once; split it"
            )
        if self._in_flight + num_sequences > places:
            raise APIError(
                429,
                f"{self._in_flight} sequences run or wait, and the server takes {places}; try again later",
                code="overloaded",
                headers={"Retry-After": str(self._retry_after())},
            )

    async def offload(self, size: int, work: Callable[[], T]) -> T:
        """Run host work on `size` characters: here when it is quick, in a thread when others would wait for it."""
        return work() if size < _INLINE else await asyncio.to_thread(work)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        tokenizer = self.llm.get_tokenizer()
        return await self.offload(len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def sampling_params(self, given: Mapping[str, Any]) -> SamplingParams:
        """Parameters of a request: what it gives, then what the operator set, then what the model recommends."""
        limit = self.args.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            wanted = given.get(name)
            if wanted is not None and 0 <= limit < (float("inf") if wanted == -1 else wanted):
                raise APIError(400, f"{name} must be at most {limit} (--max-logprobs), got {wanted}", name)
        recommended = self.llm.info.default_sampling_params if self.args.generation_config == "auto" else {}
        return SamplingParams(**{"max_tokens": None, **recommended, **self.args.override_generation_config, **given})

    async def stream(
        self, call: Call, jobs: Sequence[Job], *, final_only: bool = False
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Complete prompts together: each job's index with its cumulative output, as it grows, or at its end only.

        Raises:
            APIError: no room, no engine, or the deadline passed.
            RequestError: a prompt or parameter is wrong.
        """
        limits = [t for t in (call.deadline, self.args.request_timeout) if t is not None]
        seconds = min(limits, default=None)
        end = None if seconds is None else asyncio.get_running_loop().time() + seconds
        with self._places(sum(job.params.n for job in jobs)):
            followed = [self._follow(i, call, job, final_only) for i, job in enumerate(jobs)]
            async with aclosing(followed[0] if len(followed) == 1 else _merge(followed)) as outputs:
                while True:
                    try:
                        async with asyncio.timeout_at(end):
                            item = await anext(outputs)
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        raise APIError(
                            408,
                            f"the request did not finish within its {seconds:g} s",
                            code="timeout",
                            headers={"x-should-retry": "false"},
                        ) from None
                    yield item

    async def complete(self, call: Call, jobs: Sequence[Job]) -> list[RequestOutput]:
        """The final outputs of all jobs, in their order; raises as `stream` does."""
        latest: dict[int, RequestOutput] = {}
        async with aclosing(self.stream(call, jobs, final_only=True)) as outputs:
            async for i, output in outputs:
                latest[i] = output
        return [latest[i] for i in range(len(jobs))]

    async def _follow(
        self, index: int, call: Call, job: Job, final_only: bool
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        self._ids += 1
        following = self.metrics.follow(job.params)
        trace = self.tracer.begin(call.id, job.params, call.traced) if self.tracer is not None else None
        generating = self.llm.generate(
            job.prompt,
            job.params,
            f"{call.id}#{self._ids}",
            priority=call.priority,
            cache_salt=call.cache_salt,
            final_only=final_only,
        )
        finished = False
        try:
            async with aclosing(generating) as outputs:
                async for output in outputs:
                    following.saw(output)
                    if finished := output.finished:
                        self._tell(output)
                        if trace is not None:
                            trace.finish(output)
                    yield index, output
        except EngineError as error:
            following.ended("error")
            if trace is not None:
                trace.fail(str(error))
            raise _of_form(error, job) from None
        except BaseException:
            if not finished:
                following.ended("abort")
                if trace is not None:
                    trace.fail("aborted")
            raise

    def _tell(self, output: RequestOutput) -> None:
        """Log what was asked and answered, where the operator wants that."""
        if self.args.log_prompts:
            texts = [c.text for c in output.outputs]
            log.info("completed", extra={"facts": {"prompt": output.prompt, "texts": texts}})

    @contextmanager
    def _places(self, num_sequences: int) -> Iterator[None]:
        self.check_room(num_sequences)
        self._in_flight += num_sequences
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= num_sequences
            if not self._in_flight:
                self._idle.set()

    def _retry_after(self) -> int:
        """Seconds until a place should be free: what a request took lately."""
        latest = [times.whole for times in self.metrics.latest]
        return max(1, min(60, round(sum(latest) / len(latest)))) if latest else 1

    async def _live(self) -> None:
        """Start the engine, wait for its end, and start another one where that is wanted."""
        while True:
            try:
                await self._llm.start()
            except EngineError as error:
                self._give_up(error)
                return
            info = self._llm.info
            self.metrics.engine(info, self._llm.args.enable_prefix_caching)
            self.state = State.SERVING
            log.info("%s (%s) serves on %s", self.names[0], info.architecture, info.platform)
            end = await self._llm.ended()
            self.state = State.DEAD
            if self.args.on_engine_death == "exit":
                self._give_up(end)
                return
            log.error("%s: starting it again", end)
            self.metrics.restarts.inc()
            await self._llm.shutdown()
            self._past, self._llm = self.load(), self._make()
            self.state = State.STARTING

    def _give_up(self, error: EngineError) -> None:
        self.state = State.DEAD
        self._fatal(error)


def _of_form(error: EngineError, job: Job) -> Exception:
    """The error, under the name that the client has for the answer's form where it is about that."""
    head, colon, rest = str(error).partition(":")
    if not isinstance(error, RequestError) or head != "structured_outputs" or not colon:
        return error
    return APIError(400, f"{job.constrained_by}:{rest}", job.constrained_by, "invalid_form")


async def _merge(
    streams: Sequence[AsyncGenerator[tuple[int, RequestOutput], None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """All items of several streams as they come; an exception of one ends all."""
    queue: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None] = asyncio.Queue(maxsize=1)

    async def pump(stream: AsyncGenerator[tuple[int, RequestOutput], None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put(item)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
