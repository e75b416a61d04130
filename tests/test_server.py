"""The server as users run it: `engine serve` with the small model, asked by the `openai` package."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine import LLM, SamplingParams

PROMPT = "def fibonacci(n):"
QUESTION: Any = [{"role": "user", "content": "Write a function that returns the largest number of a list."}]
MODEL = "demo_model"


class Server:
    """A process that serves, its address, and its log."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "engine.extensions.cli", "serve", "--port", "0", "--platform", "cpu"]
        command[1:3] = ["-c", "import sys; from engine.extensions.cli import main; sys.exit(main())"]
        self.process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        until(lambda: self.log(r"listening on (\S+)"), 60)
        self.url = self.log(r"listening on (\S+)")
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def log(self, pattern: str) -> str:
        return next((found[1] for line in self.lines if (found := re.search(pattern, line))), "")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def load(self) -> dict[str, float]:
        found: dict[str, float] = self.get("/status").json()["load"]
        return found


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--max-model-len", "512", "--max-num-seqs", "32", "--num-blocks", "600", "--block-size", "16")
    try:
        yield server
    finally:
        server.client.close()
        server.process.kill()
        server.process.wait()
        server.thread.join()
        assert server.process.stderr is not None
        server.process.stderr.close()


@pytest.fixture(scope="module")
def ready(server: Server) -> Server:
    until(lambda: server.get("/health").status_code == 200, 120)
    return server


def test_it_answers_while_the_model_loads(server: Server) -> None:
    """And the server's own process never has torch, which would take seconds and hundreds of megabytes."""
    found = server.get("/health")
    assert found.status_code in (200, 503)
    refused = server.post("/v1/completions", {"prompt": PROMPT})
    if found.status_code == 503:
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    until(lambda: server.get("/health").status_code == 200, 120)
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps


def test_completions_equal_the_offline_engine(ready: Server) -> None:
    llm = LLM(max_model_len=512, block_size=16, platform="cpu")  # the server's: blocks decide how sums round
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=3, prompt_logprobs=0)
    (want,) = llm.generate([PROMPT], params)
    got = ready.client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=24, logprobs=3, extra_body={"return_token_ids": True}
    )
    (choice,) = got.choices
    assert choice.text == want.outputs[0].text
    assert choice.token_ids == want.outputs[0].token_ids  # type: ignore[attr-defined]
    chosen = [
        entry[token].logprob
        for token, entry in zip(want.outputs[0].token_ids, want.outputs[0].logprobs or (), strict=True)
    ]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(chosen, abs=1e-4)
    (chat,) = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=64))
    answer = ready.client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=64)
    assert answer.choices[0].message.content == chat.outputs[0].text
    sampled = SamplingParams(temperature=1, seed=7, max_tokens=16, top_k=50)
    (want,) = llm.generate([PROMPT], sampled)
    got = ready.client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=1, seed=7, max_tokens=16, extra_body={"top_k": 50}
    )
    assert got.choices[0].text == want.outputs[0].text


def complete(server: Server, **options: Any) -> Any:
    fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 12} | options
    return server.client.completions.create(**fields)


