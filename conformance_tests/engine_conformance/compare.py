"""What changed between two runs: outcomes, errors, capabilities, time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine_conformance.results import Outcome, Result, Run, worst

WORSE = 1.25
"""An error over its bound that grew by this factor is worth a word..."""

LEAST = 0.05
"""... if it grew by this much too."""

SLOWER, LEAST_SECONDS = 2.0, 5.0
"""The same for the seconds of a case, which say little on a busy machine."""

_ORDER = (Outcome.PASS, Outcome.REJECTED_OK, Outcome.INCONCLUSIVE, Outcome.WAIVED, Outcome.QUARANTINED, Outcome.FAIL)
"""From good to bad."""


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        kind: ``"outcome"``, ``"case"``, ``"error"``, ``"capability"``, ``"seconds"`` or ``"version"``.
        what: what it is about.
        before, after: in words.
        regression: it is for the worse.
    """

    kind: str
    what: str
    before: str
    after: str
    regression: bool


def compare(before: Run, after: Run) -> list[Change]:
    """The differences between two runs; regressions first.

    A failure that was none, a case or a capability that is gone, and an error that grew notably are regressions.
    """
    changes = [
        *_versions(before, after),
        *_capabilities(before, after),
        *_cases(before, after),
        *_errors(before, after),
    ]
    return sorted(changes, key=lambda change: not change.regression)


def _versions(before: Run, after: Run) -> Iterator[Change]:
    pairs = {
        before.subject.distribution: (before.subject.version, after.subject.version),
        "numerics class": (before.subject.capabilities.get("numerics"), after.subject.capabilities.get("numerics")),
        "suite": (before.suite.version, after.suite.version),
        "profile": (before.profile, after.profile),
        "driver": (before.subject.driver, after.subject.driver),
        **{name: (before.software.get(name), after.software.get(name)) for name in before.software},
    }
    for name, (old, new) in pairs.items():
        if old != new:
            yield Change("version", name, str(old or "-"), str(new or "-"), (old, new) == ("A", "B"))


def _capabilities(before: Run, after: Run) -> Iterator[Change]:
    old, new = before.subject.capabilities, after.subject.capabilities
    for name in [*old, *(n for n in new if n not in old)]:
        if name == "numerics" or old.get(name) == new.get(name):
            continue
        if isinstance(old.get(name), list | tuple) and isinstance(new.get(name), list | tuple):
            for value in [v for v in old[name] if v not in new[name]]:
                yield Change("capability", f"{name} {value}", "declared", "not declared", True)
            for value in [v for v in new[name] if v not in old[name]]:
                yield Change("capability", f"{name} {value}", "not declared", "declared", False)
        else:
            lost = bool(old.get(name)) and (not new.get(name) or new.get(name) == "none")
            yield Change("capability", name, _word(old.get(name)), _word(new.get(name)), lost)


def _word(value: object) -> str:
    return (
        {True: "yes", False: "no", None: "-"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)
    )


def _cases(before: Run, after: Run) -> Iterator[Change]:
    old, new = ({r.id: r for r in run.results} for run in (before, after))
    for name, result in old.items():
        if name not in new:
            yield Change("case", name, str(result.outcome), "not run", True)
        else:
            yield from _case(result, new[name])
    for name, result in new.items():
        if name not in old:
            yield Change("case", name, "not run", str(result.outcome), result.outcome is Outcome.FAIL)


def _case(old: Result, new: Result) -> Iterator[Change]:
    if old.outcome is not new.outcome:
        worse = _ORDER.index(new.outcome) > _ORDER.index(old.outcome)
        yield Change("outcome", new.id, str(old.outcome), str(new.outcome), worse)
    if new.seconds > SLOWER * old.seconds and new.seconds - old.seconds > LEAST_SECONDS:
        yield Change("seconds", new.id, f"{old.seconds:.1f}", f"{new.seconds:.1f}", False)


def _errors(before: Run, after: Run) -> Iterator[Change]:
    old, new = worst(before.results), worst(after.results)
    for kind in [k for k in new if k in old]:
        worse, better = _notable(old[kind], new[kind]), _notable(new[kind], old[kind])
        if worse or better:
            yield Change("error", kind, f"{old[kind]:.2f}", f"{new[kind]:.2f}", worse)


def _notable(small: float, large: float) -> bool:
    return large > WORSE * small and large - small > LEAST
