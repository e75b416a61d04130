"""The server before a scripted core: what clients see of chats, tools, overload and failures, in milliseconds.

The core speaks the real wire protocol on a thread, so everything but the model is what runs in production. A prompt's
last user message chooses what is said: ``SCRIPTS`` by name; the text ``slow`` never ends.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import queue
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import uvicorn
from tokenizers import Tokenizer

from engine.config import DEMO_MODEL
from engine.errors import ConfigError
from engine.extensions.cli import main as command_line
from engine.extensions.cli import serve
from engine.extensions.server import ServerArgs, run
from engine.extensions.server.app import build
from engine.extensions.server.service import Service
from engine.extensions.serving import AsyncLLM
from engine.extensions.serving import core_process as wire
from engine.extensions.serving.tokenizer import TokenizerData, unpack
from engine.request import CoreOutput, CoreRequest, FinishReason, TokenLogprobs

PATIENCE = 60.0
"""Seconds that anything may take on a machine where others run; nothing waits so long that goes well."""

TEMPLATE = (
    "{% for t in tools or [] %}[tool {{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.arguments.city }}</tool_call>{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
SCRIPTS = {
    "hello": "Hello there!",
    "think": "<think>\nhm\n</think>\n\nIt is 4.",
    "one": f"Let me see.\n{CALL}",
    "two": f"<think>which?</think>{CALL}\n{CALL.replace('Paris', 'Rome')}",
    "What": CALL,  # the weather of the documentation's example
    "unicode": "naïve 😀 done",
}
TOKENIZER = TokenizerData((DEMO_MODEL / "tokenizer.json").read_text(), TEMPLATE + "{# <tool_call> </think> #}", {})
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
INFO: dict[str, Any] = {
    "model": str(DEMO_MODEL),
    "architecture": "Scripted",
    "platform": "none",
    "device": "none",
    "dtype": "float32",
    "vocab_size": 4096,
    "max_model_len": 512,
    "eos_token_ids": (0,),
    "default_sampling_params": {},
    "num_blocks": 64,
    "block_size": 16,
    "kv_bytes": 1,
    "min_blocks": 33,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "weight_bytes": 1,
    "load_seconds": 0.0,
}


class Core:
    """Says what the scripts say, a token every `pause` seconds."""

    pid = 0

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.running: dict[str, tuple[list[int], bool]] = {}
        self.seen: list[CoreRequest] = []
        self.pause = 0.0
        self.end = -9
        self._tokenizer = unpack(TOKENIZER)
        self._inbox: queue.SimpleQueue[wire.ToCore | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._run, daemon=True).start()

    def kill(self) -> None:
        self._theirs.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout: float | None = None) -> int:
        return self.end

    def _read(self) -> None:
        with self._theirs, self._theirs.makefile("rb") as file:
            while len(head := file.read(4)) == 4:
                body = file.read(wire.LENGTH.unpack(head)[0])
                self._inbox.put(msgspec.msgpack.decode(body, type=wire.ToCore))
        self._inbox.put(None)

    def _send(self, message: wire.FromCore) -> None:
        try:
            self._theirs.sendall(wire.pack(message))
        except OSError:
            self._inbox.put(None)

    def _run(self) -> None:
        while True:
            try:
                message = self._inbox.get(timeout=None if not self.running else self.pause)
            except queue.Empty:
                self._step()
                continue
            match message:
                case None:
                    return
                case wire.Start():
                    self._send(wire.Ready(INFO, TOKENIZER))
                case wire.Add(requests):
                    for request in requests:
                        self._add(request)
                case wire.Abort(ids):
                    for i in ids:
                        self.running.pop(i, None)
                    self._send(wire.Outputs([], self._load()))

    def _add(self, request: CoreRequest) -> None:
        self.seen.append(request)
        prompt = self._tokenizer.decode(request.prompt_token_ids)
        asked = re.findall(r"<user>(\w+)", prompt) or re.findall(r"\w+", prompt)
        if asked and asked[-1] == "die":
            self.kill()
        if asked and asked[-1] == "slow":
            self.running[request.request_id] = ([302] * (request.params.max_tokens or 0), False)
            return
        said = SCRIPTS.get(asked[-1] if asked else "", "ok")
        if prompt.endswith('"arguments": '):
            said = '{"city": "Oslo"}}\n</tool_call> and more'
        ids = self._tokenizer.encode(said)[: request.params.max_tokens]
        self.running[request.request_id] = (ids, True)

    def _step(self) -> None:
        outputs = []
        for i, (ids, stops) in list(self.running.items()):
            token, rest = ids[0], ids[1:]
            if rest:
                self.running[i] = (rest, stops)
            else:
                del self.running[i]
            # the last token comes with that of the end of the sequence
            tokens = [token] if rest or not stops else [token, 0]
            reason: FinishReason | None = None if rest else "stop" if stops else "length"
            logprobs = [TokenLogprobs([t, 5], [-0.5, -2.0], 1) for t in tokens]
            outputs.append(CoreOutput(i, tokens, reason, logprobs=logprobs))
        self._send(wire.Outputs(outputs, self._load()))

    def _load(self) -> wire.Load:
        return wire.Load(num_running=len(self.running), kv_usage=len(self.running) / 64)


class Running:
    """A server on a port of its own."""

    def __init__(self, url: str, cores: list[Core], service: Service, server: uvicorn.Server) -> None:
        self.url = url
        self.cores = cores
        self.service = service
        self.server = server
        self.fatal: list[Exception] = []
        self.loop: asyncio.AbstractEventLoop
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=PATIENCE)

    def post(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=PATIENCE, **kwargs)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE)


Start = Callable[..., Running]


@contextmanager
def servers() -> Iterator[Start]:
    """Starts servers with options of `ServerArgs`, and of the engine as `engine`, and ends them all."""
    stops: list[Callable[[], None]] = []

    def start(engine: dict[str, Any] | None = None, **options: Any) -> Running:
        cores: list[Core] = []

        def spawn() -> tuple[Any, socket.socket]:
            cores.append(Core())
            return cores[-1], cores[-1].ours

        patch.setattr(wire, "spawn", spawn)
        args = ServerArgs(access_log=False, served_model_name=["scripted", "other"], **options)
        listening = socket.create_server(("127.0.0.1", 0))
        running: list[Running] = []
        there = threading.Event()

        async def serve() -> None:
            service = Service(args, lambda: AsyncLLM(**engine or {}), lambda error: running[0].fatal.append(error))
            config = uvicorn.Config(
                build(args, service),
                log_config=None,
                lifespan="on",
                ssl_certfile=args.ssl_certfile,
                ssl_keyfile=args.ssl_keyfile,
                timeout_graceful_shutdown=1,
            )
            server = uvicorn.Server(config)
            scheme = "https" if args.ssl_certfile else "http"
            running.append(Running(f"{scheme}://127.0.0.1:{listening.getsockname()[1]}", cores, service, server))
            running[0].loop = asyncio.get_running_loop()
            there.set()
            await server._serve([listening])

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert there.wait(PATIENCE)

        def stop() -> None:
            running[0].client.close()
            running[0].server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server does not end"

        stops.append(stop)
        until(lambda: running[0].server.started and running[0].service.state.value == "serving")
        return running[0]

    with pytest.MonkeyPatch.context() as patch:
        yield start
    for stop in stops:
        stop()


@pytest.fixture
def start() -> Iterator[Start]:
    with servers() as start:
        yield start


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """A server for tests that leave it as it was."""
    with servers() as start:
        yield start()


@pytest.fixture
def server(start: Start) -> Running:
    return start()


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def chat(server: Running, text: str, **options: Any) -> Any:
    return server.client.chat.completions.create(model="scripted", messages=user(text), **options)


def streamed(server: Running, text: str, **options: Any) -> tuple[str, str, list[tuple[str, str, str]], str | None]:
    """Content, reasoning, calls and finish reason of a stream, its pieces joined."""
    content = reasoning = ""
    calls: list[tuple[str, str, str]] = []
    finish = None
    for chunk in chat(server, text, stream=True, **options):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or ():
            if call.id:
                assert call.index == len(calls)
                calls.append((call.id, call.function.name, ""))
            calls[-1] = (*calls[-1][:2], calls[-1][2] + (call.function.arguments or ""))
        finish = choice.finish_reason or finish
    return content, reasoning, calls, finish


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "cities", "finish"),
    [
        ("hello", "Hello there!", "", [], "stop"),
        ("unicode", "naïve 😀 done", "", [], "stop"),
        ("think", "It is 4.", "hm", [], "stop"),
        ("one", "Let me see.", "", ["Paris"], "tool_calls"),
        ("two", "", "which?", ["Paris", "Rome"], "tool_calls"),
    ],
)
def test_chat_with_tools(
    shared: Running, text: str, content: str, reasoning: str, cities: list[str], finish: str
) -> None:
    (choice,) = chat(shared, text, tools=[TOOL]).choices
    message = choice.message
    assert (message.content or "") == content
    assert getattr(message, "reasoning_content", "") == reasoning
    assert [json.loads(c.function.arguments)["city"] for c in message.tool_calls or ()] == cities
    assert choice.finish_reason == finish
    got = streamed(shared, text, tools=[TOOL])
    assert (got[0], got[1], got[3]) == (content, reasoning, finish)
    assert [(n, json.loads(a)) for _, n, a in got[2]] == [("weather", {"city": c}) for c in cities]
    assert len({i for i, _, _ in got[2]}) == len(cities)


def test_tool_choice(server: Running) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    (choice,) = chat(server, "one", tools=[TOOL], tool_choice="none").choices
    assert choice.message.tool_calls is None
    assert "<tool_call>" in choice.message.content
    (choice,) = chat(server, "hello", tools=[TOOL], tool_choice=named).choices
    assert [c.function.arguments for c in choice.message.tool_calls] == ['{"city": "Oslo"}']
    assert choice.finish_reason == "stop"
    assert choice.message.content is None
    content, _, calls, finish = streamed(server, "hello", tools=[TOOL], tool_choice=named)
    assert (content, [c[1:] for c in calls], finish) == ("", [("weather", '{"city": "Oslo"}')], "stop")
    (choice,) = chat(server, "two", tools=[TOOL], parallel_tool_calls=False).choices
    assert [c.function.arguments for c in choice.message.tool_calls] == ['{"city": "Paris"}']
    until(lambda: not server.cores[0].running)


def test_what_was_called_goes_back_into_the_prompt(shared: Running) -> None:
    call: Any = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    found = shared.post("/tokenize", json={"messages": messages, "tools": [TOOL], "return_token_strs": True}).json()
    text = "[tool weather]<system>a\nb</><assistant><tool_call>Paris</tool_call></><tool>sunny</><assistant>"
    assert "".join(found["token_strs"]) == text
    assert shared.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, "guided_regex"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"chat_template": "x"}, "chat_template"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"stop": 3}, "stop"),
        ({"functions": []}, "functions"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"priority": 3}, "priority"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
    ],
)
def test_errors_name_the_field(shared: Running, change: dict[str, Any], param: str) -> None:
    found = shared.post("/v1/chat/completions", json={"messages": user("hello"), **change})
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error


def test_a_model_without_a_format_refuses_tools(start: Start) -> None:
    server = start(tool_call_parser="none")
    with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
        chat(server, "one", tools=[TOOL])


def test_unknown_fields_are_refused_or_ignored(server: Running, start: Start) -> None:
    body = {"messages": user("hello"), "max_tokesn": 3}
    error = server.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("max_tokesn", "unknown_parameter")
    assert "did you mean 'max_tokens'" in error["message"]
    assert start(allow_unknown_fields=True).post("/v1/chat/completions", json=body).status_code == 200


def test_templates_cannot_leave_the_sandbox(start: Start) -> None:
    server = start(trust_request_chat_template=True)
    for attack in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set n = namespace(__class__=1) %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
    ):
        found = server.post("/v1/chat/completions", json={"messages": user("hello"), "chat_template": attack})
        assert found.status_code == 400, (attack, found.text)
    fine = {"messages": user("hello"), "chat_template": "<user>{{ messages[0].content }}"}
    assert server.post("/v1/chat/completions", json=fine).json()["choices"][0]["message"]["content"] == "Hello there!"


def test_too_many_wait(start: Start) -> None:
    server = start(max_waiting=2)
    server.cores[0].pause = 0.01
    streams = [chat(server, "slow", stream=True) for _ in range(6)]
    with pytest.raises(openai.RateLimitError, match="6 sequences run or wait") as caught:
        chat(server, "hello")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert server.get("/ready").status_code == 503
    assert server.get("/health").status_code == 200
    assert server.post("/v1/completions", json={"prompt": "x", "n": 7}).status_code == 400
    for stream in streams:
        stream.close()
    until(lambda: not server.service.in_flight)
    assert chat(server, "hello").choices


def test_a_deadline_ends_a_request(start: Start) -> None:
    server = start(request_timeout=30)
    server.cores[0].pause = 0.01
    with pytest.raises(openai.APIStatusError, match=r"did not finish within its 0.1 s") as caught:
        chat(server, "slow", extra_body={"timeout": 0.1})
    assert caught.value.status_code == 408
    with pytest.raises(openai.APIError, match="did not finish"):
        list(chat(server, "slow", stream=True, extra_body={"timeout": 0.1}))
    until(lambda: not server.cores[0].running)


def raw(server: Running, body: dict[str, Any]) -> tuple[tuple[str, int], bytes]:
    """The address, and the bytes of a request."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    return (host, int(port)), head.encode() + b"Content-Type: application/json\r\n\r\n" + data


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(server: Running, stream: bool) -> None:
    server.cores[0].pause = 0.01
    address, request = raw(server, {"messages": user("slow"), "stream": stream})
    with socket.create_connection(address) as sock:
        sock.sendall(request)
        until(lambda: server.cores[0].running)
    until(lambda: not server.cores[0].running)
    assert server.service.in_flight == 0
    until(lambda: server.service.load().kv_usage == 0)


