"""Fused token-wise operations, as operators of torch, so that a compiler sees one node each."""

from __future__ import annotations

import torch
from torch import Tensor

from engine_npu import kernels

_library = torch.library.Library("engine_npu", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    kernels.normalise(x, weight, eps, out)
    return out


_library.impl("rms_norm", _rms_norm, "PrivateUse1")
_library.impl("rms_norm", _rms_norm, "Meta")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `engine_sdk.OpSet.rms_norm`."""
    return torch.ops.engine_npu.rms_norm(x, weight, eps)  # type: ignore[no-any-return]
