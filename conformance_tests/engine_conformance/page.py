"""The report as a page that stands alone: no other file, no network; readable without scripts, on a phone, in print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from engine_conformance.certificate import LEVELS, Assessment, assess
from engine_conformance.junit import write_junit
from engine_conformance.results import Outcome, Requirement, Result, Run, worst, write

TIERS = {
    "L0": "Device",
    "L1": "Operations and sampler",
    "L2": "Attention",
    "L3": "KV cache",
    "L4": "Communicator",
    "L5": "Graphs",
    "L6": "Engine, end to end",
    "L7": "Robustness",
    "L8": "Performance",
}
"""What each tier is about."""

_GLYPHS = {
    Outcome.PASS: "",
    Outcome.FAIL: "×",
    Outcome.REJECTED_OK: "–",
    Outcome.WAIVED: "w",
    Outcome.QUARANTINED: "q",
    Outcome.INCONCLUSIVE: "?",
}
_MEANINGS = {
    Outcome.PASS: "",
    Outcome.FAIL: "",
    Outcome.REJECTED_OK: "refused, as not declared",
    Outcome.WAIVED: "known to fail",
    Outcome.QUARANTINED: "known to be unsteady",
    Outcome.INCONCLUSIVE: "undecided on this machine",
}
_STEPS = {
    "Core": "what every platform must do",
    "Serving": "and graph capture",
    "Full": "and all that it declares",
}
_REACH = 1.25
"""Right end of the error chart, in bounds; longer bars end there."""

_ROW = 46

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<header class="head">
<div><p class="eyebrow">engine conformance</p><h1>$name</h1></div>
<p class="soft">$devices<br>$distribution</p>
</header>
<main>
$body
</main>
<footer>$footer</footer>
<script>
$script</script>
</body>
</html>
""")

_SCRIPT = """\
const rows = [...document.querySelectorAll('.cases tbody tr')];
const box = document.getElementById('filter'), count = document.getElementById('count');
const marks = [...document.querySelectorAll('.tools [type=checkbox]')];
document.querySelector('.tools').hidden = false;
function show() {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const wanted = new Set(marks.filter(m => m.checked).map(m => m.value));
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !wanted.has(row.dataset.outcome) || !words.every(w => text.includes(w));
    shown += !row.hidden;
  }
  count.textContent = shown + ' of ' + rows.length;
}
box.addEventListener('input', show);
marks.forEach(m => m.addEventListener('change', show));
addEventListener('hashchange', () => { box.value = ''; marks.forEach(m => m.checked = true); show(); });
"""


def write_report(run: Run, folder: Path) -> None:
    """Write ``results.json``, ``junit.xml`` and ``report.html``."""
    write(run, folder / "results.json")
    write_junit(run, folder / "junit.xml")
    (folder / "report.html").write_text(page(run), encoding="utf-8")


def page(run: Run) -> str:
    """The page, as HTML."""
    found, subject = assess(run), run.subject
    parts = [
        _verdict(run, found),
        _tiles(run),
        _outcomes(run),
        _errors(run.results),
        _matrix(run.results),
        _failures(run.results),
        _waivers(run),
        _cases(run.results),
        _made_of(run),
    ]
    return _PAGE.substitute(
        title=escape(f"{subject.name}: engine conformance"),
        style=files("engine_conformance").joinpath("page.css").read_text(),
        name=escape(subject.name),
        devices=escape(_counted(subject.devices) or subject.device_type),
        distribution=escape(f"{subject.distribution} {subject.version}"),
        body="\n".join(filter(None, parts)),
        footer=f"Made by the conformance suite {escape(run.suite.version)} on {escape(run.started[:10])}. Tolerances "
        "are derived from the number formats, not chosen; what is not declared has to be refused. The same data lies "
        "in results.json, and <code>engine conformance verify</code> judges it again.",
        script=_SCRIPT,
    )


