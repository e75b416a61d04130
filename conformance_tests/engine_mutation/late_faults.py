"""Faults of order in time, on the simulated accelerator, whose streams really run late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine_mutation.catalogue import Late, fault, variant
from engine_sdk import Event, HostEvent, TorchDevice


@variant("test_device.py")
class RunsLate(Late):
    """A device whose work is done long after it was launched."""


@fault("L0", "test_device.py::test_waiting_waits[event]")
class EventAlwaysDone(Late):
    """Events wait for nothing, and are always done."""

    class _device_class(TorchDevice):  # noqa: N801
        def event(self) -> Event:
            return HostEvent()


class _Hasty:
    """An event that waits, and says that it is done before."""

    def __init__(self, event: Event) -> None:
        self.record, self.synchronize = event.record, event.synchronize

    def query(self) -> bool:
        return True


@fault("L0", "test_device.py::test_waiting_waits[query]")
class QueryAlwaysTrue(Late):
    """An event that is asked says that it is done, whether or not it is."""

    class _device_class(TorchDevice):  # noqa: N801
        def event(self) -> Event:
            return _Hasty(super().event())


@fault("L0", "test_device.py::test_waiting_waits[device]")
class SynchronizeReturnsAtOnce(Late):
    """To wait for the device waits for nothing."""

    class _device_class(TorchDevice):  # noqa: N801
        def synchronize(self) -> None:
            pass


@fault("L0", "test_device.py::test_side_stream_after_long_work")
class SideStreamStartsAtOnce(Late):
    """The side stream does not wait for what was launched before."""

    class _device_class(TorchDevice):  # noqa: N801
        @contextmanager
        def side_stream(self) -> Iterator[None]:
            main = torch.accelerator.current_stream(self.torch_device)
            torch.accelerator.set_stream(self._side_stream)
            try:
                yield
            finally:
                torch.accelerator.set_stream(main)
                main.wait_stream(self._side_stream)


@fault("L0", "test_device.py::test_side_stream_after_long_work")
class SideStreamNotJoined(Late):
    """What comes after the side stream's work does not wait for it."""

    class _device_class(TorchDevice):  # noqa: N801
        @contextmanager
        def side_stream(self) -> Iterator[None]:
            main = torch.accelerator.current_stream(self.torch_device)
            self._side_stream.wait_stream(main)
            torch.accelerator.set_stream(self._side_stream)
            try:
                yield
            finally:
                torch.accelerator.set_stream(main)


@fault("L0", "test_device.py::test_side_stream_after_long_work")
class SideStreamKeptAfterAnError(Late):
    """An error inside of a side stream leaves it current."""

    class _device_class(TorchDevice):  # noqa: N801
        @contextmanager
        def side_stream(self) -> Iterator[None]:
            main = torch.accelerator.current_stream(self.torch_device)
            self._side_stream.wait_stream(main)
            torch.accelerator.set_stream(self._side_stream)
            yield
            torch.accelerator.set_stream(main)
            main.wait_stream(self._side_stream)


def _overtaking(layout: Any, name: str) -> Any:
    """A layout of which one method runs on a stream of its own, which nothing waits for."""
    method, stream = getattr(layout, name), torch.Stream(torch.device("npu"))

    def early(cache: Any, *tensors: Tensor) -> Any:
        main = torch.accelerator.current_stream()
        torch.accelerator.set_stream(stream)
        try:
            return method(cache, *tensors)
        finally:
            torch.accelerator.set_stream(main)

    return early


class _Swapping(Late):
    """The layout's method `_method` does not wait for the work before it, nor the work after for it."""

    _method: ClassVar[str]

    @classmethod
    def _change(cls, backend: Any) -> Any:
        make, name = backend.layout, cls._method

        def layout(block_size: int) -> Any:
            made = make(block_size)
            object.__setattr__(made, name, _overtaking(made, name))
            return made

        backend.layout = layout
        return backend


@fault("L3", "test_kv_cache.py::test_copies_come_in_order")
class SwapOutBeforeTheComputeEnded(_Swapping):
    """Blocks are taken out while the step that fills them still runs."""

    _method = "export_blocks"


@fault("L3", "test_attention.py::test_agrees_with_reference[causal]")
class SwapInOverABlockStillRead(_Swapping):
    """Blocks are filled anew while a step still reads what they held."""

    _method = "import_blocks"


@fault("L3", "test_kv_cache.py::test_copy_blocks")
class CopyBeforeTheComputeEnded(_Swapping):
    """Blocks are copied while the step that fills them still runs."""

    _method = "copy_blocks"