def test_a_slow_reader_stalls_nobody(server: Running) -> None:
    address, request = raw(server, {"messages": user("slow"), "stream": True, "n": 3})
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address)
        sock.sendall(request)
        until(lambda: server.service.in_flight == 3)
        for _ in range(5):
            begin = time.monotonic()
            chat(server, "hello")
            assert time.monotonic() - begin < 30  # the slow one is never read, so a stall would have no end


def test_the_engine_is_killed(server: Running) -> None:
    server.cores[0].pause = 0.01
    stream = iter(chat(server, "slow", stream=True))
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(chat, server, "slow")
        until(lambda: len(server.cores[0].running) == 2)
        server.cores[0].kill()
        with pytest.raises(openai.APIError, match="killed by signal 9"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="killed by signal 9") as caught:
            whole.result()
    assert caught.value.status_code == 503
    assert server.get("/health").status_code == 503
    with pytest.raises(openai.InternalServerError, match="has ended"):
        chat(server, "hello")
    assert "killed by signal 9" in str(server.fatal[0])


def test_the_engine_is_started_again(start: Start) -> None:
    server = start(on_engine_death="restart")
    server.cores[0].kill()
    until(lambda: len(server.cores) == 2 and server.get("/health").status_code == 200)
    assert chat(server, "hello").choices[0].message.content == "Hello there!"
    assert "engine:core_restarts_total" in server.get("/metrics").text
    assert not server.fatal