def _counted(names: Sequence[str]) -> str:
    counted = {name: names.count(name) for name in names}
    return ", ".join(f"{n} × {name}" if n > 1 else name for name, n in counted.items())


def _verdict(run: Run, found: Assessment) -> str:
    failed = run.counts()[Outcome.FAIL]
    if found.level:
        kind, word = Outcome.PASS, f"✓ {found.level}"
        told = f"{found.level} conformance: every case of profile {run.profile} is accounted for, and none fails."
    elif failed:
        kind, word = Outcome.FAIL, "× Fails"
        told = f"{failed} of {len(run.results)} cases fail{'s' if failed == 1 else ''}."
    else:
        kind, word = Outcome.INCONCLUSIVE, "Incomplete"
        told = "No case fails, and the run does not decide a level."
    reasons = found.problems or found.missing
    shown = "".join(f"<li>{escape(r)}</li>" for r in reasons[:4])
    shown += f"<li>and {len(reasons) - 4} more</li>" if len(reasons) > 4 else ""
    got = LEVELS.index(found.level) if found.level else -1
    steps = "".join(
        f"<li{' class=got' if i <= got else ''}><b>{level}{' ✓' if i <= got else ''}</b>{_STEPS[level]}</li>"
        for i, level in enumerate(LEVELS)
    )
    return (
        f'<div class="verdict {kind}"><div class="word">{word}</div><div><p>{escape(told)}</p>'
        f"{f'<ul class=small>{shown}</ul>' if shown else ''}</div>"
        f'<ul class="steps" aria-label="levels">{steps}</ul></div>'
    )


def _tiles(run: Run) -> str:
    counts, ratios, mutation = run.counts(), worst(run.results), run.suite.mutation
    held = sum(counts[o] for o in (Outcome.PASS, Outcome.REJECTED_OK))
    tiles = [(f"{held} of {len(run.results)}", "cases hold")]
    if ratios:
        largest = max(ratios.values())
        tiles.append((_ratio(largest), "of its bound: the largest error"))
    if {"killed", "faulty"} <= mutation.keys():
        tiles.append((f"{mutation['killed']} of {mutation['faulty']}", "faulty backends that the suite catches"))
    tiles.append((_time(run.seconds), f"profile {run.profile}, seed {run.seed}"))
    cells = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles)
    return f'<div class="tiles" style="grid-template-columns:repeat(auto-fit,minmax(150px,1fr))">{cells}</div>'


def _outcomes(run: Run) -> str:
    counts = {o: n for o in Outcome if (n := run.counts()[o])}
    bar = "".join(f'<i class="{o}" style="flex:{n}"></i>' for o, n in counts.items())
    legend = "".join(
        f"<li>{_cell(o)}<span><b>{n}</b> {o} <span class=soft>{_MEANINGS[o]}</span></span></li>"
        for o, n in counts.items()
    )
    return (
        f'<section><h2>Outcomes</h2><div class="bar" aria-hidden="true">{bar}</div>'
        f'<ul class="legend">{legend}</ul></section>'
    )


