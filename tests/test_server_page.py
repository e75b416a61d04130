"""The server's page in a real browser, before a stand-in for the API that answers as the server does."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.extensions.server.routes import operations

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

TIMES = {"median": 0.0421, "p95": 0.12}
STATUS: dict[str, Any] = {
    "state": "serving",
    "model": "small & <quick>",
    "version": "1.2.3",
    "engine": {
        "architecture": "Scripted",
        "platform": "cpu",
        "device": "cpu",
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "weight_bytes": 15 << 20,
        "kv_bytes": 4 << 30,
        "tasks": ["generate"],
        "chat": True,
    },
    "load": {"num_running": 5, "num_waiting": 2, "kv_usage": 0.37, "prefix_queries": 100, "prefix_hits": 25},
    "tokens": {"read": 100, "made": 20},
    "latest": {"num_requests": 3, "first_token": TIMES, "per_token": TIMES, "whole": TIMES},
}


POOLED: dict[str, list[dict[str, Any]]] = {
    "/v1/embeddings": [{"index": 0, "embedding": [1, 0]}, {"index": 1, "embedding": [0.6, 0.8]}],
    "/v1/classify": [{"index": 0, "label": "good", "probs": [0.75, 0.25]}],
    "/v1/score": [{"index": 0, "score": 0.125}],
    "/pooling": [{"index": 0, "data": [[1, 2], [3, 4]]}],
}


class API(BaseHTTPRequestHandler):
    """The page, a status, and a completion that streams."""

    asked: list[dict[str, Any]]
    key: str | None = None
    status = STATUS

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, "text/html", operations._page().encode(), {"Content-Security-Policy": operations._POLICY})
        elif self.path == "/status" and self._allowed():
            self._send(200, "application/json", json.dumps(self.status).encode())
        else:
            self._send(404 if self._allowed() else 401, "application/json", b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if self.path in POOLED:
            usage = {"prompt_tokens": 9}
            self._send(200, "application/json", json.dumps({"data": POOLED[self.path], "usage": usage}).encode())
            return
        if body["temperature"] > 5:
            error = {"error": {"message": "temperature is too hot"}}
            self._send(400, "application/json", json.dumps(error).encode())
            return
        deltas = [
            {"role": "assistant", "content": ""},
            {"reasoning_content": "hm "},
            {"content": "Hi <b>"},
            {"content": "é"},
        ]
        chunks: list[dict[str, Any]] = [{"choices": [{"delta": delta}]} for delta in deltas]
        chunks.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3}})
        events = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
        self._send(200, "text/event-stream", events.encode())

    def _allowed(self) -> bool:
        return self.key is None or self.headers["Authorization"] == f"Bearer {self.key}"

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Browser:
    """Chromium's debugging protocol over its pipe."""

    def __init__(self, folder: str) -> None:
        read_there, write_here = os.pipe()
        self._read, write_there = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe"
        shell = f"exec {CHROMIUM} {flags} --user-data-dir={folder} about:blank 3<&{read_there} 4>&{write_there}"
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", shell], pass_fds=(read_there, write_there), **quiet)
        os.close(read_there)
        os.close(write_there)
        self._write = write_here
        self._rest = b""
        self._ids = itertools.count(1)
        self._session: str | None = None
        self.problems: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                if not (data := os.read(self._read, 1 << 16)):
                    raise AssertionError("the browser has ended")
                self._rest += data
            text, _, self._rest = self._rest.partition(b"\0")
            found = json.loads(text)
            if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(found["params"]))
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]

    def run(self, script: str) -> Any:
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        end = time.monotonic() + 20
        while not self.run(f"(() => {{ try {{ return Boolean({script}) }} catch {{ return false }} }})()"):
            assert time.monotonic() < end, f"never true: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.05)

    def text(self, name: str) -> str:
        return str(self.run(f"document.getElementById({name!r}).innerText"))

    def close(self) -> None:
        os.close(self._write)
        os.close(self._read)
        self._process.wait(20)


@pytest.fixture
def api() -> Iterator[tuple[str, type[API]]]:
    handler = type("Handler", (API,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        yield browser
        browser.close()


def test_the_page(browser: Browser, api: tuple[str, type[API]], tmp_path: Path) -> None:
    url, handler = api
    browser.send("Page.navigate", url=url)
    browser.until("document.title === 'small & <quick>'")
    assert browser.text("state") == "serving"
    assert browser.text("running") == "5 of 64"
    assert browser.text("waiting") == "2 waiting · 0 tokens/s"
    assert browser.text("kv") == "37 %"
    assert browser.text("kv-note") == "of 4.0 GiB · 25 % prefix hits"
    assert browser.text("first") == "42 ms"
    assert "15.0 MiB of weights" in browser.text("about")
    browser.run("document.getElementById('prompt').value = 'hello'; document.getElementById('form').requestSubmit()")
    browser.until("document.getElementById('spent').innerText.includes('3 tokens out')")
    assert browser.text("answer") == "hm Hi <b>é"  # as text, never as HTML
    assert handler.asked[-1]["messages"] == [{"role": "user", "content": "hello"}]
    script = "document.getElementById('temperature').value = 9; document.getElementById('form').requestSubmit()"
    browser.run(f"document.querySelector('[value=text]').checked = true; {script}")
    browser.until("document.getElementById('answer').className === 'error'")
    assert browser.text("answer") == "temperature is too hot"
    assert handler.asked[-1]["prompt"] == "hello"
    bad = [p for p in browser.problems if "400" not in p]  # the one that was asked for
    assert not bad


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_any_screen(browser: Browser, api: tuple[str, type[API]], width: int) -> None:
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    browser.send("Page.navigate", url=api[0])
    browser.until("document.title !== 'engine' && document.getElementById('kv').innerText === '37 %'")
    assert browser.run("document.documentElement.scrollWidth") == width


def test_it_asks_for_a_key_where_one_is_needed(browser: Browser, api: tuple[str, type[API]]) -> None:
    url, handler = api
    handler.key = "secret"
    browser.send("Page.navigate", url=url)
    browser.until("document.getElementById('state').innerText === 'needs an API key'")
    assert not browser.run("document.getElementById('key-label').hidden")
    browser.run("const k = document.getElementById('key'); k.value = 'secret'; k.dispatchEvent(new Event('change'))")
    browser.until("document.getElementById('state').innerText === 'serving'")


@pytest.mark.parametrize(
    ("tasks", "text", "asked", "answer"),
    [
        (["embed", "token_embed"], "a\n\nb", {"input": ["a", "b"]}, "2 numbers    a\n0.6000       b"),
        (["classify"], "fine", {"input": ["fine"]}, "good  0.7500, 0.2500  fine"),
        (["score"], "who?\nme", {"text_1": "who?", "text_2": ["me"]}, "0.1250  me"),
        (["token_classify"], "a\nb", {"input": "a\nb"}, "[[1,2],[3,4]]"),
    ],
)
def test_models_that_do_not_generate(
    browser: Browser, api: tuple[str, type[API]], tasks: list[str], text: str, asked: dict[str, Any], answer: str
) -> None:
    url, handler = api
    handler.status = STATUS | {"engine": STATUS["engine"] | {"tasks": tasks, "chat": False}}
    browser.send("Page.navigate", url=url)
    browser.until("document.getElementById('kind').hidden && document.getElementById('tokens').offsetParent === null")
    value = json.dumps(text)
    browser.run(f"document.getElementById('prompt').value = {value}; document.getElementById('form').requestSubmit()")
    browser.until("document.getElementById('spent').innerText.startsWith('9 tokens in')")
    assert browser.text("answer") == answer
    assert handler.asked == [asked]
