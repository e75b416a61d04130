"""Groups of torch's communicator: the suite's cases of how they are made, used side by side and closed."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine_conformance.ranks import CHECKS, World, run_ranks
from engine_sdk import CommunicatorError, GroupSpec, TorchPlatform, communicator

GROUPS = ("overlapping_groups", "group_order", "part_of_the_ranks", "held_groups", "made_again", "closed")


def both_are_told(world: World) -> None:
    """Who sends something else than is expected hears so as well, where the suite asks it of the receiver only."""
    if world.rank == 2:
        return
    group, ones = world.group("pp", (0, 1)), torch.ones(6 - 2 * world.rank)
    mine, theirs = ("6", "4") if world.rank == 0 else ("4", "6")
    says = rf"rank {1 - world.rank} of group pp has .*\[{theirs}\]\], and this one .*\[{mine}\]\]"
    with pytest.raises(CommunicatorError, match=says):
        group.send(ones, 1) if world.rank == 0 else group.receive(ones, 0)


def test_groups_do_not_disturb_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # where the processes find this module
    checks = {name: CHECKS[name][0] for name in GROUPS}
    assert run_ranks("cpu", {**checks, "both_are_told": both_are_told}, 3) == {}


def test_names_are_those_of_the_group_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of how many groups the process had; and one that is made again has another."""
    names: list[str] = []

    def make(size: int, rank: int, ranks: list[int], backend: str, store: object, name: str, timeout: object) -> object:
        names.append(name)
        return object(), store

    c10d = dist.distributed_c10d
    monkeypatch.setattr(c10d, "_new_process_group_helper", make)
    monkeypatch.setattr(c10d, "_get_default_store", object)
    monkeypatch.setattr(communicator, "_made", Counter())
    for role, ranks in (("tp", (0, 1)), ("tp", (1, 2)), ("dp", (1, 0)), ("tp", (0, 1))):
        communicator._make(GroupSpec(role, ranks, 1), "gloo")
    assert names == ["tp/0-1/0", "tp/1-2/0", "dp/1-0/0", "tp/0-1/1"]


def test_a_platform_says_whether_its_collectives_can_be_captured() -> None:
    class Chip(TorchPlatform):
        name = "chip"
        device_type = "cpu"
        contract = "1.0"
        _collectives_capturable = True

    alone = GroupSpec("tp", (0,), 0)
    assert Chip().communicator(alone).capturable
    other = type("Other", (Chip,), {"_collectives_capturable": False})
    assert not other().communicator(alone).capturable
