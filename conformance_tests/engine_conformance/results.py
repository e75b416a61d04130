"""What a run found, as data that is written to ``results.json`` and read back: a result for each case, and the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError

SCHEMA = 1
"""The version of the files that are written."""

MOST = 1e9
"""The largest error over bound that is written; it stands for all that are larger, infinite and not a number too."""


class Outcome(StrEnum):
    """What came of a case.

    A skip is none of them: it counts as FAIL.
    """

    PASS = "PASS"
    """It holds."""
    FAIL = "FAIL"
    """It does not, or the case hung, crashed, was skipped or was not run."""
    REJECTED_OK = "REJECTED_OK"
    """The platform does not declare the capability, and refused it as the contract asks."""
    WAIVED = "WAIVED"
    """It fails, and a waiver says that it is known to."""
    QUARANTINED = "QUARANTINED"
    """A waiver says that it fails at times; it counts neither way."""
    INCONCLUSIVE = "INCONCLUSIVE"
    """It ran, and this machine cannot decide it."""


class Requirement(StrEnum):
    """Whether a platform has to pass a case."""

    MUST = "MUST"
    """Every platform has to; it can be neither declared off nor waived."""
    DECLARED = "DECLARED"
    """This one has to, since it declares the capability."""
    UNDECLARED = "UNDECLARED"
    """This one has to refuse, since it does not."""


@dataclass(frozen=True)
class Result:
    """What came of one case.

    Attributes:
        id: the case's stable name.
        tier: ``"L0"`` to ``"L8"``.
        capability: what the case is about: a name of `Capabilities`, or an area of the suite.
        requirement: of this platform.
        outcome: see `Outcome`.
        error: the largest error over its bound, at most `MOST`; None where nothing was measured.
        errors: the same by kind of result.
        seed: of the run that drew the inputs.
        seconds: setup, call and teardown.
        message: why it is not PASS; the traceback of a failure.
        rejected: what was refused, where something was.
    """

    id: str
    tier: str
    capability: str
    requirement: Requirement
    outcome: Outcome
    error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    seconds: float = 0.0
    message: str = ""
    rejected: str = ""


@dataclass(frozen=True)
class Subject:
    """What was tested.

    Attributes:
        name: what ``--platform`` selects.
        contract: the contract's version that it was written for.
        distribution, version: who has it.
        digest: SHA-256 of its packages' files.
        device_type: torch's.
        devices: their names, by index.
        driver: the version of the device's driver, or nothing where it is not known.
        capabilities: `Capabilities.to_dict`.
    """

    name: str
    contract: str
    distribution: str
    version: str
    digest: str
    device_type: str
    devices: tuple[str, ...]
    driver: str
    capabilities: dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """What tested it.

    Attributes:
        version: of the distribution that the suite is part of.
        digest: SHA-256 of the suite's files.
        contract: the contract's version that it asks for.
        mutation: what is known of faulty backends that the suite catches; empty where nothing is.
    """

    version: str
    digest: str
    contract: str
    mutation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run of the suite on one platform.

    Attributes:
        subject, suite: what was tested, and by what.
        software: versions: torch, transformers, python, system.
        profile: ``"smoke"``, ``"ci"``, ``"cert"`` or ``"sim"``.
        seed: 0 for the inputs that every run draws.
        shard: ``"2/4"``, or nothing.
        isolated: cases ran in processes of their own.
        started: UTC, ISO 8601.
        seconds: from the beginning to the end.
        waivers: those that were applied, as they were written.
        results: in the order in which they ran.
        schema: of this file.
    """

    subject: Subject
    suite: Suite
    software: dict[str, str]
    profile: str
    seed: int
    shard: str
    isolated: bool
    started: str
    seconds: float
    results: tuple[Result, ...]
    waivers: tuple[dict[str, str], ...] = ()
    schema: int = SCHEMA

    def counts(self) -> Counter[Outcome]:
        """How many cases came out how."""
        return Counter(result.outcome for result in self.results)


def worst(results: Iterable[Result]) -> dict[str, float]:
    """The largest error over its bound of each kind of result, by name."""
    found: dict[str, float] = {}
    for result in results:
        for kind, ratio in result.errors.items():
            found[kind] = max(found.get(kind, 0.0), ratio)
    return dict(sorted(found.items()))


def declares(capabilities: Mapping[str, Any], name: str) -> bool | None:
    """Whether a platform declares what a case is about; None if that is nothing that is declared.

    Args:
        capabilities: `Capabilities.to_dict`.
        name: an attention feature (``"sinks"``), a field (``"collectives"``, ``"graphs"``, ``"nan_safe"``), or a value
            of a field (``"graphs.full"``, ``"kv_dtypes.float8_e4m3fn"``).
    """
    from engine_sdk import ATTENTION_FEATURES  # torch is only needed by who asks

    if name in ATTENTION_FEATURES:
        name = f"attention.{name}"
    label, _, value = name.partition(".")
    if label not in capabilities:
        return None
    declared = capabilities[label]
    if value:
        return value in declared if isinstance(declared, list | tuple) else declared == value
    return bool(declared) and declared != "none"


def write(value: object, path: Path) -> None:
    """Write a dataclass as JSON, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def read(path: Path) -> Run:
    """A run from ``results.json``, or from the folder that has it.

    Raises:
        ConfigError: it is absent, or not such a file.
    """
    path = path / "results.json" if path.is_dir() else path
    remedy = "remedy: name the results.json, or the folder, that --conformance-report wrote"
    try:
        run = msgspec.json.decode(path.read_bytes(), type=Run)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}\n{remedy}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} does not hold the results of a run: {error}\n{remedy}") from error
    if run.schema != SCHEMA:
        raise ConfigError(
            f"{path} has schema {run.schema}, and this engine reads {SCHEMA}\nremedy: use the engine that wrote it"
        )
    return run
