"""A platform for tests: Triton's kernels under its interpreter, on the host. TRITON_INTERPRET=1 must be set.

The interpreter rounds half precision towards zero and cannot multiply bf16, so both are given to it here.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from engine_sdk import Capabilities, CompilerOptions, Graph, GraphRuntime
from engine_sdk.triton.platform import TritonPlatform

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton was imported as a compiler; set TRITON_INTERPRET=1"

TORCH = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def convert(data: Any, source: Any, target: Any, _: object) -> Any:
    """Convert floating-point numbers as torch does; gives their bits."""
    size = TORCH[source].itemsize
    bits = torch.from_numpy(np.ascontiguousarray(data).view(BITS[size]).view(f"i{size}" if size > 1 else "u1"))
    converted = bits.view(TORCH[source]).to(TORCH[target])
    return converted.view(INTEGERS[converted.itemsize]).numpy().view(BITS[converted.itemsize]).reshape(data.shape)


def dot(self: object, a: Any, b: Any, d: Any, precision: object, imprecise: object) -> object:
    """A product that is summed in the accumulator's dtype."""
    factors = [
        x.data
        if x.dtype.scalar in (tl.float16, tl.float32)
        else convert(x.data, x.dtype.scalar, tl.float32, 0).view("f4")
        for x in (a, b)
    ]
    with np.errstate(all="ignore"):  # keys and values may be any bits
        product = np.matmul(*factors, dtype=d.data.dtype) + d.data
    return interpreter.TensorHandle(product, d.dtype.scalar)


interpreter._convert_float = convert
interpreter.InterpreterBuilder.create_dot = dot


class Replayed(Graph):
    """Launches again, on the same tensors."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch

    def replay(self) -> None:
        self._launch()


class Recorder(GraphRuntime):
    """Graphs that remember what to call: enough to find what a plan keeps that a replay must not."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        launch()
        return Replayed(launch)


class InterpretedPlatform(TritonPlatform):
    """Triton's kernels on the host. The interpreter knows no 8-bit floats without infinity and negative zero."""

    name = "interpreted"
    device_type = "cpu"
    contract = "1.0"

    def capabilities(self) -> Capabilities:
        declared = super().capabilities()
        return replace(
            declared, kv_dtypes=declared.kv_dtypes | {dtype for dtype in TORCH.values() if dtype.itemsize == 1}
        )

    def compiler(self) -> CompilerOptions | None:
        return None

    def graphs(self) -> GraphRuntime:
        return Recorder()
