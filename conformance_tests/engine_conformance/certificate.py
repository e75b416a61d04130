"""What a run proves: the level that it reaches, why it proves no more, and the certificate that says so.

    Core      every MUST case of L0 to L4, L6 and L7 is PASS
    Serving   and graphs are declared, and every case of L5 is right
    Full      and every case of what is declared: nothing waived, quarantined or undecided

No run with a failure reaches a level, L8 apart, which informs. A certificate is no signature: whoever has the results
and the plugin can make it again, and sees whether it is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError, EngineError
from engine_conformance.catalogue import Entry, Listing, listing
from engine_conformance.results import Outcome, Requirement, Result, Run, declares

LEVELS = ("Core", "Serving", "Full")

_CORE = frozenset({"L0", "L1", "L2", "L3", "L4", "L6", "L7"})
_SERVING = "L5"
_INFORMATIVE = "L8"
_SHOWN = 5


@dataclass(frozen=True)
class Assessment:
    """What a run proves.

    Attributes:
        level: ``"Core"``, ``"Serving"`` or ``"Full"``; empty for none.
        problems: why it cannot be certified, a sentence each; none where there is a level.
        missing: what keeps it from the next level, a sentence each.
    """

    level: str
    problems: tuple[str, ...]
    missing: tuple[str, ...]


def assess(run: Run, known: Listing | None = None, today: date | None = None) -> Assessment:
    """Judge a run from its results, whatever it says of itself.

    Args:
        run: the results.
        known: the cases that there are; the checked-in list by default.
        today: decides which waivers have expired.
    """
    known = known or listing()
    expected = known.of(run.profile)
    problems = [
        *_outcomes(run, expected),
        *_complete(run, known, expected),
        *_waivers(run, expected, today or date.today()),
    ]
    if problems:
        return Assessment("", tuple(problems), ())
    if not declares(run.subject.capabilities, "graphs"):
        return Assessment("Core", (), ("Serving needs graphs, and the platform declares none",))
    below = [r for r in run.results if r.outcome not in (Outcome.PASS, Outcome.REJECTED_OK) and r.tier != _INFORMATIVE]
    if graphs := [r for r in below if r.tier == _SERVING]:
        return Assessment("Core", (), _short_of("Serving", graphs))
    return Assessment("Serving" if below else "Full", (), _short_of("Full", below))


def _short_of(level: str, results: Sequence[Result]) -> tuple[str, ...]:
    return tuple(f"{level} needs {r.id} to be PASS; it is {r.outcome}" for r in results)


def _complete(run: Run, known: Listing, expected: dict[str, Entry]) -> Iterable[str]:
    """Every case of the profile, once, drawn as every run draws it."""
    if run.shard:
        yield f"it is shard {run.shard} alone: merge the results of all shards"
    if run.seed:
        yield f"its inputs were drawn from seed {run.seed}: a certificate is about those of seed 0"
    counts = Counter(r.id for r in run.results)
    if missing := [i for i in expected if i not in counts]:
        hint = ""
        if run.software.get("transformers") != known.transformers and any(".architectures." in i for i in missing):
            hint = f" (the list is of Transformers {known.transformers}, the run of {run.software.get('transformers')})"
        yield f"{_cases(missing, 'is missing', 'are missing')}{hint}"
    if unknown := [i for i in counts if i not in expected]:
        yield _cases(
            unknown, f"is not on the list of profile {run.profile}", f"are not on the list of profile {run.profile}"
        )
    if doubled := [i for i, n in counts.items() if n > 1]:
        yield _cases(doubled, "occurs more than once", "occur more than once")


def _outcomes(run: Run, expected: dict[str, Entry]) -> Iterable[str]:
    """No failure, MUST cases PASS, and refusals where and only where nothing was declared."""
    ours = [(r, expected[r.id]) for r in run.results if r.id in expected]
    if failed := [r.id for r, entry in ours if r.outcome is Outcome.FAIL and entry.tier != _INFORMATIVE]:
        yield _cases(failed, "fails", "fail")
    for outcome in (Outcome.INCONCLUSIVE, Outcome.WAIVED, Outcome.QUARANTINED, Outcome.REJECTED_OK):
        if found := [r.id for r, entry in ours if entry.must and entry.tier in _CORE and r.outcome is outcome]:
            yield _cases(found, f"is MUST and {outcome}", f"are MUST and {outcome}")
    declared = run.subject.capabilities
    refused = [r.id for r, _ in ours if r.outcome is Outcome.REJECTED_OK and declares(declared, r.rejected)]
    if refused:
        yield _cases(refused, "was refused, though it is declared", "were refused, though they are declared")
    taken = [
        r.id
        for r, entry in ours
        if r.outcome in (Outcome.PASS, Outcome.INCONCLUSIVE) and entry.requirement(declared) is Requirement.UNDECLARED
    ]
    if taken:
        yield _cases(
            taken, "was not refused, though it is not declared", "were not refused, though they are not declared"
        )


def _waivers(run: Run, expected: dict[str, Entry], today: date) -> Iterable[str]:
    excused = {w.get("id", ""): w for w in run.waivers}
    for r in run.results:
        if r.outcome in (Outcome.WAIVED, Outcome.QUARANTINED) and r.id not in excused:
            yield f"{r.id} is {r.outcome}, and no waiver says so"
    for name, waiver in excused.items():
        if name in expected and expected[name].must:
            yield f"{name} is waived, and every platform must pass it"
        if not waiver.get("issue") or not waiver.get("reason"):
            yield f"the waiver of {name} has no issue or no reason"
        try:
            expires = date.fromisoformat(waiver.get("expires", ""))
        except ValueError:
            yield f"the waiver of {name} does not say when it expires"
        else:
            if expires < today:
                yield f"the waiver of {name} expired on {expires}"


def _cases(ids: Sequence[str], one: str, many: str) -> str:
    shown = ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
    return f"{len(ids)} {f'case {one}' if len(ids) == 1 else f'cases {many}'}: {shown}"


def certificate(run: Run, level: str) -> dict[str, Any]:
    """What is certified, as plain data: the same for the same run."""
    return {
        "certificate": 1,
        "level": level,
        "profile": run.profile,
        "platform": asdict(run.subject),
        "numerics": run.subject.capabilities.get("numerics"),
        "suite": {name: value for name, value in asdict(run.suite).items() if name != "mutation"},
        "software": run.software,
        "run": run.started,
        "waivers": list(run.waivers),
        "outcomes": {str(o): n for o, n in sorted(run.counts().items())},
        "results": sha256(msgspec.json.encode(run, order="sorted")).hexdigest(),
    }


def verify(run: Run) -> tuple[Assessment, list[str]]:
    """Judge a run, and whether the suite and the plugin that are installed here are those that ran.

    Returns:
        The assessment, where what differs is a problem; and what could not be checked, a sentence each.
    """
    from engine_conformance.subject import ask, suite

    found, unchecked, here = assess(run), [], suite()
    problems = list(found.problems)
    if (run.suite.version, run.suite.digest) != (here.version, here.digest):
        problems.append(
            f"the suite that ran, {run.suite.version} ({run.suite.digest[:12]}), is not the one that is installed "
            f"here, {here.version} ({here.digest[:12]})"
        )
    try:
        subject = ask(run.subject.name)
    except EngineError as error:
        unchecked.append(f"whether the plugin is the one that ran: {str(error).splitlines()[0]}")
    else:
        if (subject.version, subject.digest) != (run.subject.version, run.subject.digest):
            problems.append(
                f"the plugin that ran, {run.subject.distribution} {run.subject.version} ({run.subject.digest[:12]}), "
                f"is not the one that is installed here, {subject.version} ({subject.digest[:12]})"
            )
    return (Assessment("", tuple(problems), ()) if problems else found), unchecked


def check(path: Path, made: dict[str, Any]) -> list[str]:
    """What a certificate says otherwise than the one that was made again, a sentence each.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        said = msgspec.json.decode(path.read_bytes(), type=dict)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} is no certificate: {error}\nremedy: name what engine conformance verify wrote"
        ) from error
    made = msgspec.json.decode(msgspec.json.encode(made))
    return [f"{path} says another {name}" for name in sorted({*said, *made}) if said.get(name) != made.get(name)]


def merge(runs: Sequence[Run]) -> Run:
    """One run from its shards.

    Raises:
        ConfigError: they are not the shards of one run: one is missing or doubled, or they differ in what was tested.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in ("subject", "suite", "software", "profile", "seed"):
            if getattr(run, name) != getattr(first, name):
                raise ConfigError(f"the results differ in their {name}\nremedy: run all shards with the same of each")
    shards = sorted(run.shard for run in runs)
    count = first.shard.partition("/")[2]
    if not count or shards != sorted(f"{i}/{count}" for i in range(1, int(count) + 1)):
        raise ConfigError(f"shards {', '.join(s or 'whole' for s in shards)}\nremedy: name each of 1/N to N/N once")
    return replace(
        first,
        shard="",
        isolated=all(run.isolated for run in runs),
        started=min(run.started for run in runs),
        seconds=sum(run.seconds for run in runs),
        waivers=tuple({w["id"]: w for run in runs for w in run.waivers}.values()),
        results=tuple(sorted((r for run in runs for r in run.results), key=lambda r: r.id)),
    )
