"""Published formats of quantised linear layers: which tensors a layer of [O, I] has, and what integers they mean.

    gptq                  qweight int32 [I / p, O], qzeros int32 [G, O / p], scales [G, O], g_idx int32 [I]
    awq (gemm)            qweight int32 [I, O / p], qzeros int32 [G, O / p], scales [G, O]
    compressed-tensors
      pack-quantized      weight_packed int32 [O, I / p], weight_scale [O, G], weight_zero_point int32 [O / p, G]
      int-quantized       weight int8 [O, I], weight_scale [O, G], weight_zero_point int8 [O, G]

p integers lie in a word of 32 bits, the first in its lowest bits; G groups of inputs share a scale. Sources: AutoGPTQ
and GPTQModel, AutoAWQ, compressed-tensors 0.20. Activations keep their own dtype, whatever a checkpoint proposes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import UnsupportedModelError
from engine.extensions.checkpoints.files import Entry
from engine.interfaces import QuantScheme, QuantWeight

_REMEDY = "use the original checkpoint, which --quantization int8 or int4 rounds while loading"
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the outputs 0 to 7 lie


@dataclass(frozen=True)
class Stored:
    """A tensor of a layer.

    Attributes:
        shape: of the whole.
        dtype: that it is read into.
        outputs, inputs: the axis along which it follows them, and how many of them are one element; None if along none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    outputs: tuple[int, int] | None = None
    inputs: tuple[int, int] | None = None