def test_draining_finishes_what_runs(start: Start) -> None:
    server = start(drain_timeout=PATIENCE)
    server.cores[0].pause = 0.02
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(chat, server, "think")
        until(lambda: server.cores[0].running)
        drained = asyncio.run_coroutine_threadsafe(server.service.drain(), server.loop)
        until(lambda: server.get("/ready").status_code == 503)
        refused = server.post("/v1/chat/completions", json={"messages": user("hello")})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert server.get("/health").status_code == 200
        assert running.result().choices[0].message.content == "It is 4."
        drained.result(PATIENCE)


def test_draining_ends_in_time(start: Start) -> None:
    server = start(drain_timeout=0.1)
    server.cores[0].pause = 0.01
    next(iter(chat(server, "slow", stream=True)))
    asyncio.run_coroutine_threadsafe(server.service.drain(), server.loop).result(PATIENCE)


def test_keys(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_API_KEY", "secret")
    server = start(api_key=["key"])
    assert chat(server, "hello").choices
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "key"}, {"Authorization": "Bearer keys"}):
        found = server.post("/v1/chat/completions", json={"messages": user("hello")}, headers=headers)
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"
    assert server.post("/tokenize", json={"prompt": "x"}, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert server.get("/health").status_code == 200
    assert server.get("/status").status_code == 401


def test_sizes_and_types_are_limited(start: Start) -> None:
    server = start(max_request_bytes=1000)
    big = {"messages": user("x" * 2000)}
    assert server.post("/v1/chat/completions", json=big).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield from (json.dumps(big).encode()[i : i + 100] for i in range(0, 2000, 100))

    chunked = server.post("/v1/chat/completions", content=chunks(), headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413
    assert server.post("/v1/completions", content="prompt=x").status_code == 415
    broken = server.post("/v1/completions", content="{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "json_invalid")


def test_cors_is_off_unless_asked_for(server: Running, start: Start) -> None:
    asking = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    path = "/v1/chat/completions"
    assert "access-control-allow-origin" not in httpx.options(server.url + path, headers=asking).headers
    other = start(cors_origins=["https://page.example"])
    assert httpx.options(other.url + path, headers=asking).headers["access-control-allow-origin"] == asking["Origin"]


def test_request_ids(shared: Running) -> None:
    found = shared.post("/v1/chat/completions", json={"messages": user("hello")}, headers={"X-Request-Id": "mine-7"})
    assert found.headers["x-request-id"] == "mine-7"
    assert found.json()["id"] == "chatcmpl-mine-7"
    with ThreadPoolExecutor(4) as pool:  # the same id at once is no fault
        ids = pool.map(
            lambda _: shared.post(
                "/v1/chat/completions", json={"messages": user("hello")}, headers={"X-Request-Id": "a"}
            ),
            range(4),
        )
        assert {r.status_code for r in ids} == {200}
    made = shared.get("/version").headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{24}", made)
    assert (
        shared.post("/tokenize", json={"prompt": "x"}, headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"
    )


def test_answers_tell_when_they_were_made(server: Running) -> None:
    begin = int(time.time())
    server.service.created = 0  # of the model
    chunks = [*chat(server, "hello", stream=True), chat(server, "hello")]
    chunks.append(server.client.completions.create(model="scripted", prompt="hello"))
    chunks += server.client.completions.create(model="scripted", prompt="hello", stream=True)
    assert all(begin <= chunk.created <= time.time() for chunk in chunks)
    assert len({chunk.created for chunk in chunks[:2]}) == 1


def test_salt_seed_and_priority_reach_the_core(start: Start) -> None:
    server = start(engine={"scheduling_policy": "priority"})
    fields = {"cache_salt": "s", "seed": -3, "timeout": 9, "priority": -5}
    for path, prompt in (
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": user("hello")}),
        ("/v1/responses", {"input": "hello"}),
    ):
        assert server.post(path, json=prompt | fields).status_code == 200
        request = server.cores[0].seen[-1]
        assert (request.cache_salt, request.priority, request.params.seed) == ("s", -5, -3 % 2**62)


def test_suffix(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with tokens for it fill the gap; others say that they cannot."""
    body: Any = {"prompt": "def f(", "suffix": "): pass"}
    error = start().post("/v1/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
    tokenizer = Tokenizer.from_str(TOKENIZER.backend)
    tokenizer.add_special_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    able = TokenizerData(tokenizer.to_str(), None, {})
    monkeypatch.setitem(globals(), "TOKENIZER", able)
    monkeypatch.setitem(INFO, "vocab_size", tokenizer.get_vocab_size())
    server = start()
    assert server.client.completions.create(model="scripted", **body).choices[0].text == "ok"
    prompt = unpack(able).decode(server.cores[0].seen[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<fim_prefix>def f(<fim_suffix>): pass<fim_middle>"


def test_operators_set_what_requests_leave_open(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A request's own parameters win, then the operator's, then the model's."""
    monkeypatch.setitem(INFO, "default_sampling_params", {"temperature": 0.6, "top_p": 0.9})

    def seen(server: Running, **fields: Any) -> tuple[float, float]:
        server.post("/v1/completions", json={"prompt": "hello", **fields})
        params = server.cores[0].seen[-1].params
        return params.temperature, params.top_p

    assert seen(start()) == (0.6, 0.9)
    assert seen(start(generation_config="none")) == (1.0, 1.0)
    server = start(override_generation_config={"temperature": 0.25})
    assert seen(server) == (0.25, 0.9)
    assert seen(server, temperature=0.5) == (0.5, 0.9)
    template = tmp_path / "template.jinja"
    template.write_text("{{ style }} {{ messages[0].content }}")
    server = start(chat_template=str(template), default_chat_template_kwargs={"style": "loud"})
    for given, style in (({}, "loud"), ({"chat_template_kwargs": {"style": "soft"}}, "soft")):
        body = {"messages": user("hello"), "return_token_strs": True, **given}
        assert "".join(server.post("/tokenize", json=body).json()["token_strs"]) == f"{style} hello"


def test_usage_ends_every_stream_where_the_operator_wants_that(start: Start) -> None:
    server = start(enable_force_include_usage=True)
    text = server.client.completions.create(model="scripted", prompt="hello", stream=True)
    for chunks in (list(chat(server, "hello", stream=True)), list(text)):
        assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].choices == []


def test_a_silent_stream_has_comments(start: Start) -> None:
    server = start(sse_keep_alive_interval=0.05)
    server.cores[0].pause = 0.4
    body = {"prompt": "slow", "max_tokens": 2, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=PATIENCE) as r:
        lines = [line for line in r.iter_lines() if line]
    assert lines[0] == ": keep-alive"
    assert lines[-1] == "data: [DONE]"
    assert sum(line.startswith("data: ") for line in lines) == 3
    content = "".join(c.choices[0].delta.content or "" for c in chat(server, "hello", stream=True, max_tokens=2))
    assert content  # clients pass over them
    with pytest.raises(openai.APIError, match="did not finish"):  # the status is out, so the error is an event
        list(chat(server, "slow", stream=True, extra_body={"timeout": 0.3}))


def test_metrics_have_the_names_that_gateways_read(shared: Running) -> None:
    chat(shared, "hello")
    chat(shared, "hello", stream=True).close()
    text = shared.get("/metrics").text
    for name in (
        "vllm:num_requests_waiting",
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_hits_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:cache_config_info",
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="scripted"}',
        'vllm:time_to_first_token_seconds_count{engine="0",model_name="scripted"}',
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_sum",
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"}',
    ):
        assert name in text, name


def test_prompts_stay_out_of_logs(shared: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        chat(shared, "hello secretword")
        shared.post("/v1/chat/completions", json={"messages": user("secretword"), "temperature": -1})
    assert "secretword" not in caplog.text


def test_tls(start: Start, tmp_path: Path) -> None:
    cert, key = certify(tmp_path, "localhost")
    server = start(ssl_certfile=str(cert), ssl_keyfile=str(key))
    trusted = ssl.create_default_context(cafile=str(cert))
    assert httpx.get(server.url + "/version", verify=trusted).status_code == 200


TOOL_OF_RESPONSES: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("text", "kinds", "answer"),
    [
        ("hello", ["message"], "Hello there!"),
        ("think", ["reasoning", "message"], "It is 4."),
        ("one", ["message", "function_call"], "Let me see."),
        ("two", ["reasoning", "function_call", "function_call"], ""),
    ],
)
def test_responses(shared: Running, text: str, kinds: list[str], answer: str) -> None:
    found = shared.client.responses.create(model="scripted", input=text, tools=[TOOL_OF_RESPONSES])
    assert found.status == "completed"
    assert [item.type for item in found.output] == kinds
    assert found.output_text == answer
    calls = [item for item in found.output if item.type == "function_call"]
    assert [json.loads(c.arguments)["city"] for c in calls] == ["Paris", "Rome"][: len(calls)]
    assert found.usage is not None
    assert found.usage.output_tokens_details.reasoning_tokens == {"reasoning": 1}.get(kinds[0], 0) * len(
        unpack(TOKENIZER).encode({"think": "hm", "two": "which?"}.get(text, ""))
    )
    with shared.client.responses.stream(model="scripted", input=text, tools=[TOOL_OF_RESPONSES]) as stream:
        events = list(stream)
        last = stream.get_final_response()
    assert [e.sequence_number for e in events if hasattr(e, "sequence_number")] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert [item.type for item in last.output] == kinds
    assert last.output_text == answer
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert deltas == answer


def test_responses_go_on(server: Running) -> None:
    first = server.client.responses.create(model="scripted", input="one", tools=[TOOL_OF_RESPONSES], instructions="be")
    call = first.output[1]
    assert call.type == "function_call"
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = server.client.responses.create(model="scripted", input=[output], previous_response_id=first.id)
    prompt = unpack(TOKENIZER).decode(server.cores[0].seen[-1].prompt_token_ids)
    assert prompt == ("<user>one</><assistant>Let me see.<tool_call>Paris</tool_call></><tool>sunny</><assistant>")
    assert server.client.responses.retrieve(second.id).output_text == second.output_text
    server.client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError, match="keeps the latest 256"):
        server.client.responses.retrieve(second.id)


def test_the_store_is_bounded(start: Start) -> None:
    server = start(response_store_size=2)
    ids = [server.client.responses.create(model="scripted", input="hello").id for _ in range(3)]
    unkept = server.client.responses.create(model="scripted", input="hello", store=False).id
    assert [server.get(f"/v1/responses/{i}").status_code for i in (*ids, unkept)] == [404, 200, 200, 404]
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.responses.create(model="scripted", input="hello", previous_response_id=ids[0])
    assert caught.value.param == "previous_response_id"


def test_a_response_that_is_cut_or_fails(server: Running) -> None:
    cut = server.client.responses.create(model="scripted", input="slow", max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    server.cores[0].pause = 0.01
    stream = server.client.responses.create(model="scripted", input="slow", stream=True)
    events = [next(stream)]
    server.cores[0].kill()
    events += list(stream)
    assert events[-1].type == "response.failed"
    assert "killed by signal 9" in events[-1].response.error.message  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input.0.name"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"background": True}, "background"),
        ({"n": 2}, "n"),
    ],
)
def test_errors_of_responses_name_the_field(shared: Running, change: dict[str, Any], param: str) -> None:
    found = shared.post("/v1/responses", json={"input": "hello", **change})
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"] == param, found.text


def test_log_lines_are_json(tmp_path: Path) -> None:
    with processed("--log-format", "json", "--log-prompts") as process:
        url = process.url
        assert httpx.post(url + "/v1/completions", json={"prompt": "hello"}, headers={"X-Request-Id": "i7"}).is_success
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    lines = [json.loads(line) for line in process.lines]
    (access,) = [line for line in lines if line.get("path") == "/v1/completions"]
    assert (access["request_id"], access["status"], access["level"]) == ("i7", 200, "info")
    (said,) = [line for line in lines if line["message"] == "completed"]
    assert (said["prompt"], said["texts"]) == ("hello", ["Hello there!"])


def test_sigterm_drains() -> None:
    """What runs finishes, new requests get 503, and the process ends well."""
    with processed("--drain-timeout", "250", pause="0.05") as process, ThreadPoolExecutor(1) as pool:
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="x", max_retries=0, timeout=4 * PATIENCE)
        with client:
            running = pool.submit(client.completions.create, model="scripted", prompt="slow", max_tokens=500)
            until(lambda: process.get("/status").json()["load"]["num_running"] == 1)
            process.signal(signal.SIGTERM)
            until(lambda: process.get("/ready").status_code == 503)
            assert process.post("/v1/completions", {"prompt": "x"}).status_code == 503
            assert not running.done()
            process.signal(HURRY)
            answer = running.result(PATIENCE)
            assert answer.usage is not None
            assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 500)
        assert process.wait() == 0


