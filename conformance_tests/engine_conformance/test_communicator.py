"""L4: collectives between processes. With fewer devices than ranks it runs on one, and says that it decides little."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine_conformance.ranks import CHECKS, run_ranks
from engine_sdk import Capabilities, GroupSpec, Platform, UnsupportedCapability

_RANKS = 2
_REQUIRED = {"all_reduce", "all_gather"}


@pytest.fixture(scope="session")
def failures(conformance_platform: Platform, capabilities: Capabilities) -> dict[str, str]:
    """What went wrong, by check; the processes are started once for all of them."""
    if not capabilities.collectives:
        return {}
    return run_ranks(conformance_platform.name, CHECKS, _num_ranks(conformance_platform))


def _num_ranks(platform: Platform) -> int:
    probe = platform.probe()
    return min(_RANKS, len(probe.devices)) if probe.accelerator else _RANKS


@pytest.mark.parametrize("name", CHECKS)
def test_collectives(
    conformance_platform: Platform,
    capabilities: Capabilities,
    failures: dict[str, str],
    name: str,
    record_property: Callable[[str, object], None],
) -> None:
    """One check on all ranks; a platform without collectives refuses to make a communicator."""
    if not capabilities.collectives:
        with pytest.raises(UnsupportedCapability):
            conformance_platform.communicator(GroupSpec("tp", (0, 1), 0))
        return
    if (num_ranks := _num_ranks(conformance_platform)) < _RANKS:
        record_property("inconclusive", f"{num_ranks} device: nothing went from one rank to another")
    assert "the processes" not in failures, failures["the processes"]
    assert name not in failures, failures[name]


def test_required_collectives(capabilities: Capabilities) -> None:
    """Who offers collectives offers all-reduce and all-gather."""
    assert not capabilities.collectives or capabilities.collectives >= _REQUIRED