class Format(ABC):
    """How some layers of a checkpoint are stored.

    Args:
        bits: of an integer, 4 or 8.
        group_size: inputs that share a scale; None for all.
        where: whether a layer of this name is stored so, as far as the configuration says.
    """

    key: str
    """The tensor that a layer has only if it is stored so."""

    def __init__(self, bits: int, group_size: int | None, where: Callable[[str], bool] = lambda name: True) -> None:
        self.bits, self.group_size, self._where = bits, group_size, where
        self.scheme = QuantScheme(f"int{bits}", bits, group_size)

    def covers(self, name: str, entries: Collection[str]) -> str | None:
        """What the names of the tensors of the layer `name` begin with; None if it is not stored so.

        A checkpoint may have a prefix less, or one more, than the model.
        """
        stems = [name, name.partition(".")[2], f"model.{name}"]
        return next((s for s in stems if f"{s}.{self.key}" in entries and self._where(s)), None) if name else None

    def groups(self, inputs: int) -> int:
        """G; raises `UnsupportedModelError` where groups, or words of 32 bits, do not divide the inputs."""
        if self.group_size is not None and inputs % self.group_size:
            raise UnsupportedModelError(f"groups of {self.group_size} do not divide {inputs} inputs; {_REMEDY}")
        if inputs % (32 // self.bits):
            raise UnsupportedModelError(f"{inputs} inputs do not fill words of {32 // self.bits}; {_REMEDY}")
        return 1 if self.group_size is None else inputs // self.group_size

    @abstractmethod
    def tensors(self, outputs: int, inputs: int, there: Mapping[str, Entry]) -> dict[str, Stored]:
        """The tensors of a layer, by name; `there` are those that the checkpoint has."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> QuantWeight:
        """The integers; raises `ValueError` for what cannot be expressed."""


class Gptq(Format):
    """Frantar et al., 2022. The first version of the format stores zeros less one."""

    key = "qweight"

    def __init__(self, bits: int, group_size: int | None, zero_offset: int) -> None:
        super().__init__(bits, group_size)
        self._zero_offset = zero_offset

    def tensors(self, outputs: int, inputs: int, there: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Format.tensors`."""
        pack, groups = 32 // self.bits, self.groups(inputs)
        along = None if self.group_size is None else (0, self.group_size)
        found = {
            "qweight": Stored((inputs // pack, outputs), torch.int32, (1, 1), (0, pack)),
            "qzeros": Stored((groups, -(-outputs // pack)), torch.int32, (1, pack), along),
            "scales": Stored((groups, outputs), torch.float32, (1, 1), along),
        }
        if "g_idx" in there:
            found["g_idx"] = Stored((inputs,), torch.int32, None, (0, 1))
        return found

    def decode(self, tensors: Mapping[str, Tensor]) -> QuantWeight:
        """See `Format.decode`."""
        scales, half = tensors["scales"].T.contiguous(), 1 << (self.bits - 1)
        _require_order(tensors.get("g_idx"), self.group_size)
        values = unpack(tensors["qweight"].T.contiguous(), self.bits)
        zeros = unpack(tensors["qzeros"], self.bits).T[: len(scales)].to(torch.int16) + (self._zero_offset - half)
        return _weight(signed(values, self.bits), scales, zeros)


class Awq(Format):
    """Lin et al., 2023, in AutoAWQ's order for matrix products (``gemm``)."""

    key = "qweight"

    def tensors(self, outputs: int, inputs: int, there: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Format.tensors`."""
        groups, along = self.groups(inputs), None if self.group_size is None else (0, self.group_size)
        return {
            "qweight": Stored((inputs, outputs // 8), torch.int32, (1, 8), (0, 1)),
            "qzeros": Stored((groups, outputs // 8), torch.int32, (1, 8), along),
            "scales": Stored((groups, outputs), torch.float32, (1, 1), along),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> QuantWeight:
        """See `Format.decode`."""
        values, zeros = (self._ordered(tensors[name]) for name in ("qweight", "qzeros"))
        return _weight(values.T.contiguous(), tensors["scales"].T.contiguous(), zeros.T)

    def _ordered(self, words: Tensor) -> Tensor:
        lying = unpack(words, 4).unflatten(1, (-1, 8))
        return signed(lying[..., list(_AWQ_ORDER)].flatten(1), 4)


class Packed(Format):
    """compressed-tensors' ``pack-quantized``: integers from the least on, as unsigned numbers."""

    key = "weight_packed"

    def tensors(self, outputs: int, inputs: int, there: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Format.tensors`."""
        pack, groups = 32 // self.bits, self.groups(inputs)
        along = None if self.group_size is None else (1, self.group_size)
        found = {
            "weight_packed": Stored((outputs, inputs // pack), torch.int32, (0, 1), (1, pack)),
            "weight_scale": _scale(outputs, groups, along, there),
        }
        if "weight_zero_point" in there:
            shape = (-(-outputs // pack), groups)
            found["weight_zero_point"] = Stored(shape, torch.int32, (0, pack), along)
        if "weight_g_idx" in there:
            found["weight_g_idx"] = Stored((inputs,), torch.int32, None, (0, 1))
        return found | _unused(there, "weight_shape", *_OF_ACTIVATIONS)

    def decode(self, tensors: Mapping[str, Tensor]) -> QuantWeight:
        """See `Format.decode`."""
        _require_order(tensors.get("weight_g_idx"), self.group_size)
        values = signed(unpack(tensors["weight_packed"], self.bits), self.bits)
        zeros = tensors.get("weight_zero_point")
        if zeros is not None:
            zeros = signed(unpack(zeros.T.contiguous(), self.bits), self.bits).T[: len(values)]
        return _weight(values, tensors["weight_scale"], zeros)


class Plain(Format):
    """compressed-tensors' ``int-quantized``: integers as they are."""

    key = "weight_scale"

    def tensors(self, outputs: int, inputs: int, there: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Format.tensors`."""
        groups, along = self.groups(inputs), None if self.group_size is None else (1, self.group_size)
        found = {
            "weight": Stored((outputs, inputs), torch.int8, (0, 1), (1, 1)),
            "weight_scale": _scale(outputs, groups, along, there),
        }
        if "weight_zero_point" in there:
            whole = len(there["weight_zero_point"].shape) < 2
            shape = there["weight_zero_point"].shape if whole else (outputs, groups)
            found["weight_zero_point"] = Stored(shape, torch.int8, None if whole else (0, 1), along)
        return found | _unused(there, *_OF_ACTIVATIONS)

    def decode(self, tensors: Mapping[str, Tensor]) -> QuantWeight:
        """See `Format.decode`."""
        most = 1 << (self.bits - 1)
        if int(tensors["weight"].amin()) < -most or int(tensors["weight"].amax()) >= most:
            raise ValueError(f"it has values outside of {self.bits} bits; {_REMEDY}")
        return _weight(tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point"))


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [A, B] to the unsigned integers in them, uint8 [A, B * 32 / bits], those of a word lowest first."""
    parts = words.contiguous().view(torch.uint8)
    if bits == 8:
        return parts
    return torch.stack((parts & 15, parts >> 4), -1).flatten(1)


def signed(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers of `bits`, as int8 around zero."""
    return (values ^ 0x80).view(torch.int8) if bits == 8 else values.view(torch.int8) - 8


def _weight(values: Tensor, scales: Tensor, zeros: Tensor | None) -> QuantWeight:
    """The canonical form; one scale of a whole layer becomes one for each output."""
    if scales.dim() < 2 or scales.shape[0] != values.shape[0]:
        scales = scales.reshape(-1, 1).expand(len(values), 1).contiguous()
    if zeros is not None:
        if int(zeros.amin()) < -128 or int(zeros.amax()) > 127:
            raise ValueError(f"it has zero points outside of 8 bits; {_REMEDY}")
        zeros = zeros.to(torch.int8).reshape(-1, scales.shape[1]).expand(scales.shape).contiguous()
        if not zeros.any():
            zeros = None
    return QuantWeight(values, scales, zeros)


def _scale(outputs: int, groups: int, along: tuple[int, int] | None, there: Mapping[str, Entry]) -> Stored:
    """Scales as wide as they are in the checkpoint, which may have one for a whole layer."""
    entry = there.get("weight_scale")
    dtype = torch.float32 if entry is None else entry.dtype
    if entry is not None and entry.shape in ((1,), (), (1, 1)) and outputs != 1:
        return Stored(entry.shape, dtype)
    return Stored((outputs, groups), dtype, (0, 1), along)


def _unused(there: Mapping[str, Entry], *names: str) -> dict[str, Stored]:
    return {name: Stored(there[name].shape, there[name].dtype) for name in names if name in there}


def _require_order(order: Tensor | None, group_size: int | None) -> None:
    """Raise `ValueError` unless groups are of neighbours."""
    if order is None or group_size is None or not order.numel():
        return
    plain = torch.arange(len(order), device=order.device) // group_size
    if not torch.equal(order - order[0], plain.to(order.dtype)):
        raise ValueError(f"its groups are of inputs in another order (desc_act, actorder 'group'); {_REMEDY}")


# What configurations say.


def _gptq(config: Mapping[str, Any], where: str) -> Sequence[Format]:
    _require(config.get("bits") in (4, 8), where, f"GPTQ with {config.get('bits')} bits")
    _require(not config.get("dynamic"), where, "GPTQ with settings of their own for some layers ('dynamic')")
    layout = config.get("checkpoint_format", "gptq")
    _require(layout in ("gptq", "gptq_v2"), where, f"GPTQ stored as {layout!r}")
    return [Gptq(config["bits"], _group(config), 1 if layout == "gptq" else 0)]


def _awq(config: Mapping[str, Any], where: str) -> Sequence[Format]:
    _require(config.get("bits", 4) == 4, where, f"AWQ with {config.get('bits')} bits")
    version = str(config.get("version", "gemm")).lower()
    _require(version == "gemm", where, f"AWQ stored for {version!r}")
    return [Awq(4, _group(config))]


def _group(config: Mapping[str, Any]) -> int | None:
    size = int(config.get("group_size", 128))
    return None if size < 0 else size


def _compressed_tensors(config: Mapping[str, Any], where: str) -> Sequence[Format]:
    for name in ("kv_cache_scheme", "transform_config"):
        _require(not config.get(name), where, f"compressed-tensors with a {name}")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    _require(sparsity == "dense", where, f"compressed-tensors with sparsity stored as {sparsity!r}")
    groups: Mapping[str, Mapping[str, Any]] = config.get("config_groups") or {}
    found = [_of_group(group, group.get("format") or config.get("format"), where) for group in groups.values()]
    _require(bool(found), where, "compressed-tensors without config_groups")
    return found


def _of_group(group: Mapping[str, Any], layout: object, where: str) -> Format:
    weights = group.get("weights") or {}
    kind: Callable[..., Format] | None = {
        "pack-quantized": Packed, "int-quantized": Plain, "naive-quantized": Plain,
    }.get(str(layout))  # fmt: skip
    _require(kind is not None, where, f"compressed-tensors stored as {layout!r}")
    assert kind is not None
    bits, strategy = weights.get("num_bits"), weights.get("strategy") or "tensor"
    _require(weights.get("type", "int") == "int" and bits in (4, 8), where, f"{weights.get('type')} of {bits} bits")
    _require(strategy in ("tensor", "channel", "group"), where, f"scales for each {strategy!r}")
    size = weights.get("group_size") if strategy == "group" else None
    targets = [str(target) for target in group.get("targets") or ()]
    return kind(bits, size, lambda name: any(_targets(target, name) for target in targets))


def _targets(target: str, name: str) -> bool:
    """Whether `target` (a class, a name, or ``re:`` and an expression) means the linear layer `name`."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == "Linear" or name == target


def _require(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise UnsupportedModelError(f"{where} has weights of {what}, which is not built; {_REMEDY}")


FORMATS: Mapping[str, Callable[[Mapping[str, Any], str], Sequence[Format]]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
}
"""The layouts of a checkpoint's layers, by its ``quant_method``; called with its configuration and where it is."""
