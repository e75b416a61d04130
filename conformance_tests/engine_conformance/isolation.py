"""Runs a session's tests in worker processes, so that a backend that crashes or hangs costs one case and not the run.

    the user's process                         worker: the same pytest command, --conformance-worker=FILE:FD
    collects, judges, reports      <- pipe -   runs the ids that FILE lists, in order; a JSON line for each event
    never loads the platform                   ended by a crash, by a hang, or by a device that works no longer

What is left over when a worker ends goes to the next one. The case in which it ended is a FAIL, and is not tried again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from engine_conformance.subject import ending, safe_path

GRACE = 10.0
"""Seconds that a case has beyond its limit: within its process the limit is an exception, and from outside a signal."""

_START = 300.0
"""Seconds from a worker's start to its first case, and between cases."""

_LAST_WORDS = 4000
"""Characters of a worker's output that are told when it dies."""

_NOISE = re.compile(r"/(_pytest|pluggy|pytest)/|<frozen runpy>|^Extension modules:")


class Worker:
    """A process that runs some tests and says what happens."""

    def __init__(self, config: pytest.Config, nodes: list[str]) -> None:
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - `close` does
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(nodes, file)
        self._list = Path(file.name)
        self._pipe, write = os.pipe()
        words = [f"--conformance-worker={file.name}:{write}", *map(str, config.invocation_params.args)]
        self._process = subprocess.Popen(
            [sys.executable, *safe_path(), "-m", "pytest", *words],
            cwd=config.invocation_params.dir,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            start_new_session=True,
        )
        os.close(write)

    def events(self, patience: Callable[[], float]) -> Iterator[dict[str, Any]]:
        """What it says, until it ends; `TimeoutError` after `patience()` seconds without an event."""
        pending, heard = b"", time.monotonic()
        while True:
            if select.select([self._pipe], [], [], 0.5)[0]:
                if not (piece := os.read(self._pipe, 1 << 16)):
                    return
                *lines, pending = (pending + piece).split(b"\n")
                for line in lines:
                    heard = time.monotonic()
                    yield json.loads(line)
            elif self._process.poll() is not None:
                return
            elif time.monotonic() - heard > patience():
                raise TimeoutError

    def end(self) -> str:
        """Wait for it, or end it and what it started; returns how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._process.poll() is not None else 5)
        self._signal(signal.SIGABRT)  # it writes where it stands
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        self._signal(signal.SIGKILL)
        code = self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the processes that it started
        return ending(code)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def last_words(self) -> str:
        """The end of what it printed, from where Python began to say why it dies; without frames of the test runner."""
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")
        _, fatal, stacks = text.rpartition("Fatal Python error")
        lines = (line for line in (fatal + stacks).splitlines() if not _NOISE.search(line))
        return "\n".join(lines)[-_LAST_WORDS:]

    def close(self) -> None:
        """End it, and remove what it needed."""
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self.end()
        os.close(self._pipe)
        self._output.close()
        self._list.unlink(missing_ok=True)


def run(session: pytest.Session, limit_of: Callable[[pytest.Item], float]) -> None:
    """Run the session's tests, and report each to pytest as if it had run here.

    Args:
        session: after the collection.
        limit_of: the seconds that a test may take.
    """
    remaining, silent = list(session.items), 0
    while remaining:
        worker = Worker(session.config, [item.nodeid for item in remaining])
        try:
            left = _attend(session, worker, remaining, limit_of)
            # A worker that ended before its first case may have had bad luck; two of them have a reason.
            silent = silent + 1 if len(left) == len(remaining) else 0
            if silent == 2:
                why = f"the suite's process {worker.end()} before a case began\n{worker.last_words()}"
                for item in left:
                    _report_end(session, item, why, 0.0)
                return
        finally:
            worker.close()
        remaining = left


def _attend(
    session: pytest.Session, worker: Worker, items: list[pytest.Item], limit_of: Callable[[pytest.Item], float]
) -> list[pytest.Item]:
    """Pass on what a worker says until it ends; returns the tests that it has not begun."""
    waiting = {item.nodeid: item for item in items}
    current: pytest.Item | None = None
    began, hung = time.monotonic(), False

    def patience() -> float:
        return _START if current is None else limit_of(current) + GRACE

    try:
        for event in worker.events(patience):
            match event:
                case {"begin": node}:
                    current, began = waiting.pop(node), time.monotonic()
                    current.ihook.pytest_runtest_logstart(nodeid=node, location=current.location)
                case {"report": data} if current:
                    report = session.config.hook.pytest_report_from_serializable(config=session.config, data=data)
                    current.ihook.pytest_runtest_logreport(report=report)
                case {"end": node} if current:
                    current.ihook.pytest_runtest_logfinish(nodeid=node, location=current.location)
                    current = None
                    _stop_where_asked(session)
                case {"lost": _}:
                    break
    except TimeoutError:
        hung = True
    if current:
        took = time.monotonic() - began
        how = worker.end()
        why = f"no answer within {took:.0f} s: the process was ended" if hung else f"the process {how}"
        _report_end(session, current, f"{why}\n\n{worker.last_words()}".strip(), took)
        _stop_where_asked(session)
    return list(waiting.values())


def _report_end(session: pytest.Session, item: pytest.Item, why: str, took: float) -> None:
    """Report a test in which its process ended."""
    for when, outcome, text in (("call", "failed", why), ("teardown", "passed", None)):
        report = pytest.TestReport(
            item.nodeid,
            item.location,
            dict.fromkeys(item.keywords, 1),
            outcome,  # type: ignore[arg-type]
            text,
            when,  # type: ignore[arg-type]
            duration=took if when == "call" else 0.0,
        )
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _stop_where_asked(session: pytest.Session) -> None:
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


class Reporter:
    """The worker's side: says what happens, and ends the process when the device works no longer.

    Args:
        config: the worker's.
        where: ``FILE:FD``, the list of tests and the pipe.
        works: raises where the device does not compute any more.
    """

    def __init__(self, config: pytest.Config, where: str, works: Callable[[], None]) -> None:
        path, _, descriptor = where.rpartition(":")
        self._nodes: list[str] = json.loads(Path(path).read_text())
        self._pipe = int(descriptor)
        os.set_inheritable(self._pipe, False)
        self._config, self._works, self._failed = config, works, False

    def _say(self, **event: Any) -> None:
        data = json.dumps(event).encode() + b"\n"
        while data:
            data = data[os.write(self._pipe, data) :]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests of the list, in its order."""
        found = {item.nodeid: item for item in items}
        items[:] = [found[node] for node in self._nodes if node in found]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self._say(begin=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of it is over."""
        self._failed = self._failed or report.failed
        self._say(report=self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A test is over. What failed may have broken the device for all that follow, which a new process mends."""
        self._say(end=nodeid)
        failed, self._failed = self._failed, False
        if failed:
            try:
                self._works()
            except Exception as error:
                self._say(lost=str(error))
                os._exit(1)
