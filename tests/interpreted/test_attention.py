"""Shapes that the conformance suite does not draw, and each way to cut the kernel."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_interpreted import InterpretedPlatform

from engine_conformance.arena import check
from engine_conformance.cases import Case, Row
from engine_sdk import AttentionSpec
from engine_sdk.triton.attention import TritonAttention
from engine_sdk.triton.kv_cache import TritonHeadMajor
from engine_sdk.triton.tuning import AttentionTuning, DeviceProperties, Tile, attention_tuning

ROWS = (Row(70, 1), Row(0, 1), Row(15, 1), Row(40, 3), Row(0, 37), Row(50, 20))
SMALL = AttentionTuning(decode=Tile(16, 16, 4, 1), prefill=Tile(16, 16, 4, 1), programs_per_core=64, least_keys=16)
"""So small that these rows have several tiles, and their keys are split."""


def spec(heads: int = 4, kv_heads: int = 1, dim: int = 32, v_dim: int | None = None, **others: Any) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, v_dim or dim, dim**-0.5, torch.float32, torch.float32, **others)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "v_dim"),
    [
        (7, 1, 80, 80),
        (2, 2, 96, 96),
        (3, 3, 192, 128),
        (20, 1, 72, 64),
        (2, 1, 256, 256),
        (2, 1, 8, 8),
        (1, 1, 576, 512),
    ],
)
def test_shapes(platform: InterpretedPlatform, heads: int, kv_heads: int, dim: int, v_dim: int) -> None:
    """Head sizes that are no powers of two, and more heads in a group than a tile has rows."""
    backend = TritonAttention(spec(heads, kv_heads, dim, v_dim), tuning=SMALL)
    check(platform, backend, Case(backend.spec, 16, ROWS, lse=True))


@pytest.mark.parametrize("block_size", [1, 8, 16, 48, 64])
def test_block_sizes(platform: InterpretedPlatform, block_size: int) -> None:
    backend = TritonAttention(spec(), tuning=SMALL)
    check(platform, backend, Case(backend.spec, block_size, ROWS, padding_tokens=3, empty_rows=2))


@pytest.mark.parametrize("features", [{}, {"window": 21}, {"chunk": 24}, {"causal": False, "window": 9}])
def test_tiles_in_one_block(platform: InterpretedPlatform, features: dict[str, Any]) -> None:
    """Tiles that divide a block begin at multiples of their size, whatever the first key is that a query sees."""
    backend = TritonAttention(spec(6, 2, **features), tuning=SMALL)
    check(platform, backend, Case(backend.spec, 32, ROWS))


@pytest.mark.parametrize(("split", "block_m"), [(1, 64), (64, 16)])
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"window": 21},
        {"chunk": 24},
        {"window": 9, "sinks": True},
        {"causal": False},
        {"causal": False, "window": 21},
        {"alibi": True, "softcap": 5.0},
    ],
    ids=lambda f: "+".join(f) or "causal",
)
def test_cuts(platform: InterpretedPlatform, features: dict[str, Any], block_m: int, split: int) -> None:
    """Keys whole and split, of decodes and of prefills; tiles of one request and of several tokens."""
    tuning = replace(SMALL, prefill=Tile(block_m, 32, 4, 1), programs_per_core=split)
    backend = TritonAttention(spec(3, **features), tuning=tuning)
    check(platform, backend, Case(backend.spec, 16, ROWS, lse=True))
    assert all(
        (launch.constants["SPLIT"]) == (split > 1) for launch in backend.plan(_batch(backend, platform)).launches
    )


def _batch(backend: TritonAttention, platform: InterpretedPlatform) -> Any:
    from engine_conformance.arena import prepare

    case = Case(backend.spec, 16, ROWS)
    return prepare(backend, case, platform.capabilities(), torch.device("cpu")).batch


def test_head_major(platform: InterpretedPlatform) -> None:
    """The kernel takes strides, so it reads any order of a block."""
    backend = TritonAttention(spec(4, 2), layout=TritonHeadMajor, tuning=SMALL)
    check(platform, backend, Case(backend.spec, 16, ROWS))


@pytest.mark.parametrize("shared_kib", [48, 64, 99, 163, 227])
@pytest.mark.parametrize(("dim", "itemsize"), [(64, 2), (128, 2), (256, 2), (576, 2), (128, 4)])
def test_defaults_fit(shared_kib: int, dim: int, itemsize: int) -> None:
    """A device that nobody has tuned for gets tiles that its memory holds."""
    found = attention_tuning(DeviceProperties(64, shared_kib << 10, 32), 4, dim, min(dim, 512), itemsize, itemsize)
    for tile in (found.decode, found.prefill):
        assert tile.depth * tile.block_n * 2 * dim * itemsize <= shared_kib << 10
