"""The report as JUnit's XML, as CI systems read it: a suite for each tier, a case for each id."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree as Xml

from engine_conformance.results import Outcome, Result, Run

_SKIPPED = (Outcome.WAIVED, Outcome.QUARANTINED, Outcome.INCONCLUSIVE)
"""What neither passed nor failed. A refusal that is as it should be has passed."""

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot hold."""


def write_junit(run: Run, path: Path) -> None:
    """Write a run as JUnit's XML."""
    root = Xml.Element("testsuites", name=f"engine conformance of {run.subject.name}")
    for tier, results in groupby(sorted(run.results, key=lambda r: r.tier), key=lambda r: r.tier):
        cases = list(results)
        suite = Xml.SubElement(root, "testsuite", _counts(cases), name=tier, timestamp=run.started[:19])
        suite.extend(_case(result) for result in cases)
    Xml.indent(root)
    Xml.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _counts(results: list[Result]) -> dict[str, str]:
    return {
        "tests": str(len(results)),
        "failures": str(sum(r.outcome is Outcome.FAIL for r in results)),
        "errors": "0",
        "skipped": str(sum(r.outcome in _SKIPPED for r in results)),
        "time": f"{sum(r.seconds for r in results):.3f}",
    }


def _case(result: Result) -> Xml.Element:
    case = Xml.Element("testcase", classname=f"{result.tier}.{result.capability}", name=result.id)
    case.set("time", f"{result.seconds:.3f}")
    message = _FORBIDDEN.sub("?", result.message)
    if result.outcome is Outcome.FAIL:
        Xml.SubElement(case, "failure", message=message[:200]).text = message
    elif result.outcome in _SKIPPED:
        Xml.SubElement(case, "skipped", message=f"{result.outcome}: {message[:200]}")
    return case