def _errors(results: Sequence[Result]) -> str:
    """A bar for each kind of result: its worst error, with a tick for each case, against the bound."""
    kinds = worst(results)
    if not kinds:
        return ""
    height = _ROW * len(kinds) + 26
    rows = []
    for index, (kind, ratio) in enumerate(sorted(kinds.items(), key=lambda item: -item[1])):
        y, state = index * _ROW, "FAIL" if ratio > 1 else "PASS"
        ticks = sorted({r.errors[kind] for r in results if kind in r.errors and r.errors[kind] < min(ratio, _REACH)})
        rows.append(
            f'<g class="{state}"><text x="0" y="{y + 15}">{escape(kind)}</text>'
            f'<text x="100%" y="{y + 15}" text-anchor="end" class="value" font-weight="600">{_ratio(ratio)}</text>'
            f'<rect class="track" x="0" y="{y + 23}" width="100%" height="12" rx="6"/>'
            f'<rect class="value" x="0" y="{y + 23}" width="{_x(ratio)}" height="12" rx="6"/>'
            + "".join(f'<line class="tick" x1="{_x(t)}" x2="{_x(t)}" y1="{y + 23}" y2="{y + 35}"/>' for t in ticks)
            + "</g>"
        )
    end = _ROW * len(kinds)
    axis = "".join(
        f'<text class="axis" x="{_x(at)}" y="{end + 18}" text-anchor="{anchor}">{label}</text>'
        for at, label, anchor in ((0, "0", "start"), (0.5, "0.5", "middle"), (1, "bound", "middle"))
    )
    told = "; ".join(f"{kind}: {_ratio(ratio)}" for kind, ratio in kinds.items())
    return (
        "<section><h2>Errors against their bound</h2>"
        '<p class="soft small">The largest error of each kind of result, in units of the largest that a right backend '
        "can make. Ticks are single cases.</p>"
        f'<svg class="chart" height="{height}" role="img" aria-label="{escape(told)}">{"".join(rows)}'
        f'<line class="bound" x1="{_x(1)}" x2="{_x(1)}" y1="18" y2="{end + 4}"/>{axis}</svg></section>'
    )


def _x(ratio: float) -> str:
    return f"{min(ratio / _REACH, 1) * 100:.2f}%"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else "over 100"


def _matrix(results: Sequence[Result]) -> str:
    rows = []
    for tier, of_tier in groupby(sorted(results, key=lambda r: r.tier), key=lambda r: r.tier):
        rows.append(f'<tr class="tier"><th colspan="3" scope="rowgroup">{tier} {escape(TIERS.get(tier, ""))}</th></tr>')
        grouped: dict[str, list[Result]] = {}
        for result in of_tier:
            grouped.setdefault(result.rejected or result.capability, []).append(result)
        rows += [_capability(name, group) for name, group in grouped.items()]
    return (
        "<section><h2>Capabilities</h2>"
        '<p class="soft small">A square is a case. Every platform must pass what is MUST; what it declares has to '
        "work, and what it does not declare has to be refused.</p>"
        '<table class="matrix"><thead><tr><th scope="col">capability</th><th scope="col">asked</th>'
        f'<th scope="col">cases</th></tr></thead><tbody>{"".join(rows)}</tbody></table></section>'
    )


def _capability(name: str, results: Sequence[Result]) -> str:
    asked = [q for q in Requirement if any(r.requirement is q for r in results)]
    counts = {o: n for o in Outcome if (n := sum(r.outcome is o for r in results))}
    told = ", ".join(f"{n} {o}" for o, n in counts.items())
    cells = "".join(_cell(r.outcome, r.id) for r in results)
    return (
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>'
        f'<td class="soft small">{" and ".join(q.lower() if q != "MUST" else q for q in asked)}</td>'
        f'<td><div class="what"><div class="strip">{cells}</div><div class="soft small">{told}</div></div></td></tr>'
    )


def _cell(outcome: Outcome, case: str = "") -> str:
    glyph = _GLYPHS[outcome]
    if not case:
        return f'<span class="cell {outcome}" aria-hidden="true">{glyph}</span>'
    label = escape(f"{case}: {outcome}", quote=True)
    return f'<a class="cell {outcome}" href="#{_anchor(case)}" title="{label}" aria-label="{label}">{glyph}</a>'


def _anchor(case: str) -> str:
    return escape("".join(c if c.isalnum() or c in "._-" else "-" for c in case), quote=True)


def _failures(results: Sequence[Result]) -> str:
    failed = [r for r in results if r.outcome is Outcome.FAIL]
    if not failed:
        return ""
    shown = "".join(
        f"<details{' open' if len(failed) <= 3 else ''}><summary><code>{escape(r.id)}</code> "
        f'<span class="soft small">{escape(_gist(r.message))}</span></summary><pre>{escape(r.message)}</pre></details>'
        for r in failed
    )
    return f"<section><h2>Failures</h2>{shown}</section>"


