"""A platform whose kernels are Triton's: for any device that has a Triton backend. Triton is imported on first use."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

from engine.errors import PlatformUnavailableError
from engine.interfaces import (
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    CompilerOptions,
    ConfigPatch,
    ExpertsMethod,
    ExpertsSpec,
    OpSet,
)
from engine_sdk.platform import TorchPlatform, require_attention


class TritonPlatform(TorchPlatform):
    """`TorchPlatform` with Triton's kernels and torch's compiler; a subclass says its names, as there.

    Everything that it does can be taken apart: each kernel has a class or function of its own in `engine_sdk.triton`.
    """

    def __init__(self, device_index: int = 0) -> None:
        super().__init__(device_index)
        if importlib.util.find_spec("triton") is None:
            raise PlatformUnavailableError(f"{self.name} needs Triton, which is not installed: pip install triton")

    def capabilities(self) -> Capabilities:
        """What the kernels can do: every feature, in steps of any kind that may be captured."""
        return self._triton_capabilities

    @functools.cached_property
    def _triton_capabilities(self) -> Capabilities:
        from engine_sdk.triton.attention import HEAD_DIMS

        declared = dataclasses.replace(super().capabilities(), head_dims=HEAD_DIMS, v_head_dims=HEAD_DIMS)
        return declared if self.graphs() is None else dataclasses.replace(declared, graphs="full")

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        """A `TritonAttention`, or the defaults' for what its kernels lack."""
        from engine_sdk.triton.attention import TritonAttention

        declared = self.capabilities()
        require_attention(declared, spec)
        if not TritonAttention.supports(spec):  # a bias by distance, in layers whose steps are never captured
            return super().attention(spec)
        return TritonAttention(spec, declared=declared)

    def configure(self, options: Mapping[str, Any]) -> ConfigPatch:
        """Blocks as long as the kernels' tiles, each of which is then read in one piece."""
        patch = super().configure(options)
        return dataclasses.replace(patch, defaults={"block_size": 64, **patch.defaults})

    def ops(self) -> OpSet:
        """Those of `triton_ops`."""
        from engine_sdk.triton.ops import triton_ops

        return triton_ops()

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod:
        """A `TritonExperts`."""
        from engine_sdk.triton.experts import TritonExperts

        if spec.dtype not in self.capabilities().dtypes:
            return super().experts(spec)  # which refuses
        return TritonExperts(spec)

    def compiler(self) -> CompilerOptions | None:
        """Torch's own compiler, whose kernels are Triton's.

        With its tuning of tiles, the products of a single token become reductions that fuse with what is around them;
        what works on queries and on keys shares a launch; and routers choose experts in one.
        """
        from engine_sdk.triton.topk import ShortTopK

        options: dict[str, object] = {"coordinate_descent_tuning": True, "post_grad_custom_pre_pass": ShortTopK()}
        # Of many tokens a joint launch may be slower: the compiler measures, and keeps what gains.
        options |= {"combo_kernels": True, "benchmark_combo_kernel": True}
        return CompilerOptions(options=options)
