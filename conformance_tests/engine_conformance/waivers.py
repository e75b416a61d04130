"""What a vendor knows to fail, said in a file of the vendor's repository: exactly, with a reason, and for a while.

    [[waiver]]
    id = "L2.attention.agrees_with_reference[alibi]"
    kind = "xfail"            # or "quarantine": fails at times
    device = "NPU-2*"         # a pattern of device names
    driver = ">=1.2,<1.5"     # versions, or "*"
    issue = "https://github.com/npu/engine-plugin-npu/issues/12"
    reason = "slopes are rounded to bf16"
    expires = 2026-12-01      # at most 90 days ahead

A MUST case cannot be waived. A waiver that expired, that names no case, or whose case passes, fails the run.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import date, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion

from engine.errors import ConfigError
from engine_conformance.catalogue import Entry
from engine_conformance.results import Subject

LONGEST = timedelta(days=90)
KINDS = ("xfail", "quarantine")


@dataclass(frozen=True)
class Waiver:
    """One case that is known to fail; see the module."""

    id: str
    kind: str
    device: str
    driver: str
    issue: str
    reason: str
    expires: date

    def applies(self, subject: Subject) -> bool:
        """Whether it is about these devices and this driver."""
        if not any(fnmatchcase(name, self.device) for name in subject.devices or ("",)):
            return False
        if self.driver == "*":
            return True
        try:
            return SpecifierSet(self.driver).contains(subject.driver.split()[-1], prereleases=True)
        except (IndexError, InvalidVersion):  # the driver is not known, or its version not comparable
            return False

    def plain(self) -> dict[str, str]:
        """As it is written to the results."""
        return {name: str(value) for name, value in asdict(self).items()}


def load(path: Path, today: date | None = None) -> list[Waiver]:
    """The waivers of a file, each sound in itself.

    Raises:
        ConfigError: the file cannot be read, or a waiver is incomplete, doubled, expired, or too long.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}\nremedy: see 'Waivers' in docs/conformance.md") from error
    tables = document.pop("waiver", [])
    if document or not isinstance(tables, list):
        raise ConfigError(
            f"{path}: unknown: {', '.join(document) or 'waiver'}\nremedy: begin each waiver with [[waiver]]"
        )
    found = [_waiver(path, table, today or date.today()) for table in tables]
    for index, one in enumerate(found):
        if any(one.id == other.id and one.device == other.device for other in found[:index]):
            raise _wrong(path, one.id, "is waived twice for the same devices", "keep one of them")
    return found


def _waiver(path: Path, table: Any, today: date) -> Waiver:
    names = [field.name for field in fields(Waiver)]
    named = table.get("id", "a waiver") if isinstance(table, dict) else "a waiver"
    if not isinstance(table, dict) or set(table) != set(names):
        wrong = sorted(set(names) ^ set(table)) if isinstance(table, dict) else names
        raise _wrong(path, named, f"lacks or does not know {', '.join(wrong)}", f"write exactly {', '.join(names)}")
    expires = table["expires"]
    if type(expires) is not date:
        raise _wrong(path, named, f"expires = {expires!r} is no date", "write it without quotes: 2026-12-01")
    if blank := [n for n in names if n != "expires" and not (isinstance(table[n], str) and table[n].strip())]:
        raise _wrong(path, named, f"{', '.join(blank)} must be a text", "fill it in")
    if table["kind"] not in KINDS:
        raise _wrong(path, named, f"kind = {table['kind']!r}", f"choose one of {', '.join(KINDS)}")
    if not table["issue"].startswith(("https://", "http://")):
        raise _wrong(path, named, f"issue = {table['issue']!r} is no link", "open an issue and link to it")
    if expires < today:
        raise _wrong(path, named, f"expired on {expires}", "mend the case, or renew the waiver with its issue")
    if expires > today + LONGEST:
        raise _wrong(path, named, f"expires on {expires}", f"choose {today + LONGEST} or before, 90 days from today")
    try:
        SpecifierSet("" if table["driver"] == "*" else table["driver"])
    except InvalidSpecifier as error:
        raise _wrong(
            path, named, f"driver = {table['driver']!r}", 'write versions as in ">=1.2,<1.5", or "*"'
        ) from error
    return Waiver(**table)


def select(waivers: Iterable[Waiver], entries: Mapping[str, Entry], subject: Subject) -> dict[str, Waiver]:
    """Those that apply to this run, by case.

    Args:
        waivers: of the file.
        entries: every case of the profile, chosen or not.
        subject: what is tested.

    Raises:
        ConfigError: one names a case that does not exist, or that is MUST.
    """
    chosen = {}
    for waiver in waivers:
        if waiver.id not in entries:
            raise ConfigError(f"waiver of {waiver.id}: there is no such case\nremedy: take its id from results.json")
        if entries[waiver.id].must:
            raise ConfigError(f"waiver of {waiver.id}: every platform must pass it\nremedy: mend the platform")
        if waiver.applies(subject):
            chosen[waiver.id] = waiver
    return chosen


def _wrong(path: Path, named: str, what: str, remedy: str) -> ConfigError:
    return ConfigError(f"{path}: waiver of {named}: {what}\nremedy: {remedy}")