def test_a_second_signal_ends_at_once() -> None:
    body = {"prompt": "slow", "max_tokens": 500, "stream": True}
    with (
        processed("--drain-timeout", "250", pause="0.5") as process,
        httpx.stream("POST", process.url + "/v1/completions", json=body, timeout=PATIENCE) as r,
    ):
        lines = r.iter_lines()  # kept: a generator that is dropped closes its connection, which ends the request
        next(lines)
        process.signal(signal.SIGINT)
        until(lambda: process.get("/ready").status_code == 503)
        assert json.loads(next(line for line in lines if line)[6:])["choices"], "it still runs"
        process.signal(signal.SIGINT)
        assert process.wait() == 0


def test_the_server_ends_with_its_engine() -> None:
    with processed() as process:
        process.post("/v1/completions", {"prompt": "die"})
        assert process.wait() == 1
        assert "was killed by signal 9" in process.lines[-1]


PAGES = sorted((Path(__file__).parents[1] / "docs/server").glob("*.md"))
FENCE = re.compile(r"^```(py|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r'^```\w+ title="(.*?)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_the_documentation_run(
    shared: Running, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page's Python as one script, its commands one by one; of those that start a server, the flags are read."""
    found = [
        (kind, code.replace("http://127.0.0.1:8000", shared.url)) for kind, code in FENCE.findall(page.read_text())
    ]
    monkeypatch.chdir(tmp_path)
    for name, text in FILE.findall(page.read_text()):
        Path(name).write_text(text)
    (tmp_path / "examples.py").write_text("".join(code for kind, code in found if kind == "py"))
    commands = [[sys.executable, "examples.py"]]
    for kind, code in found:
        if kind == "sh" and "engine serve" in code:
            for line in code.splitlines():
                command_line_parser().parse_args(shlex.split(line, comments=True)[2:])
        elif kind == "sh":
            commands.append(["bash", "-euo", "pipefail", "-c", code])
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def command_line_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("engine serve")
    serve.add_arguments(parser)
    return parser


def test_every_flag_is_documented() -> None:
    documented = re.findall(r"^        (\w+): ", ServerArgs.__doc__ or "", re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(ServerArgs)]


def test_every_route_and_metric_is_documented(shared: Running) -> None:
    api = (PAGES[0].parent / "api.md").read_text()
    paths = shared.get("/openapi.json").json()["paths"]
    assert [p for p in paths if p.replace("{response_id}", "{id}") not in api] == []
    operations = (PAGES[0].parent / "operations.md").read_text()
    dashboard = (PAGES[0].parent / "grafana.json").read_text()
    names = set(re.findall(r"^# TYPE (\S+)", shared.get("/metrics").text, re.MULTILINE))
    ours = {name.removesuffix("_total") for name in names if not name.startswith("process_")}
    assert [name for name in sorted(ours) if name not in operations] == []
    used = {
        re.sub(r"_(total|bucket|sum|count)$", "", n) for n in re.findall(r"(?:vllm|engine):\w+|http_\w+", dashboard)
    }
    assert used - ours == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssl_keyfile": "x"}, "needs ssl_certfile"),
        ({"ssl_certfile": "/nowhere"}, "no such file"),
        ({"max_waiting": -1}, "at least 0"),
        ({"api_key": [""]}, "empty key"),
        ({"request_timeout": 0}, "above 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerArgs(**options)


def test_a_port_in_use_is_told(shared: Running) -> None:
    port = shared.url.rpartition(":")[2]
    done = subprocess.run([sys.executable, __file__, "0", "serve", "--port", port], capture_output=True, text=True)
    assert done.returncode == 2
    assert "choose another --port" in done.stderr


def test_run_batch(tmp_path: Path) -> None:
    chat = {"messages": user("hello")}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {**chat, "temperature": -1}},
        {"custom_id": "c", "method": "POST", "url": "/v1/files", "body": {}},
        {"custom_id": "d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "think", "max_tokens": 50}},
    ]
    given, made = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, __file__, "0", "run-batch", "-i", str(given), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "4 requests, 2 failed\n"), done.stderr
    answers = [json.loads(line) for line in made.read_text().splitlines()]
    assert [a["custom_id"] for a in answers] == ["a", "b", "c", "d"]
    assert answers[0]["response"]["body"]["choices"][0]["message"]["content"] == "Hello there!"
    assert answers[1]["response"]["body"]["error"]["param"] == "temperature"
    assert "/v1/completions" in answers[2]["error"]["message"]
    assert answers[3]["response"]["body"]["choices"][0]["text"].endswith("It is 4.")
    given.write_text('{"custom_id": "a"}\n{"custom_id": "a"}')
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "line 2 repeats" in done.stderr) == (2, True)


