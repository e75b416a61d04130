"""Ray's cluster: which nodes there are, and where the ranks go.

The ranks of one stage, which exchange sums in every layer, get a bundle of a placement group of their own, so that they
are on one node; stages are packed onto as few nodes as they fit on. Only where no node has enough devices for a stage
are its ranks spread, packed as well.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import EngineArgs
from engine.discovery import PLATFORMS, discover
from engine.errors import ConfigError
from engine.interfaces import Platform
from engine.plugins import examine, select_platform

log = logging.getLogger(__name__)

_FREE = 30.0
"""Seconds to wait for devices that the cluster has, and that are in use."""

_NODE = ("NodeID", "NodeManagerHostname", "NodeManagerAddress", "NodeManagerPort", "Resources")

_connecting = threading.Lock()

_led: dict[str | None, str] = {}
"""By what was asked for, the address of the cluster that this process has joined for it."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, with the port where Ray answers there, and what Ray counts on it."""

    id: str
    host: str
    address: str
    port: int
    resources: Mapping[str, float]

    def __str__(self) -> str:
        return f"node {self.id[:8]}, {self.host} at {self.address}"

    def answers(self) -> bool:
        """Whether Ray is there, which its cluster itself takes a quarter of a minute to doubt."""
        try:
            socket.create_connection((self.address, self.port), timeout=2).close()
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class Places:
    """Where ranks go.

    Attributes:
        group: Ray's placement group.
        bundles: of each actor, its place in the group.
    """

    group: Any
    bundles: list[int]


def connect(address: str | None) -> Any:
    """Ray's module, connected: as this process is already, or to `address`, ``RAY_ADDRESS``, a cluster on this machine.

    Where there is none, one is started, which ends with this process. Raises `ConfigError` where this process is in
    another cluster than that at `address`.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError(
            'distributed_executor_backend "ray" needs Ray, which is not installed; on each node: '
            'pip install "engine[ray]"'
        ) from error
    asked, address = address, address or os.environ.get("RAY_ADDRESS") or None
    if address and "://" in address:
        raise ConfigError(
            f"ray_address {address!r} is that of Ray's client, whose process the ranks cannot reach; start the engine "
            "on a node of the cluster, and leave the address out there"
        )
    with _connecting:
        if not ray.is_initialized():
            handler = signal.getsignal(signal.SIGTERM)
            try:
                _init(ray, address)
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, handler)  # Ray sets one of its own
            _led[asked] = ray.get_runtime_context().gcs_address
        here = ray.get_runtime_context().gcs_address
        if asked not in (None, "auto", here) and _led.get(asked) != here:
            raise ConfigError(
                f"this process has joined Ray's cluster at {here}, and ray_address asks for {asked!r}\nremedy: leave "
                "ray_address out to use that cluster, or call ray.shutdown() before"
            )
    return ray


def _init(ray: Any, address: str | None) -> None:
    options = {"logging_level": logging.ERROR}
    try:
        if address and ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        try:
            ray.init(address or "auto", **options)
        except ConnectionError:
            if address:
                raise
            log.info("no Ray cluster runs on this machine: starting one")
            ray.init("local", include_dashboard=False, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {error}\nremedy: ray start --head on one node, "
            "ray start --address=HEAD:6379 on the others, and ray_address=HEAD:6379"
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{reason}\nremedy: install the same Python and Ray on every node") from error


def alive(ray: Any) -> list[Node]:
    """The nodes of the cluster, without those that were lost of late."""
    nodes = [Node(*(node[key] for key in _NODE)) for node in ray.nodes() if node["Alive"]]
    return [node for node in nodes if node.answers()]


def platform_class(name: str | None) -> tuple[str, type[Platform]]:
    """The platform of the ranks: one that is named need not run on this machine."""
    named = {plugin.name: plugin for plugin in discover(PLATFORMS)}
    if (name := name or os.environ.get("ENGINE_PLATFORM")) in named:
        return named[name].name, examine(named[name]).platform
    candidate = select_platform(name)
    return candidate.plugin.name, candidate.platform


def resource_of(platform: type[Platform]) -> str:
    """What Ray calls a device of `platform`."""
    return platform.cluster_resource or platform.device_type.upper()


def request(ray: Any, resource: str) -> dict[str, Any]:
    """An actor's options for one device; Ray takes some resources by options of their own."""
    own = f"num_{resource.lower()}s"
    if own in inspect.signature(ray.init).parameters:
        return {"num_cpus": 0, own: 1}
    return {"num_cpus": 0, "resources": {resource: 1}}


def place(ray: Any, args: EngineArgs, resource: str) -> Places:
    """Reserve a device for each rank; raises `ConfigError` with what the cluster has where there are too few."""
    nodes, width, size = alive(ray), args.tensor_parallel_size, args.world_size
    counts = [int(node.resources.get(resource, 0)) for node in nodes]
    if sum(counts) < size:
        raise ConfigError(f"{size} ranks need as many of Ray's {resource!r}, {_what_there_is(nodes, counts, resource)}")
    if sum(count // width for count in counts) >= size // width:
        bundles, members = [{resource: width}] * (size // width), width
    else:
        log.warning(
            "no node has %d of Ray's %r for each stage, so layers are split across nodes, whose network carries a sum "
            "or two of each; pipeline_parallel_size puts stages on nodes of their own",
            *(width, resource),
        )
        bundles, members = [{resource: 1}] * size, 1
    group = ray.util.placement_group(bundles, strategy="PACK")
    if not group.wait(_FREE):
        free = ray.available_resources().get(resource, 0)
        ray.util.remove_placement_group(group)
        raise ConfigError(
            f"{size} ranks need as many of Ray's {resource!r}, of which {free:g} are free for {_FREE:g} s now, "
            f"{_what_there_is(nodes, counts, resource)}; or end what has them (ray status, ray list actors)"
        )
    return Places(group, [rank // members for rank in range(size)])


def _what_there_is(nodes: list[Node], counts: list[int], resource: str) -> str:
    has = "; ".join(f"{count} on {node}" for node, count in zip(nodes, counts, strict=True))
    return (
        f"and the cluster has {sum(counts)}: {has}\nremedy: start more nodes, with ray start --address=HEAD:6379 and, "
        f"where Ray does not count {resource} by itself, --resources='{{\"{resource}\": NUMBER}}'"
    )
