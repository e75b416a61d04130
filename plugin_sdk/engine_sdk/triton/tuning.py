"""How kernels are cut for a device: data, looked up by what the device is made of and never by who made it."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import driver

TABLE = Path(__file__).with_name("attention.json")
"""Rows found by `bench/attention.py --sweep --write`: device, shape, and how the kernel is cut."""


@dataclass(frozen=True)
class DeviceProperties:
    """What a kernel is cut for.

    Attributes:
        num_cores: multiprocessors, compute units.
        shared_bytes: of a core's fast memory that one program may have.
        warp_size: lanes that run together.
        tile_copies: one instruction copies a tile that a descriptor describes (tensor memory accelerator).
    """

    num_cores: int
    shared_bytes: int
    warp_size: int
    tile_copies: bool = False


@functools.cache
def device_properties(device: torch.device) -> DeviceProperties:
    """Of a device, as Triton's driver says; under its interpreter a small device."""
    if triton.knobs.runtime.interpret:
        return DeviceProperties(num_cores=4, shared_bytes=64 << 10, warp_size=32)
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    found = driver.active.utils.get_device_properties(index)
    target = driver.active.get_current_target()
    tile_copies = isinstance(target.arch, int) and target.arch >= 90  # others' are names
    return DeviceProperties(found["multiprocessor_count"], found["max_shared_mem"], target.warp_size, tile_copies)


def describable(x: torch.Tensor) -> bool:
    """Whether a descriptor can say where its rows are: they are dense, and begin at multiples of 16 bytes."""
    steps = all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and steps


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: query rows and keys of a tile, warps of a program, iterations that load ahead."""

    block_m: int
    block_n: int
    num_warps: int
    depth: int


@dataclass(frozen=True)
class AttentionTuning:
    """How attention is cut.

    Attributes:
        decode: tile of requests with few tokens.
        prefill: tile of others.
        programs_per_core: programs that keep a core busy; keys are split until there are as many.
        least_keys: that are worth a program of their own.
    """

    decode: Tile
    prefill: Tile
    programs_per_core: int = 4
    least_keys: int = 128


def attention_tuning(
    device: DeviceProperties, group: int, head_dim: int, v_head_dim: int, itemsize: int, kv_itemsize: int
) -> AttentionTuning:
    """The table's row for a device and a shape, or else what fits into the device's shared memory.

    Args:
        device: what to cut for.
        group: query heads of a key/value head.
        head_dim, v_head_dim: D and E.
        itemsize, kv_itemsize: bytes of an activation and of a cached value.
    """
    default = _default(device, group, head_dim, v_head_dim, itemsize, kv_itemsize)
    where = {
        "device": {"shared_bytes": device.shared_bytes, "warp_size": device.warp_size},
        "shape": [max(head_dim, v_head_dim), itemsize, kv_itemsize],
    }
    for row in _table():
        if row | where == row:
            found: dict[str, Any] = {name: value for name, value in row.items() if name not in where}
            found |= {name: Tile(*found[name]) for name in ("decode", "prefill") if name in found}
            if "decode" in found and found["decode"].block_m < _decode_rows(group, itemsize):
                del found["decode"]  # the group is larger than any that was measured
            return replace(default, **found)
    return default


@functools.cache
def _table() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(TABLE.read_text())
    return rows


def _decode_rows(group: int, itemsize: int) -> int:
    return min(max(16, int(triton.next_power_of_2(group))), 16 if itemsize > 2 else 64)


def _default(
    device: DeviceProperties, group: int, head_dim: int, v_head_dim: int, itemsize: int, kv_itemsize: int
) -> AttentionTuning:
    width = triton.next_power_of_2(head_dim) + triton.next_power_of_2(v_head_dim)
    wide = itemsize > 2 or width > 512
    # A row's sums lie in registers: of values as long as latent attention's, those of more rows would be spilled.
    heads = min(_decode_rows(group, itemsize), 32 if width > 1024 else 64)

    def fit(block_m: int, block_n: int, num_warps: int, depth: int) -> Tile:
        # Queries lie in shared memory, and the keys and values of each iteration in flight.
        room = device.shared_bytes - block_m * width * itemsize // 2
        tile = width * max(kv_itemsize, 2)
        while block_n > 16 and block_n * tile > room:
            block_n //= 2
        return Tile(block_m, block_n, num_warps, max(1, min(depth, room // (block_n * tile))))

    decode = fit(heads, 64, 4 if width <= 512 else 8, 2)
    rows = 32 if itemsize > 2 else 64 if wide else 128
    return AttentionTuning(decode, fit(rows, 32 if wide else 64, 4 if rows <= 64 and not wide else 8, 1))
