"""What Prometheus scrapes, under vLLM's names and with their meanings.

The names are those that the Gateway API's inference extension (its endpoint picker reads waiting, running and the KV
cache's usage), autoscalers and dashboards know, so all of these work unchanged.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.extensions.serving.core_process import Load
from engine.info import EngineInfo
from engine.request import RequestOutput, SamplingParams

_TOKEN_TIMES = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_FIRST_TIMES = (*_TOKEN_TIMES[:-3], 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_REQUEST_TIMES = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 240, 480, 960)
_COUNTS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))
_LATEST = 64  # requests that the page sums up


class Metrics:
    """All metrics of one server.

    Args:
        model: the served name.
        load: how busy the core is, as numbers that only grow while the server lives.

    Attributes:
        latest: the requests that finished last.
        num_read, num_made: tokens of prompts, and generated.
    """

    def __init__(self, model: str, load: Callable[[], Load]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._model = model
        self._info = Gauge(
            "vllm:cache_config_info",
            "The KV cache",
            ("block_size", "num_gpu_blocks", "enable_prefix_caching", "model_name", "engine"),
            registry=self.registry,
        )
        self.latest: deque[Latest] = deque(maxlen=_LATEST)
        self.num_read = self.num_made = 0
        ProcessCollector(registry=self.registry)
        self.registry.register(_CoreLoad(model, load))
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that have begun")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens that were generated")
        self._finished = Counter(
            "vllm:request_success",
            "Requests that finished, by reason",
            ("finished_reason", "model_name", "engine"),
            registry=self.registry,
        )
        self._first_token = self._seconds("vllm:time_to_first_token_seconds", "Until the first token", _FIRST_TIMES)
        self._inter_token = self._seconds("vllm:inter_token_latency_seconds", "Between two tokens", _TOKEN_TIMES)
        self._per_token = self._seconds(
            "vllm:request_time_per_output_token_seconds", "A request's mean time a token after the first", _TOKEN_TIMES
        )
        self._whole = self._seconds("vllm:e2e_request_latency_seconds", "From arrival to the end", _REQUEST_TIMES)
        self._queue = self._seconds("vllm:request_queue_time_seconds", "From arrival to the first step", _REQUEST_TIMES)
        self._prefill = self._seconds("vllm:request_prefill_time_seconds", "First step to first token", _REQUEST_TIMES)
        self._decode = self._seconds("vllm:request_decode_time_seconds", "First token to last", _REQUEST_TIMES)
        self._prompt_size = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", _COUNTS)
        self._output_size = self._histogram("vllm:request_generation_tokens", "Output tokens of a request", _COUNTS)
        self._n = self._histogram("vllm:request_params_n", "The parameter n", (1, 2, 5, 10, 20))
        self._max_tokens = self._histogram("vllm:request_params_max_tokens", "The parameter max_tokens", _COUNTS)
        self._requests = Counter(
            "http_requests", "HTTP requests", ("handler", "method", "status"), registry=self.registry
        )
        self._request_seconds = Histogram(
            "http_request_duration_seconds",
            "Time of an HTTP request",
            ("handler",),
            registry=self.registry,
            buckets=_REQUEST_TIMES,
        )
        self.restarts = self._counter("engine:core_restarts", "Times that the engine's process was started again")

    def text(self) -> bytes:
        """Prometheus' exposition format."""
        return generate_latest(self.registry)

    def engine(self, info: EngineInfo, prefix_caching: bool) -> None:
        """Note what is fixed while the engine runs."""
        self._info.clear()
        self._info.labels(info.block_size, info.num_blocks, prefix_caching, self._model, "0").set(1)

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count a request of HTTP."""
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._request_seconds.labels(handler).observe(seconds)

    def read(self, num_tokens: int) -> None:
        """Count tokens of a prompt."""
        self.num_read += num_tokens
        self._prompt_tokens.inc(num_tokens)

    def made(self, num_tokens: int) -> None:
        """Count tokens that were generated."""
        self.num_made += num_tokens
        self._generation_tokens.inc(num_tokens)

    def follow(self, params: SamplingParams) -> Following:
        """Begin to watch a request of the engine."""
        if params.detokenize:  # all that generate here do
            self._n.observe(params.n)
            if params.max_tokens is not None:
                self._max_tokens.observe(params.max_tokens)
        return Following(self)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, ("model_name", "engine"), registry=self.registry).labels(self._model, "0")

    def _seconds(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        return self._histogram(name, f"{about}, in seconds", buckets)

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        labels = ("model_name", "engine")
        return Histogram(name, about, labels, registry=self.registry, buckets=buckets).labels(self._model, "0")


class Latest:
    """Times of a request that finished, in seconds, for the page."""

    def __init__(self, first_token: float, per_token: float | None, whole: float) -> None:
        self.first_token = first_token
        self.per_token = per_token
        self.whole = whole


class Following:
    """Watches one request's outputs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begin = time.monotonic()
        self._last: float | None = None
        self._first = 0.0
        self._num_tokens = 0

    def saw(self, output: RequestOutput) -> None:
        """Take in a cumulative output."""
        metrics, now = self._metrics, time.monotonic()
        num_tokens = sum(len(c.token_ids) for c in output.outputs)
        new, self._num_tokens = num_tokens - self._num_tokens, num_tokens
        if output.pooled is not None:  # the output counts as its first token, and has none
            self._first = (output.metrics and output.metrics.first_token_time) or now
            metrics.read(len(output.prompt_token_ids))
            metrics._first_token.observe(self._first - self._begin)
        if new:
            metrics.made(new)
            if self._last is None:
                # where only the end is seen, the engine's own clock tells when it began
                self._first = self._last = (output.metrics and output.metrics.first_token_time) or now
                metrics.read(len(output.prompt_token_ids))
                metrics._first_token.observe(self._first - self._begin)
                new -= len(output.outputs)
            if (steps := max(0, new) // len(output.outputs)) > 0:
                for _ in range(steps):
                    metrics._inter_token.observe((now - self._last) / steps)
            self._last = now
        if output.finished:
            self._finish(output, now)

    def ended(self, reason: str) -> None:
        """It ended without an outcome: ``"abort"`` or ``"error"``."""
        self._metrics._finished.labels(reason, self._metrics._model, "0").inc()

    def _finish(self, output: RequestOutput, now: float) -> None:
        metrics = self._metrics
        for completion in output.outputs:
            metrics._finished.labels(completion.finish_reason, metrics._model, "0").inc()
        metrics._prompt_size.observe(len(output.prompt_token_ids))
        metrics._output_size.observe(self._num_tokens)
        metrics._whole.observe(now - self._begin)
        longest = max(len(c.token_ids) for c in output.outputs)
        per_token = (now - self._first) / (longest - 1) if longest > 1 else None
        if per_token is not None:
            metrics._per_token.observe(per_token)
        if output.metrics and output.metrics.first_scheduled_time and output.metrics.first_token_time:
            scheduled, first = output.metrics.first_scheduled_time, output.metrics.first_token_time
            metrics._queue.observe(max(0.0, scheduled - output.metrics.arrival_time))
            metrics._prefill.observe(max(0.0, first - scheduled))
            metrics._decode.observe(max(0.0, now - first))
        metrics.latest.append(Latest(self._first - self._begin, per_token, now - self._begin))


class _CoreLoad(Collector):
    """What the core tells of itself, read when it is scraped."""

    def __init__(self, model: str, load: Callable[[], Load]) -> None:
        self._model = model
        self._load = load

    def collect(self) -> Iterator[Metric]:
        """The families with their values."""
        load = self._load()
        for name, about, value in (
            ("vllm:num_requests_running", "Sequences that run", load.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait", load.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1", load.kv_usage),
        ):
            gauge = GaugeMetricFamily(name, about, labels=("model_name", "engine"))
            gauge.add_metric((self._model, "0"), value)
            yield gauge
        for name, about, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", load.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", load.prefix_hits),
            ("vllm:num_preemptions", "Preemptions", load.num_preemptions),
            ("engine:steps", "Steps of the engine", load.num_steps),
        ):
            counter = CounterMetricFamily(name, about, labels=("model_name", "engine"))
            counter.add_metric((self._model, "0"), value)
            yield counter