@pytest.mark.parametrize("loop", [["--concurrency", "3"], ["--rate", "200"]])
def test_bench_serve(shared: Running, tmp_path: Path, loop: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plot, output = tmp_path / "plot.svg", tmp_path / "out.json"
    flags = ["--url", shared.url, "--num-prompts", "9", "--output-len", "4", "--input-len", "8-16", *loop]
    assert command_line(["bench", "serve", *flags, "--plot", str(plot), "--output", str(output)]) == 0
    assert "first token ms" in capsys.readouterr().out
    figures = json.loads(output.read_text())
    assert (figures["num_prompts"], figures["failed"], figures["loop"]) == (9, 0, "closed" if "3" in loop else "open")
    assert 0 < figures["first_token_ms"]["p50"] <= figures["first_token_ms"]["p99"] <= figures["whole_ms"]["p99"]
    assert plot.read_text().count("<rect") >= 10
    assert command_line(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    assert "127.0.0.1" in capsys.readouterr().err


HURRY = signal.SIGUSR1
"""Makes a scripted core of a process say the rest at once."""


class Process:
    """A server of its own process, with a scripted core inside."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        until(lambda: self.address or popen.poll() is not None)
        assert self.address, self.lines
        self.url = self.address
        if self.url.startswith("http:"):
            until(lambda: self.get("/health").status_code == 200)

    @property
    def address(self) -> str:
        found = (re.search(r"listening on ((?:http|unix)[^\s\"]+)", line) for line in self.lines)
        return next((match[1] for match in found if match), "")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE)

    def _read(self) -> None:
        assert self._popen.stderr is not None
        for line in self._popen.stderr:
            self.lines.append(line.rstrip())

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self) -> int:
        code = self._popen.wait(PATIENCE)
        self._thread.join(PATIENCE)
        return code


@contextmanager
def processed(*flags: str, pause: str = "0") -> Iterator[Process]:
    command = [sys.executable, __file__, pause, "serve", "--port", "0", "--served-model-name", "scripted", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as popen:
        try:
            yield Process(popen)
        finally:
            popen.kill()


def test_a_unix_socket(tmp_path: Path) -> None:
    """Who reads the line may connect; a socket that nobody listens on gives way, and none is left behind."""
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with processed("--uds", str(path)) as process:
        assert process.url == f"unix:{path}"
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url="http://here", timeout=PATIENCE
        ) as client:
            assert client.get("/version").status_code == 200
        command = [sys.executable, __file__, "0", "serve", "--uds", str(path)]
        other = subprocess.run(command, capture_output=True, text=True)
        assert (other.returncode, "another server listens" in other.stderr) == (2, True)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    assert not path.exists()


def test_a_config_file(tmp_path: Path) -> None:
    """Flags from a file, and those of the command line before them; behind a proxy's path; probes are not logged."""
    given = {
        "api-key": ["first", "second"],
        "root_path": "/engine",
        "log-format": "json",
        "max-waiting": 7,
        "disable-access-log-for-endpoints": ["/health,/metrics"],
        "override-generation-config": {"temperature": 0.5},
        "log-prompts": False,
        "model": str(DEMO_MODEL),
    }
    file = tmp_path / "serve.yaml"
    file.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in given.items()))
    with processed("--config", str(file), "--log-format", "text") as process:
        for root in ("", "/engine"):
            assert process.get(root + "/health").status_code == 200
            assert process.get(root + "/status").status_code == 401
        key = {"Authorization": "Bearer second"}
        assert httpx.get(process.url + "/engine/status", headers=key, timeout=PATIENCE).json()["model"] == "scripted"
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    logged = re.findall(r"path=(\S+)", "\n".join(process.lines))
    assert logged == ["/status", "/engine/status", "/engine/status"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-model-length", "3"], "did you mean --max-model-len?"),
        (["--enable-auto-tool-choice"], "--tool-call-parser tells the format"),
        (["--no-such"], "--help lists what there is"),
        (["--config", "/nowhere.yaml"], "must be a file of YAML"),
        (["--override-generation-config", '{"temprature": 1}'], "it may have temperature"),
        (["--override-generation-config", '{"temperature": -1}'], "temperature must be"),
        (
            ["--tool-call-parser", "none", "--ssl-certfile", __file__],
            "ssl_certfile, ssl_keyfile or ssl_ca_certs cannot",
        ),
        (["--uds", "/nowhere/at/all"], "choose another --uds"),
    ],
)
def test_wrong_flags_are_told(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = command_line(["serve", *flags])
    except SystemExit as end:  # of the parser
        code = int(str(end.code))
    error = capsys.readouterr().err
    assert (code, message in error) == (2, True), error


def certify(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for this host, and its key."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*command, "-keyout", key, "-out", cert, "-days", "2", *subject], check=True, capture_output=True)
    return cert, key


def test_certificates_are_read_again(tmp_path: Path) -> None:
    """As those do that renew them: new files in the place of the old, one by one; broken ones change nothing."""
    cert, key = certify(tmp_path, "old")
    with processed("--ssl-certfile", str(cert), "--ssl-keyfile", str(key)) as process:
        address = ("127.0.0.1", int(process.url.rpartition(":")[2]))
        old = cert.read_text()
        assert ssl.get_server_certificate(address) == old
        (tmp_path / "next").mkdir()
        new, new_key = (path.read_text() for path in certify(tmp_path / "next", "new"))
        key.write_text(new_key)  # which does not fit yet
        until(lambda: refusals(process) > 0)
        assert ssl.get_server_certificate(address) == old
        cert.write_text(new)
        until(lambda: ssl.get_server_certificate(address) == new)
        before = refusals(process)
        cert.write_text("broken")
        until(lambda: refusals(process) > before)
        assert ssl.get_server_certificate(address) == new


def refusals(process: Process) -> int:
    """How often certificates could not be read again."""
    return sum("cannot be read" in line for line in process.lines)


def main() -> int:
    """``engine serve`` with a scripted core: the first word is its pause."""
    cores: list[Core] = []

    def spawn() -> tuple[Any, socket.socket]:
        cores.append(Core())
        cores[-1].pause = float(sys.argv[1])
        return cores[-1], cores[-1].ours

    signal.signal(HURRY, lambda *_: setattr(cores[-1], "pause", 0.0))
    wire.spawn = spawn
    run.REFRESH_SECONDS = 0.1
    return command_line(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
