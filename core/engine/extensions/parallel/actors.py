"""Ranks as actors of Ray, on one machine or several.

Ray finds the machines, reserves their devices and starts a process a rank; steps and answers then travel over
connections of our own (see `network`), so no step waits for Ray, and what Ray itself pickles is the name of a class and
the few plain arguments of its methods.
"""

from __future__ import annotations

import os
import re
import socket
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from engine.config import EngineArgs
from engine.errors import ConfigError, EngineDeadError
from engine.extensions.parallel import cluster, messages
from engine.extensions.parallel.driver import TICK, Ranks
from engine.extensions.parallel.network import Door, Pulse
from engine.extensions.parallel.worker import RankActor, check_versions

_PASSED = re.compile(
    r"(TRANSFORMERS|TOKENIZERS|TORCH|TORCHINDUCTOR|TORCHDYNAMO|PYTORCH|TRITON|OMP|KMP|MKL|GLOO|UCX|[A-Z]*CCL)_"
)
"""Variables of the driver that its ranks get: those that steer computation and collectives."""

_START = 120.0
"""Seconds that a process may take to start on its node, without the model."""

_END = 10.0
"""Seconds that the processes may take to end."""


@dataclass(frozen=True)
class _Seat:
    """A rank's process.

    Attributes:
        actor: Ray's handle.
        pid: of the process.
        node: where it runs.
        ids: what Ray calls the device that it gave, where it numbers such devices.
        position: among the ranks of its node.
    """

    actor: Any
    pid: int
    node: cluster.Node
    ids: list[str]
    position: int = 0


