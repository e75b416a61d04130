"""From pytest's reports to outcomes: what each case says of itself, judged in the process that the user started.

Cases say more than passed or failed with ``record_property(name, value)``:

    "inconclusive", reason            this machine cannot decide it
    "rejected", capability            the platform refused it as the contract asks
    "error over bound: KIND", ratio   how close to the bound it came; above 1 is wrong
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine_conformance.catalogue import Entry
from engine_conformance.results import MOST, Outcome, Requirement, Result, declares
from engine_conformance.waivers import Waiver

_ERROR = "error over bound: "
_OVER = re.compile(r"error is ([\d.e+-]+|inf|nan) times its bound")
_LONGEST = 20_000


@dataclass
class Case:
    """What is known of a case while its phases are reported."""

    entry: Entry
    seconds: float = 0.0
    outcome: Outcome | None = None
    message: str = ""
    rejected: str = ""
    errors: dict[str, float] = field(default_factory=dict)


class Judge:
    """Turns reports into results, and reports of what must not be into failures.

    Args:
        capabilities: what the platform declares, as ``to_dict`` gives it.
        waivers: those that apply, by case.
        seed: of the run.
    """

    def __init__(self, capabilities: Mapping[str, Any], waivers: Mapping[str, Waiver], seed: int) -> None:
        self.capabilities, self.waivers, self.seed = capabilities, waivers, seed
        self._cases: dict[str, Case] = {}

    def expect(self, entry: Entry) -> None:
        """A case will run; should no report of it come, it counts as FAIL."""
        self._cases.setdefault(entry.id, Case(entry))

    def take(self, entry: Entry, report: pytest.TestReport) -> None:
        """Judge one phase of a case: changes the report where the case's outcome is another than pytest's."""
        case = self._cases.setdefault(entry.id, Case(entry))
        case.seconds += report.duration
        said = dict(report.user_properties)
        if report.failed:
            self._failed(case, report)
        elif report.when == "call" and report.passed:
            self._passed(case, report, said)
        if report.when == "call":
            case.errors |= {
                name.removeprefix(_ERROR): _ratio(value) for name, value in said.items() if name.startswith(_ERROR)
            }
            if found := _OVER.search(case.message):
                case.errors[f"{case.entry.capability}, failed"] = _ratio(found[1])
        if case.outcome:
            report.user_properties.append(("outcome", str(case.outcome)))

    def _failed(self, case: Case, report: pytest.TestReport) -> None:
        case.message = f"{case.message}\n\n{report.longreprtext}".strip()
        waiver = self.waivers.get(case.entry.id)
        if waiver is None:
            case.outcome = Outcome.FAIL
            return
        case.outcome = Outcome.WAIVED if waiver.kind == "xfail" else Outcome.QUARANTINED
        report.outcome = "skipped"
        report.wasxfail = f"{waiver.reason} ({waiver.issue})"

    def _passed(self, case: Case, report: pytest.TestReport, said: Mapping[str, Any]) -> None:
        case.outcome, case.message = verdict(
            case.entry,
            self.capabilities,
            said.get("inconclusive"),
            said.get("rejected"),
            self.waivers.get(case.entry.id),
        )
        if case.outcome is Outcome.REJECTED_OK:
            case.rejected = str(said.get("rejected", case.entry.capability))
        if case.outcome is Outcome.FAIL:
            report.outcome, report.longrepr = "failed", case.message

    def results(self) -> Iterator[Result]:
        """A result for each case, in the order in which they were expected or came."""
        for case in self._cases.values():
            yield Result(
                id=case.entry.id,
                tier=case.entry.tier,
                capability=case.entry.capability,
                requirement=self._requirement(case),
                outcome=case.outcome or Outcome.FAIL,
                error=max(case.errors.values(), default=None),
                errors=case.errors,
                seed=self.seed,
                seconds=round(case.seconds, 3),
                message=_short(case.message) if case.outcome else "it was not run: the session ended before it",
                rejected=case.rejected,
            )

    def _requirement(self, case: Case) -> Requirement:
        if case.outcome is Outcome.REJECTED_OK:
            return Requirement.UNDECLARED
        return case.entry.requirement(self.capabilities)


def verdict(
    entry: Entry,
    capabilities: Mapping[str, Any],
    inconclusive: str | None = None,
    rejected: str | None = None,
    waiver: Waiver | None = None,
) -> tuple[Outcome, str]:
    """The outcome of a case whose assertions all held, and why it is not PASS.

    Args:
        entry: the case.
        capabilities: what the platform declares, as ``to_dict`` gives it.
        inconclusive, rejected: what the case said of itself.
        waiver: that applies to it.
    """
    requirement = entry.requirement(capabilities)
    if waiver and waiver.kind == "quarantine":
        return Outcome.QUARANTINED, f"passed this time; {waiver.reason} ({waiver.issue})"
    if rejected is not None and requirement is Requirement.MUST:
        return Outcome.FAIL, f"the platform refuses {rejected}, which every platform must do"
    if rejected is not None and declares(capabilities, rejected):
        return Outcome.FAIL, f"the platform refuses {rejected}, which it declares"
    if waiver and inconclusive is None:
        return Outcome.FAIL, f"it passes, and a waiver says that it fails ({waiver.issue}): remove the waiver"
    if rejected is not None or requirement is Requirement.UNDECLARED:
        return Outcome.REJECTED_OK, f"{rejected or entry.capability} is not declared, and was refused"
    if inconclusive is not None:
        return Outcome.INCONCLUSIVE, str(inconclusive)
    return Outcome.PASS, ""


def _ratio(value: Any) -> float:
    number = float(value)
    return min(number, MOST) if number == number else MOST


def _short(text: str) -> str:
    half = _LONGEST // 2
    return (
        text if len(text) <= _LONGEST else f"{text[:half]}\n... {len(text) - _LONGEST} characters ...\n{text[-half:]}"
    )
