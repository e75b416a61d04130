"""A rank in a process that Ray started. Nothing of torch is imported before the process has its variables."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any

from engine.config import EngineArgs
from engine.errors import ConfigError
from engine.extensions.parallel.network import NetworkLine, interface
from engine.extensions.parallel.rank import serve
from engine.plugins import select_platform

_COMPARED = ("engine", "torch", "transformers")

_Line = tuple[int, int, tuple[str, int], bytes]


class RankActor:
    """A rank's process, as Ray starts it."""

    def describe(self) -> dict[str, Any]:
        """Where it runs, and with what."""
        import ray

        context = ray.get_runtime_context()
        ids = context.get_accelerator_ids()
        return {"pid": os.getpid(), "node": context.get_node_id(), "ids": ids, "versions": versions()}

    def run(self, line: _Line, ids: list[str], position: int, neighbours: int, variables: dict[str, str]) -> None:
        """Be a rank until the driver ends.

        Args:
            line: what `NetworkLine` is made of.
            ids: see `own_device`; so is `position`.
            neighbours: how many ranks may share this machine.
            variables: the driver's; one that the node has keeps its value there.
        """
        import ray

        threads = variables.pop("OMP_NUM_THREADS", "")  # the worker's own is Ray's, and not a user's
        os.environ.update({**variables, **os.environ, "LOCAL_WORLD_SIZE": str(neighbours)})
        os.environ["OMP_NUM_THREADS"] = threads or str(max(1, len(os.sched_getaffinity(0)) // neighbours))
        address: str = ray.util.get_node_ip_address()
        if name := interface(address):  # and not what the machine's own name leads to
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        serve(NetworkLine(*line), lambda args: own_device(args, ids, position))


def own_device(args: EngineArgs, ids: Sequence[str], position: int) -> int:
    """The index of a rank's device, as its platform counts them on this node.

    Ray shows a process the devices that it gave it and no others, where it can: then there is one to see.

    Args:
        args: the options.
        ids: what Ray calls the device that it gave; empty where it does not number them.
        position: among the ranks of the node.
    """
    found = select_platform(args.platform)
    devices = [device.index for device in found.probe.devices]
    if not found.probe.accelerator or not devices:
        return position
    at = position if not ids else int(ids[0]) if len(devices) > 1 and ids[0].isdigit() else 0
    if at >= len(devices):
        raise ConfigError(
            f"Ray has a device {at} for this rank, and {found.plugin} sees {len(devices)}; start the node with the "
            "number that there is (ray start --resources)"
        )
    return devices[at]


def versions() -> dict[str, str]:
    """Of what all ranks must have alike; which build of it does not matter."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in _COMPARED}


def check_versions(theirs: Mapping[str, Mapping[str, str]]) -> None:
    """Raise `ConfigError` where nodes, by their names, have other versions than this process."""
    ours = versions()
    for node, found in theirs.items():
        wrong = [f"{name} {found.get(name)}, here {ours[name]}" for name in _COMPARED if found.get(name) != ours[name]]
        if wrong:
            raise ConfigError(f"{node} has {'; '.join(wrong)}\nremedy: install the same versions on every node")
