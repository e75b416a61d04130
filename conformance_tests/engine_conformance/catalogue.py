"""What each case is: its stable id, its tier, the capability that it is about, and who has to pass it.

A module's docstring begins with its tier, ``"L2: paged attention"``. An id is ``TIER.AREA.NAME[PARAMETERS]``: the area
is the module's name and the name the function's, both without ``test_``. A platform's name, folders and the order of
parameters' values are no part of it. ``@pytest.mark.conformance(...)``, on a module, a class or a function, replaces
what is derived:

    tier          "L2"
    area          "attention", where a module was renamed
    capability    "sinks", "graphs.full", or any word
    must          whether every platform has to pass it
    profiles      in which it runs; all by default
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.errors import ConfigError
from engine_conformance.results import Requirement, declares

PROFILES = {
    "smoke": 300,
    "ci": 1200,
    "cert": 7200,
    "sim": 3600,
}
"""Name to the seconds that one case may take. They are sums of examples; see `engine_conformance.cases.SCALES`."""

LISTING = Path(__file__).with_name("must_pass.json")
"""The ids that a run has to have, by profile; ``engine conformance ids --write`` makes it."""

_OPTIONAL_TIERS = {"L5": "graphs", "L8": "performance"}
_OPTIONAL_AREAS = {"communicator": "collectives", "architectures": "architectures"}
"""What of the suite is about a capability as a whole; all else is MUST unless its parameters name a feature."""

_SAMPLE = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "gpt2", "deepseek_v3")
_MUST_ARCHITECTURES = _SAMPLE[:4]
"""Causal, grouped-query attention and nothing else: every platform runs them. A slow simulator runs the sample only."""

_LONGEST = 60


@dataclass(frozen=True)
class Entry:
    """A case of the suite, on whichever platform.

    Attributes:
        id: stable and unique.
        tier: ``"L0"`` to ``"L8"``.
        capability: what it is about.
        must: every platform has to pass it.
        profiles: in which it runs.
    """

    id: str
    tier: str
    capability: str
    must: bool
    profiles: tuple[str, ...]

    def requirement(self, capabilities: Mapping[str, Any]) -> Requirement:
        """Whether a platform that declares `capabilities`, as ``to_dict`` gives them, has to pass."""
        if self.must:
            return Requirement.MUST
        return Requirement.UNDECLARED if declares(capabilities, self.capability) is False else Requirement.DECLARED

    def shard(self, count: int) -> int:
        """Which of `count` shards runs it, from 1; the same on every machine."""
        return int.from_bytes(sha256(self.id.encode()).digest()[:8]) % count + 1


_ENTRY = pytest.StashKey[Entry | None]()


def entry_of(item: pytest.Item) -> Entry | None:
    """The entry of a collected test; None for a test that is no case of a suite."""
    if _ENTRY not in item.stash:
        ours = item.path.is_relative_to(Path(__file__).parent)
        marked = item.get_closest_marker("conformance") is not None
        is_case = (ours or marked) and "conformance_platform" in getattr(item, "fixturenames", ())
        item.stash[_ENTRY] = _derive(item) if is_case else None
    return item.stash[_ENTRY]


def _derive(item: pytest.Item) -> Entry:
    said: dict[str, Any] = {}
    for marker in item.iter_markers("conformance"):  # the closest first
        said = {**marker.kwargs, **said}
    area = said.get("area") or item.path.stem.removeprefix("test_")
    tier = said.get("tier") or _tier(getattr(item, "module", None))
    if not tier:
        raise pytest.UsageError(
            f'{item.nodeid}: its tier is not known; begin the module\'s docstring with one, as in "L2: attention"'
        )
    parameters = _parameters(item)
    name = getattr(item, "originalname", item.name).removeprefix("test_")
    words = [value for value in parameters.values() if isinstance(value, str)]
    feature = next((w for w in words if _is_feature(w)), "")
    optional = feature or _OPTIONAL_TIERS.get(tier) or _OPTIONAL_AREAS.get(area, "")
    everywhere = area != "architectures" or bool(set(words) & set(_SAMPLE))
    return Entry(
        id=f"{tier}.{area}.{name}" + _brackets(item, parameters),
        tier=tier,
        capability=said.get("capability") or optional or area,
        must=said.get(
            "must",
            not (optional or said.get("capability"))
            or (area == "architectures" and bool(set(words) & set(_MUST_ARCHITECTURES))),
        ),
        profiles=tuple(said.get("profiles") or (p for p in PROFILES if everywhere or p != "sim")),
    )


def _tier(module: object) -> str:
    found = re.match(r"(L\d)\b", getattr(module, "__doc__", None) or "")
    return found[1] if found else ""


def _is_feature(word: str) -> bool:
    from engine_sdk import ATTENTION_FEATURES

    return word in ATTENTION_FEATURES


def _parameters(item: pytest.Item) -> dict[str, object]:
    call = getattr(item, "callspec", None)
    return {k: v for k, v in call.params.items() if k != "conformance_platform"} if call else {}


def _brackets(item: pytest.Item, parameters: Mapping[str, object]) -> str:
    """The parameters' values where they have names of their own, else what pytest calls them."""
    if not parameters:
        return ""
    names = [_name(value) for value in parameters.values()]
    if all(names) and sum(map(len, names)) <= _LONGEST:
        return f"[{'-'.join(names)}]"
    call = item.callspec  # type: ignore[attr-defined]
    platform = call.params["conformance_platform"]
    return f"[{call.id.removeprefix(f'{platform}-')}]"


def _name(value: object) -> str:
    if isinstance(value, tuple | list) and value:
        parts = [_name(part) for part in value]
        return "x".join(parts) if all(parts) else ""
    if isinstance(value, str | int | float) or value is None:
        return str(value)
    if _is_dtype(value):
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", "").strip("<>")


def _is_dtype(value: object) -> bool:
    return type(value).__module__ == "torch" and type(value).__name__ == "dtype"


def check_unique(items: Iterable[pytest.Item]) -> None:
    """Raise `pytest.UsageError` where two cases of one platform have the same id."""
    seen: dict[tuple[str, str], str] = {}
    for item in items:
        if found := entry_of(item):
            key = (found.id, item.callspec.params["conformance_platform"])  # type: ignore[attr-defined]
            first = seen.setdefault(key, item.nodeid)
            if first != item.nodeid:
                raise pytest.UsageError(f"{first} and {item.nodeid} are both case {found.id}: give one another name")


@dataclass(frozen=True)
class Listing:
    """The cases that there are.

    Attributes:
        transformers: the version of Transformers whose architectures are listed.
        cases: by id.
    """

    transformers: str
    cases: tuple[Entry, ...]

    def of(self, profile: str) -> dict[str, Entry]:
        """The cases of a profile, by id."""
        return {entry.id: entry for entry in self.cases if profile in entry.profiles}


def listing() -> Listing:
    """The checked-in list.

    Raises:
        ConfigError: it is missing, or damaged.
    """
    try:
        return msgspec.json.decode(LISTING.read_bytes(), type=Listing)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{LISTING}: {error}\nremedy: install the engine again: pip install -U engine") from error


def write_listing(entries: Iterable[Entry], transformers: str, path: Path) -> None:
    """Write a list, a line for each case in the order of ids."""
    lines = [msgspec.json.encode(entry).decode() for entry in sorted(entries, key=lambda entry: entry.id)]
    head = f'{{"transformers": {msgspec.json.encode(transformers).decode()}, "cases": [\n'
    path.write_text(head + ",\n".join(lines) + "\n]}\n")