class Actors(Ranks):
    """See `Ranks`."""

    def __init__(self, args: EngineArgs) -> None:
        self._ray = ray = cluster.connect(args.ray_address)
        name, platform = cluster.platform_class(args.platform)
        resource = cluster.resource_of(platform)
        host = ray.util.get_node_ip_address()
        places = cluster.place(ray, args, resource)
        actors: list[Any] = []
        self._seats: list[_Seat] = []
        self._refs: list[Any] = []
        sockets: list[socket.socket] = []
        self._finalizer = weakref.finalize(self, _end, ray, places.group, actors, self._seats, self._refs, sockets)
        try:
            self._seats += self._start(places, actors, resource)
            numbered = all(seat.ids for seat in self._seats) or not platform.probe().accelerator
            if args.data_parallel_size > 1 and not numbered:
                raise ConfigError(
                    f"Ray does not number its {resource!r}, so that two replicas may take one device: use "
                    "data_parallel_size=1, and an engine for each replica"
                )
            with Door(host) as door:
                self._run(door, self._neighbours(args, resource))
                steps, watch = door.admit(args.world_size, self._starting)
            sockets += [*steps, *watch]
            self._pulses = [Pulse(sock, TICK) for sock in watch]
            super().__init__(replace(args, platform=name), steps, host)
        except BaseException:
            self._finalizer()
            raise

    def _start(self, places: cluster.Places, actors: list[Any], resource: str) -> list[_Seat]:
        """Start the processes, numbered such that those of a node are neighbours."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        make = self._ray.remote(max_restarts=0, **cluster.request(self._ray, resource))(RankActor)
        for bundle in places.bundles:
            strategy = PlacementGroupSchedulingStrategy(places.group, bundle)
            actors.append(make.options(scheduling_strategy=strategy).remote())
        found = self._answers([actor.describe.remote() for actor in actors])
        nodes = {node.id: node for node in cluster.alive(self._ray)}
        check_versions({str(nodes[answer["node"]]): answer["versions"] for answer in found})
        seats = [
            _Seat(actor, answer["pid"], nodes[answer["node"]], answer["ids"].get(resource, []))
            for actor, answer in zip(actors, found, strict=True)
        ]
        order = [seat.node.id for seat in seats]
        seats.sort(key=lambda seat: order.index(seat.node.id))
        at = [[s.node.id for s in seats[:index]].count(seat.node.id) for index, seat in enumerate(seats)]
        return [replace(seat, position=position) for seat, position in zip(seats, at, strict=True)]

    def _answers(self, refs: list[Any]) -> list[dict[str, Any]]:
        exceptions = self._ray.exceptions
        try:
            found: list[dict[str, Any]] = self._ray.get(refs, timeout=_START)
        except exceptions.GetTimeoutError as error:
            raise EngineDeadError(
                f"not all of {len(refs)} processes started within {_START:g} s; see Ray's logs on the nodes (ray logs)"
            ) from error
        except exceptions.RayError as error:
            raise EngineDeadError(
                f"a rank's process did not start: {_reason(error)}\nremedy: the same engine is installed on every node"
            ) from error
        return found

    def _neighbours(self, args: EngineArgs, resource: str) -> dict[str, int]:
        """By node, how many ranks of all replicas may share it."""
        nodes = [seat.node for seat in self._seats]
        return {
            node.id: min(nodes.count(node) * args.data_parallel_size, int(node.resources[resource])) for node in nodes
        }

    def _run(self, door: Door, neighbours: Mapping[str, int]) -> None:
        variables = {name: value for name, value in os.environ.items() if _PASSED.match(name)}
        for rank, seat in enumerate(self._seats):
            line = (rank, len(self._seats), door.address, door.token)
            near = neighbours[seat.node.id]
            self._refs.append(seat.actor.run.remote(line, seat.ids, seat.position, near, variables))

    def _starting(self) -> None:
        """Raise where a process has ended before it was heard."""
        ended, _ = self._ray.wait(self._refs, timeout=0)
        for ref in ended:
            rank = self._refs.index(ref)
            raise EngineDeadError(
                f"rank {rank} of {len(self._refs)} ({self._where(rank)}) {self._how(rank)}\nremedy: let the nodes "
                "reach one another on all ports"
            )

    def _write(self, data: bytes) -> None:
        for rank, sock in enumerate(self._sockets):
            view = memoryview(messages.frame(data))
            while view:
                try:
                    view = view[sock.send(view, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    self._look()
                    time.sleep(0.0005)
                except OSError:
                    raise self._fail({rank: messages.last(sock)}, loading=False) from None

    def _progress(self) -> tuple[list[int], list[int]]:
        counters = [pulse.counters() for pulse in self._pulses]
        return [read for read, _ in counters], [entered for _, entered in counters]

    def _stopped(self) -> list[int]:
        return [rank for rank, pulse in enumerate(self._pulses) if pulse.stopped()]

    def _where(self, rank: int) -> str:
        return f"process {self._seats[rank].pid} on {self._seats[rank].node}"

    def _how(self, rank: int) -> str:
        exceptions, node = self._ray.exceptions, self._seats[rank].node
        end = time.monotonic() + 5
        while node.answers() and time.monotonic() < end:
            try:
                self._ray.get(self._refs[rank], timeout=TICK)
            except exceptions.GetTimeoutError:
                continue
            except exceptions.RayError as error:
                return f"has ended: {_reason(error)}"
            return "has ended"
        return "closed its connection" if node.answers() else "was lost with its node, where Ray does not answer"

    def _kill(self) -> None:
        self._finalizer()


def _reason(error: Exception) -> str:
    """What matters of Ray's message: its last line, without advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1].partition(" Some common causes")[0].rstrip(".")


def _end(
    ray: Any,
    group: Any,
    actors: Sequence[Any],
    seats: Sequence[_Seat],
    refs: Sequence[Any],
    sockets: Sequence[socket.socket],
) -> None:
    """End the processes and wait for that, so that Ray does not report their death, and give their places back."""
    try:
        if ray.is_initialized():
            with suppress(ray.exceptions.RayError):  # the cluster itself may be gone
                for actor in actors:
                    ray.kill(actor)
                there = {seat.node.id for seat in seats if seat.node.answers()}
                ours = [ref for seat, ref in zip(seats, refs, strict=False) if seat.node.id in there]
                ray.wait(ours, num_returns=len(ours), timeout=_END) if ours else None
                ray.util.remove_placement_group(group)
    finally:
        for sock in sockets:
            sock.close()