def test_a_stream_is_the_answer_in_pieces(ready: Server) -> None:
    options: dict[str, Any] = {
        "prompt": [PROMPT, "class Stack:"],
        "logprobs": 2,
        "echo": True,
        "n": 2,
        "temperature": 1,
        "seed": 3,
    }
    whole = complete(ready, **options)
    texts = [""] * 4
    logprobs: list[list[float | None]] = [[] for _ in range(4)]
    offsets: list[list[int]] = [[] for _ in range(4)]
    reasons: list[str | None] = [None] * 4
    usage = None
    for chunk in complete(ready, **options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs
            offsets[choice.index] += choice.logprobs.text_offset
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [c.text for c in whole.choices]
    assert logprobs == [pytest.approx(c.logprobs.token_logprobs, abs=0.1) for c in whole.choices]
    assert offsets == [c.logprobs.text_offset for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    for choice in whole.choices:
        assert choice.text.startswith((PROMPT, "class Stack:")[choice.index // 2])
        assert choice.logprobs.token_logprobs[0] is None
        pieces = zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)
        assert all(choice.text[at:].startswith(token) for at, token in pieces)


def test_chat_streams_with_log_probabilities(ready: Server) -> None:
    create = ready.client.chat.completions.create
    options: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 20}
    whole = create(**options, logprobs=True, top_logprobs=2, n=1)
    content = ""
    entries: list[Any] = []
    for chunk in create(**options, logprobs=True, top_logprobs=2, stream=True):
        content += chunk.choices[0].delta.content or ""
        entries += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert content == whole.choices[0].message.content
    assert [e.token for e in entries] == [e.token for e in whole.choices[0].logprobs.content]
    assert bytes(b for e in entries for b in e.bytes).decode().startswith(content[:10])
    assert all(len(e.top_logprobs) == 2 and e.top_logprobs[0].logprob >= e.logprob for e in entries)


def test_sampling_fields_have_their_effect(ready: Server) -> None:
    base = complete(ready).choices[0].text
    assert complete(ready, stop="fib").choices[0].text == base.split("fib")[0] or "fib" not in base
    stopped = complete(ready, stop=['"""'], max_tokens=40).choices[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", '"""')
    kept = complete(ready, stop=['"""'], extra_body={"include_stop_str_in_output": True}).choices[0].text
    assert kept.endswith('"""')
    token = ready.post("/tokenize", {"prompt": "\n"}).json()["tokens"][0]
    forced = complete(ready, logit_bias={str(token): 100}, max_tokens=3).choices[0].text
    assert forced == "\n\n\n"
    only = complete(ready, extra_body={"allowed_token_ids": [token]}, max_tokens=2).choices[0].text
    assert only == "\n\n"
    body = {"messages": QUESTION, "max_tokens": 80, "temperature": 0}
    ended = ready.post("/v1/chat/completions", body).json()
    assert ended["choices"][0]["finish_reason"] == "stop"
    on = ready.post("/v1/chat/completions", {**body, "ignore_eos": True}).json()
    assert (on["choices"][0]["finish_reason"], on["usage"]["completion_tokens"]) == ("length", 80)
    ids = ready.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    assert complete(ready, prompt=ids).choices[0].text == base
    both = complete(ready, prompt=[ids, ids])
    assert [c.text for c in both.choices] == [base, base]
    best = complete(ready, best_of=4, n=2, temperature=1, seed=1, logprobs=0).choices
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in best]
    assert means == sorted(means, reverse=True)
    scored = complete(ready, echo=True, max_tokens=0, logprobs=1)
    assert scored.choices[0].text == PROMPT
    assert len(scored.choices[0].logprobs.tokens) == len(ids) == scored.usage.prompt_tokens
    assert scored.usage.completion_tokens == 0
    prompt = ready.post("/v1/completions", {"prompt": PROMPT, "prompt_logprobs": 1, "max_tokens": 1}).json()
    entries = prompt["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    assert str(ids[1]) in entries[1]


def test_a_prompt_is_cached_by_salt(ready: Server) -> None:
    body = {"prompt": "# " + "a long comment " * 20, "max_tokens": 1}
    cached = [
        ready.post("/v1/completions", {**body, **salt}).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ({}, {}, {"cache_salt": "x"}, {"cache_salt": "x"})
    ]
    assert cached[0] == cached[2] == 0
    assert cached[1] == cached[3] > 0


def test_models_versions_and_metrics(ready: Server) -> None:
    (model,) = ready.client.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 512)  # type: ignore[attr-defined]
    assert ready.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="this server has demo_model"):
        ready.client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="max_model_len is 512") as caught:
        complete(ready, prompt="x " * 2000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert re.search(r"vllm:generation_tokens_total\{.*\} \d+\.0", ready.get("/metrics").text)
    assert ready.get("/version").json()["version"]
    assert "no route" in ready.get("/v1/nothing").json()["error"]["message"]


def test_random_disconnects_leak_nothing(ready: Server) -> None:
    """Many streams at once, of which most are left at a random moment: all blocks are free afterwards."""

    async def one(client: httpx.AsyncClient, draw: random.Random) -> None:
        body = {"prompt": f"# {draw.random()}\n", "max_tokens": 48, "ignore_eos": True, "n": draw.choice((1, 2))}
        body["stream"] = draw.random() < 0.7
        patience = draw.choice((0.0, 0.05, 0.3, 0.8, 60))
        try:
            async with asyncio.timeout(patience or 0.001):
                async with client.stream("POST", ready.url + "/v1/completions", json=body) as response:
                    async for _ in response.aiter_bytes():
                        pass
        except TimeoutError:
            pass

    async def all_of_them() -> None:
        draw = random.Random(0)
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            await asyncio.gather(*(one(client, draw) for _ in range(100)))

    asyncio.run(all_of_them())
    until(lambda: ready.load()["in_flight"] == 0)
    until(lambda: ready.load()["num_running"] == ready.load()["num_waiting"] == ready.load()["kv_usage"] == 0)
    assert complete(ready).choices[0].text


def core_of(server: Server) -> int:
    children = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True).stdout.split()
    (core,) = [int(p) for p in children]
    return core


def test_only_the_server_decides_when_the_engine_ends(ready: Server) -> None:
    """Signals that reach all processes at once, from a terminal or systemd, must not cut a drain short."""
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(core_of(ready), number)
    assert complete(ready).choices[0].text


def test_the_engine_is_killed(ready: Server) -> None:
    """The last test: running requests end with an error that tells what happened, and so does the server."""
    stream = complete(ready, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(stream)
    os.kill(core_of(ready), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="killed by signal 9"):
        list(stream)
    assert ready.process.wait(60) == 1
    ready.thread.join(5)
    assert "killed by signal 9" in ready.lines[-1]
