"""OpenAI's batch files through the server's own routes, called in this process: same checks, same answers, no port."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message

from engine.config import EngineArgs
from engine.errors import EngineError, RequestError
from engine.extensions.server import logs
from engine.extensions.server.app import build
from engine.extensions.server.args import ServerArgs
from engine.extensions.server.service import Service, State
from engine.extensions.serving import AsyncLLM

URLS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses"),
    *("/v1/embeddings", "/v1/score", "/v1/rerank", "/v1/classify"),
)
"""Routes that a batch may call."""


def run_batch(args: ServerArgs, engine: EngineArgs, source: Path, target: Path) -> tuple[int, int]:
    """Answer the requests in `source`, writing to `target`; how many there were, and how many failed.

    Raises:
        RequestError: the file is no batch file.
        EngineError: the model cannot be loaded, or the engine ended.
    """
    lines = list(_read(source))
    logs.configure(args.log_format, args.log_level)
    return asyncio.run(_run(args, engine, lines, target))


def _read(source: Path) -> Iterable[dict[str, Any]]:
    try:
        text = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {source}: {error}") from error
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{source}, line {number} is not JSON: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("custom_id"), str):
            raise RequestError(f"{source}, line {number} has no custom_id, a string")
        if found["custom_id"] in seen:
            raise RequestError(f"{source}, line {number} repeats the custom_id {found['custom_id']!r}")
        seen.add(found["custom_id"])
        yield found


async def _run(args: ServerArgs, engine: EngineArgs, lines: list[dict[str, Any]], target: Path) -> tuple[int, int]:
    fatal: list[EngineError] = []
    service = Service(args, lambda: AsyncLLM.of(engine), fatal.append)
    app = build(args, service)
    service.start()
    try:
        while service.state is State.STARTING:
            await asyncio.sleep(0.05)
        if fatal:
            raise fatal[0]
        at_once = asyncio.Semaphore(service.info.max_num_seqs + args.max_waiting // 2)

        async def one(line: dict[str, Any]) -> dict[str, Any]:
            async with at_once:
                return await _answer(app, line)

        failed = 0
        with target.open("w") as file:
            tasks = [asyncio.create_task(one(line)) for line in lines]
            for task in tasks:
                answer = await task
                failed += answer["error"] is not None or answer["response"]["status_code"] != 200
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        if fatal:
            raise fatal[0]
        return len(lines), failed
    finally:
        await service.close()


async def _answer(app: ASGIApp, line: dict[str, Any]) -> dict[str, Any]:
    """A line of the output."""
    answer = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line["custom_id"], "response": None}
    url, body = line.get("url"), line.get("body")
    problem = None
    if url not in URLS or line.get("method", "POST") != "POST":
        problem = f"a batch may POST to {', '.join(URLS)}"
    elif not isinstance(body, dict) or body.get("stream"):
        problem = "body is an object with the request, which does not stream"
    if problem is not None:
        return answer | {"error": {"code": "invalid_request", "message": problem}}
    status, headers, content = await call(app, "POST", str(url), json.dumps(body).encode())
    response = {"status_code": status, "request_id": headers["x-request-id"], "body": json.loads(content)}
    return answer | {"response": response, "error": None}


async def call(app: ASGIApp, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer of the application itself."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }
    incoming = itertools.chain([{"type": "http.request", "body": body, "more_body": False}])
    status, headers, content = 500, {}, b""

    async def receive() -> Message:
        if (message := next(incoming, None)) is None:
            await asyncio.Event().wait()  # nobody leaves
            raise AssertionError
        return message

    async def send(message: Message) -> None:
        nonlocal status, headers, content
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            content += message.get("body", b"")

    await app(scope, receive, send)
    return status, headers, content
