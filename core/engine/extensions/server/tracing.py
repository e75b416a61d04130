"""A span a prompt, sent to an OpenTelemetry collector; imported only where ``--otlp-traces-endpoint`` is given.

Attributes have the names of OpenTelemetry's conventions for generative AI, and beside them those of vLLM, in seconds.
A request that comes with W3C's ``traceparent`` header continues the trace that it names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.request import RequestMetrics, RequestOutput, SamplingParams
from engine.version import __version__

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.propagate import extract
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
except ImportError as error:
    raise ConfigError("otlp_traces_endpoint needs the extra: pip install 'engine[otel]'") from error


class Tracer:
    """Makes and sends the spans of one server.

    Args:
        endpoint: URL of the collector, as OTLP over HTTP has it: ``http://host:4318/v1/traces``.
        model: the served name.
        exporter: in place of one for the endpoint.
    """

    def __init__(self, endpoint: str, model: str, exporter: SpanExporter | None = None) -> None:
        resource = Resource.create()  # which reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "engine"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("engine", __version__)
        self._model = model

    def begin(self, request_id: str, params: SamplingParams, headers: Mapping[str, str]) -> Trace:
        """A prompt comes in."""
        span = self._tracer.start_span("llm_request", extract(headers), SpanKind.SERVER)
        asked: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.system": "engine",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.id": request_id,
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
        }
        span.set_attributes({name: value for name, value in asked.items() if value is not None})
        return Trace(span)

    def close(self) -> None:
        """Send what is left, for a few seconds at most; it blocks."""
        self._provider.force_flush(5000)
        self._provider.shutdown()


class Trace:
    """The span of one prompt while it runs."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def finish(self, output: RequestOutput) -> None:
        """It has its outcome."""
        read, made = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.outputs)
        found: dict[str, Any] = {
            "gen_ai.usage.input_tokens": read,
            "gen_ai.usage.output_tokens": made,
            "gen_ai.usage.prompt_tokens": read,
            "gen_ai.usage.completion_tokens": made,
            "gen_ai.usage.cached_tokens": output.num_cached_tokens,
            "gen_ai.usage.num_sequences": len(output.outputs),
            "gen_ai.response.finish_reasons": [c.finish_reason or "" for c in output.outputs],
        }
        if output.metrics is not None:
            found |= _latencies(output.metrics)
        self._span.set_attributes(found)
        self._span.end()

    def fail(self, reason: str) -> None:
        """It ended without one: the client left, its time was over, or the engine refused it or ended."""
        if self._span.is_recording():
            self._span.set_status(Status(StatusCode.ERROR, reason))
            self._span.end()


def _latencies(times: RequestMetrics) -> dict[str, float]:
    """Seconds, as far as they are known."""
    end = times.finished_time or time.monotonic()
    begin, scheduled, first = times.arrival_time, times.first_scheduled_time, times.first_token_time
    spans = {
        "e2e": (begin, end),
        "time_in_queue": (begin, scheduled),
        "time_to_first_token": (begin, first),
        "time_in_model_prefill": (scheduled, first),
        "time_in_model_decode": (first, end),
        "time_in_model_inference": (scheduled, end),
    }
    return {
        f"gen_ai.latency.{name}": max(0.0, till - since)
        for name, (since, till) in spans.items()
        if since is not None and till is not None
    }
