"""`engine conformance`: run the suite on a platform, and judge, compare and merge what it found."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from engine.errors import ConfigError
from engine.extensions.cli.text import fields, paragraph, table
from engine_conformance.subject import safe_path

_OPTIONS = ("profile", "report", "seed", "waivers", "driver")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of a run."""
    parser.usage = (
        "engine conformance [--platform NAME] [options] [pytest's options]\n"
        "       engine conformance {verify,compare,merge,ids} ..."
    )
    parser.epilog = "Options that are not listed go to pytest: -k WORD, -x, -q, paths. See docs/conformance.md."
    parser.add_argument("--platform", metavar="NAME", help="what to test; the platform that would run if not given")
    parser.add_argument("--profile", metavar="NAME", help="smoke (the default), ci, cert, or sim for a slow simulator")
    parser.add_argument("--report", metavar="DIR", help="write results.json, report.html and junit.xml")
    parser.add_argument("--seed", metavar="N", help="draw other inputs than every run does; 'random' explores")
    parser.add_argument("--shard", metavar="I/N", help="only the I-th of N parts of the cases")
    parser.add_argument("--waivers", metavar="FILE", help="cases that are known to fail, as TOML")
    parser.add_argument("--driver", metavar="VERSION", help="the driver's version, where it is not found")
    parser.add_argument("--no-isolate", action="store_true", help="run in one process: quicker, and a crash ends it")


def main(words: list[str]) -> int:
    """Run what the words say; the exit status: 0 for all well, 1 for a failure, 2 for a wrong request."""
    if words and (action := _ACTIONS.get(words[0])):
        return action(words[1:])
    parser = argparse.ArgumentParser("engine conformance", description=(__doc__ or "").strip(), allow_abbrev=False)
    add_arguments(parser)
    args, rest = parser.parse_known_args(words)
    return run(args, rest)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Run the suite with pytest, in a process that imports it afresh."""
    for needed in ("pytest", "hypothesis", "pytest_timeout"):
        importlib.import_module(needed)
    options = [f"--conformance-{name}={value}" for name in _OPTIONS if (value := getattr(args, name)) is not None]
    options += [f"--shard={args.shard}"] if args.shard else []
    options += [] if args.no_isolate else ["--conformance-isolate"]
    suite = ["--pyargs", "engine_conformance", f"--platform={args.platform or _platform()}", "-p", "no:cacheprovider"]
    process = subprocess.Popen([sys.executable, *safe_path(), "-m", "pytest", *suite, *options, *rest])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # pytest has it too, and writes what it knows
            continue


def _platform() -> str:
    from engine.plugins import select_platform

    return select_platform().plugin.name


def _verify(words: list[str]) -> int:
    parser = _parser("verify", "Judge a run again from its results, and write or check the certificate.")
    parser.add_argument("report", type=Path, metavar="REPORT", help="results.json, or the folder that has it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the certificate")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="check this certificate against the results")
    args = parser.parse_args(words)
    from engine_conformance.certificate import certificate, check, verify
    from engine_conformance.results import read, write

    run = read(args.report)
    found, unchecked = verify(run)
    made = certificate(run, found.level)
    problems = [*found.problems, *(check(args.certificate, made) if args.certificate else [])]
    about = {
        "platform": f"{run.subject.name}, {run.subject.distribution} {run.subject.version}",
        "devices": list(run.subject.devices),
        "profile": run.profile,
        "cases": ", ".join(f"{n} {outcome}" for outcome, n in sorted(run.counts().items())),
        "level": found.level or "none",
    }
    print(fields(about, ""))
    for title, told in (("wrong", problems), ("unchecked", unchecked), ("missing", found.missing[:3])):
        for sentence in told:
            print(paragraph(sentence, f"{title}: "))
    if problems:
        return 1
    if args.out:
        write(made, args.out)
        print(f"wrote {args.out}")
    return 0


def _compare(words: list[str]) -> int:
    parser = _parser("compare", "What changed between two runs; exit status 1 if something is worse.")
    parser.add_argument("before", type=Path, metavar="A", help="results.json, or the folder that has it")
    parser.add_argument("after", type=Path, metavar="B", help="of the later run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(words)
    from engine_conformance.compare import compare
    from engine_conformance.results import read

    changes = compare(read(args.before), read(args.after))
    if args.json:
        print(json.dumps([asdict(change) for change in changes], indent=2))
    elif changes:
        rows = [("worse" if c.regression else "", c.kind, c.what, c.before, c.after) for c in changes]
        print(table(("", "KIND", "WHAT", "BEFORE", "AFTER"), rows))
    else:
        print("nothing changed")
    return int(any(change.regression for change in changes))


def _merge(words: list[str]) -> int:
    parser = _parser("merge", "Put the results of a run's shards together.")
    parser.add_argument(
        "reports", type=Path, nargs="+", metavar="REPORT", help="results.json, or the folder that has it"
    )
    parser.add_argument("--report", type=Path, required=True, metavar="DIR", help="where the whole goes")
    args = parser.parse_args(words)
    from engine_conformance.certificate import merge
    from engine_conformance.page import write_report
    from engine_conformance.results import Outcome, read

    whole = merge([read(path) for path in args.reports])
    write_report(whole, args.report)
    print(f"wrote {args.report / 'results.json'}, junit.xml and report.html: {len(whole.results)} cases")
    return int(whole.counts()[Outcome.FAIL] > 0)


def _ids(words: list[str]) -> int:
    parser = _parser("ids", "The cases that a run has to have, and which every platform must pass.")
    parser.add_argument("--profile", default="ci", metavar="NAME", help="of this profile (default: ci)")
    parser.add_argument("--write", action="store_true", help="make the list anew from the suite, after adding a case")
    args = parser.parse_args(words)
    from engine_conformance.catalogue import LISTING, PROFILES, listing

    if args.profile not in PROFILES:
        raise ConfigError(f"there is no profile {args.profile!r}\nremedy: choose one of {', '.join(PROFILES)}")
    if args.write:
        LISTING.write_bytes(collect())
        print(f"wrote {LISTING}")
        return 0
    print(
        table(
            ("ID", "ASKED"), [(e.id, "MUST" if e.must else e.capability) for e in listing().of(args.profile).values()]
        )
    )
    return 0


def collect() -> bytes:
    """The list of cases as the suite's modules have them now; no platform is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.json"
        command = [
            sys.executable,
            *safe_path(),
            "-m",
            "pytest",
            "--pyargs",
            "engine_conformance",
            "--collect-only",
            "-q",
        ]
        command += ["--platform=any", "--conformance-isolate", f"--conformance-ids={path}", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise ConfigError(f"the suite cannot be collected\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return path.read_bytes()


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"engine conformance {name}", description=about, allow_abbrev=False)


_ACTIONS = {"verify": _verify, "compare": _compare, "merge": _merge, "ids": _ids}
