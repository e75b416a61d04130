"""Pytest's side of the suite: options, the platforms named early, and a skip that counts as a failure.

Loaded in every pytest run of an environment that has the engine, so nothing is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, cast

import pytest

if TYPE_CHECKING:
    from engine_sdk import Platform

EXAMPLES = {"smoke": 1, "ci": 8, "cert": 50}
"""How many times the examples of a smoke run each profile draws."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("engine conformance")
    group.addoption(
        "--platform", action="append", default=[], metavar="NAME", help="platform to certify; may be repeated"
    )
    group.addoption(
        "--conformance-profile",
        choices=list(EXAMPLES),
        default="smoke",
        help="smoke: minutes; ci: tens of; cert: hours",
    )


_PLATFORMS = pytest.StashKey[dict[str, "Platform"]]()


def platforms(config: pytest.Config) -> dict[str, Platform]:
    """The platforms that ``--platform`` names, made; raises `pytest.UsageError` with the reason why one cannot run."""
    if _PLATFORMS not in config.stash:
        from engine.errors import EngineError
        from engine.plugins import load_platform

        try:
            config.stash[_PLATFORMS] = {n: load_platform(n) for n in config.getoption("platform")}
        except EngineError as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[_PLATFORMS]


def pytest_sessionstart(session: pytest.Session) -> None:
    """End the session at once when a platform that was named cannot run."""
    platforms(session.config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name what is certified."""
    return [
        f"conformance: {name}, contract {platform.contract}, on "
        f"{', '.join(f'{d.index}: {d.name}' for d in platform.probe().devices)}; "
        f"profile {config.getoption('conformance_profile')}"
        for name, platform in platforms(config).items()
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every case of the suite once for each platform."""
    if "conformance_platform" in metafunc.fixturenames:
        names = list(platforms(metafunc.config))
        if not names:
            raise pytest.UsageError("the conformance suite needs a platform: add --platform=NAME")
        metafunc.parametrize("conformance_platform", names, indirect=True, scope="session")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count a skipped case as a failure: what is not run is not certified."""
    report = yield
    if report.skipped and "conformance_platform" in getattr(item, "fixturenames", ()):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped; the suite has no skips: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what could not be decided, and how close to its bound each kind of result came."""
    worst: dict[str, float] = {}
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ())]
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == "inconclusive":
                terminalreporter.write_line(f"INCONCLUSIVE {report.nodeid}: {value}", yellow=True)
            if name.startswith("error over bound: "):
                worst[name] = max(worst.get(name, 0.0), cast("float", value))
    for name, value in sorted(worst.items()):
        terminalreporter.write_line(f"worst {name}: {value:.2f}")
