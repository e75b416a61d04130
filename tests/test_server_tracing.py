"""Traces as an OpenTelemetry collector gets them: one listens here, and a server with the small model sends."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from engine.errors import ConfigError
from engine.extensions.server import ServerArgs

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes spans over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in sent.resource_spans:
                    names = {a.key: a.value.string_value for a in resource.resource.attributes}
                    collector.services.add(names["service.name"])
                    collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    found = {}
    for a in span.attributes:
        kind = a.value.WhichOneof("value")
        value = getattr(a.value, kind)
        found[a.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def test_a_span_a_prompt(collector: Collector) -> None:
    code = "import sys; from engine.extensions.cli import main; sys.exit(main())"
    flags = ["--port", "0", "--platform", "cpu", "--max-model-len", "256", "--otlp-traces-endpoint", collector.url]
    command = [sys.executable, "-c", code, "serve", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(r"listening on (\S+)", line)))
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        end = time.monotonic() + 120
        while httpx.get(url + "/ready").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        body: dict[str, Any] = {"prompt": ["x = ", "def f("], "max_tokens": 5, "temperature": 0.5, "ignore_eos": True}
        assert httpx.post(url + "/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
        wrong = {"prompt": "x", "structured_outputs": {"regex": "("}}
        assert httpx.post(url + "/v1/completions", json=wrong, timeout=60).status_code == 400
        process.terminate()
        assert process.wait(60) == 0
        drain.join()
    assert collector.services == {"engine"}
    good = [s for s in collector.spans if s.trace_id.hex() == TRACE]
    (bad,) = [s for s in collector.spans if s.trace_id.hex() != TRACE]
    assert [s.parent_span_id.hex() for s in good] == [PARENT, PARENT]
    for span in good:
        told = attributes(span)
        assert (span.name, span.kind) == ("llm_request", 2)
        assert told["gen_ai.request.id"] == "cmpl-mine"
        assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "demo_model"
        assert (told["gen_ai.request.max_tokens"], told["gen_ai.request.n"]) == (5, 1)
        assert told["gen_ai.request.temperature"] == 0.5
        assert told["gen_ai.usage.output_tokens"] == told["gen_ai.usage.completion_tokens"] == 5
        assert told["gen_ai.usage.input_tokens"] == told["gen_ai.usage.prompt_tokens"] > 0
        assert told["gen_ai.response.finish_reasons"] == ["length"]
        latency = {n.rpartition(".")[2]: v for n, v in told.items() if n.startswith("gen_ai.latency.")}
        assert set(latency) == {
            *("e2e", "time_in_queue", "time_to_first_token"),
            *("time_in_model_prefill", "time_in_model_decode", "time_in_model_inference"),
        }
        first = latency["time_in_queue"] + latency["time_in_model_prefill"]
        assert latency["time_to_first_token"] == pytest.approx(first, abs=1e-6)
        assert latency["e2e"] == pytest.approx(first + latency["time_in_model_decode"], abs=1e-6)
        assert latency["e2e"] < (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 + 0.05
    assert (bad.status.code, "structured_outputs" in bad.status.message) == (2, True)


def test_nothing_is_imported_without_it() -> None:
    code = "import sys, engine.extensions.server.run; sys.exit(any('opentelemetry.sdk' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_extra_is_told() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None\n"
        "from engine.extensions.cli import main\n"
        "sys.exit(main(['serve', '--port', '0', '--otlp-traces-endpoint', 'http://127.0.0.1:9/v1/traces']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "engine[otel]" in done.stderr) == (2, True), done.stderr


def test_the_endpoint_is_a_url() -> None:
    with pytest.raises(ConfigError, match="must be a URL"):
        ServerArgs(otlp_traces_endpoint="localhost:4317")