def _gist(message: str) -> str:
    """The line of a traceback that says what was wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (said or lines or [""])[0][:160]


def _waivers(run: Run) -> str:
    if not run.waivers:
        return ""
    outcomes = {r.id: r.outcome for r in run.results}
    shown = "".join(
        f"<details open><summary><code>{escape(w['id'])}</code> {_tag(outcomes.get(w['id'], Outcome.FAIL))}</summary>"
        f'<p class="small">{escape(w["reason"])} <a href="{escape(w["issue"], quote=True)}">{escape(w["issue"])}</a> '
        f'<span class="soft">until {escape(w["expires"])}</span></p></details>'
        for w in run.waivers
    )
    return f"<section><h2>Waivers</h2>{shown}</section>"


def _tag(outcome: Outcome) -> str:
    return f'<span class="tag {outcome}">{outcome}</span>'


def _cases(results: Sequence[Result]) -> str:
    present = [o for o in Outcome if any(r.outcome is o for r in results)]
    marks = "".join(f'<label class="{o}"><input type="checkbox" value="{o}" checked> {o}</label>' for o in present)
    return (
        f'<section><h2>All cases</h2><div class="tools" hidden><input type="search" id="filter" placeholder="Filter" '
        f'aria-label="filter the cases">{marks}<span class="soft small" id="count" role="status"></span></div>'
        '<table class="cases"><thead><tr><th scope="col">case</th><th scope="col" class="wide">asked</th>'
        '<th scope="col">outcome</th><th scope="col" class="n wide">error / bound</th>'
        '<th scope="col" class="n">seconds</th>'
        f"</tr></thead><tbody>{''.join(map(_row, results))}</tbody></table></section>"
    )


def _row(result: Result) -> str:
    error = "" if result.error is None else _ratio(result.error)
    told = result.outcome not in (Outcome.PASS, Outcome.FAIL)
    why = f'<div class="why">{escape(_gist(result.message))}</div>' if told else ""
    return (
        f'<tr id="{_anchor(result.id)}" data-outcome="{result.outcome}">'
        f'<th scope="row"><code>{escape(result.id)}</code>{why}</th>'
        f'<td class="soft wide">{result.requirement}</td><td>{_tag(result.outcome)}</td>'
        f'<td class="n wide">{error}</td><td class="n">{result.seconds:.1f}</td></tr>'
    )


def _made_of(run: Run) -> str:
    subject, suite = run.subject, run.suite
    versions = {
        "plugin": f"{subject.distribution} {subject.version}",
        "its files": subject.digest[:16],
        "contract": f"{subject.contract}; the suite's is {suite.contract}",
        "suite": f"{suite.version}, {suite.digest[:16]}",
        **run.software,
        "driver": subject.driver or "not known",
        "ran": f"{run.started} (UTC), {'isolated' if run.isolated else 'in one process'}",
    }
    if {"passed", "correct"} <= suite.mutation.keys():
        versions["calibration"] = (
            f"{suite.mutation.get('killed')} of {suite.mutation.get('faulty')} faulty backends caught, "
            f"{suite.mutation['passed']} of {suite.mutation['correct']} correct ones passed"
        )
    declared = {name.replace("_", " "): _plain(value) for name, value in subject.capabilities.items()}
    return (
        f'<div class="two"><section><h2>Versions</h2>{_list(versions.items())}</section>'
        f"<section><h2>Declared</h2>{_list(declared.items())}</section></div>"
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


def _list(items: Iterable[tuple[str, str]]) -> str:
    def each() -> Iterator[str]:
        for name, value in items:
            yield f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"

    return f"<dl>{''.join(each())}</dl>"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
