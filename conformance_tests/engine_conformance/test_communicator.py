"""L4: collectives between processes. With fewer devices than ranks it runs on one, and says that it decides little."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine_conformance.ranks import CHECKS, run_ranks
from engine_sdk import COLLECTIVES, Capabilities, GroupSpec, Platform, UnsupportedCapability

_RANKS = 3
"""With two, a sum has one order only."""

_REQUIRED = {"all_reduce", "all_gather"}


@pytest.fixture(scope="session")
def failures(conformance_platform: Platform, capabilities: Capabilities) -> dict[str, str]:
    """What went wrong, by check; the processes are started once for all of them."""
    if not capabilities.collectives:
        return {}
    checks = {name: check for name, (check, needs) in CHECKS.items() if capabilities.collectives >= set(needs)}
    return run_ranks(conformance_platform.name, checks, _num_ranks(conformance_platform))


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
        record_property("rejected", "collectives")
        return
    if missing := set(CHECKS[name][1]) - capabilities.collectives:
        record_property("rejected", f"collectives.{min(missing)}")
        return
    if (num_ranks := _num_ranks(conformance_platform)) < 2:
        record_property("inconclusive", f"{num_ranks} device: nothing went from one rank to another")
    assert "the processes" not in failures, failures["the processes"]
    assert name not in failures, failures[name]


def test_required_collectives(capabilities: Capabilities, conformance_platform: Platform) -> None:
    """Who offers collectives offers all-reduce and all-gather; the names are those of the contract."""
    assert not capabilities.collectives or capabilities.collectives >= _REQUIRED
    assert capabilities.collectives <= COLLECTIVES, "collectives that the contract does not have"


def test_group_of_one(
    conformance_platform: Platform, capabilities: Capabilities, record_property: Callable[[str, object], None]
) -> None:
    """A group of this process alone needs no others, and gives back what it gets."""
    if not capabilities.collectives:
        record_property("rejected", "collectives")
        return
    group = conformance_platform.communicator(GroupSpec("tp", (3,), 3))
    assert (group.rank, group.size) == (0, 1)
    x = torch.arange(6.0, device=conformance_platform.device().torch_device).view(2, 3)
    kept = x.clone()
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "all_reduce": lambda: group.all_reduce(x),
        "all_gather": lambda: group.all_gather(x, 1),
        "reduce_scatter": lambda: group.reduce_scatter(x, 1),
        "all_to_all": lambda: group.all_to_all(x, [2], [2]),
        "broadcast": lambda: group.broadcast(x),
    }
    for name, call in calls.items():
        if name in capabilities.collectives:
            got = call()
            assert torch.equal(got, kept), name
            got.fill_(-1)
            assert torch.equal(x, kept), f"{name}: the result shares the input's memory"
    if "barrier" in capabilities.collectives:
        group.barrier()
    group.close()
