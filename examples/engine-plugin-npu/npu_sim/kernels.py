"""The device's kernel language: a kernel is a function over the device's own views of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_libraries: dict[str, torch.library.Library] = {}


def kernel(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a kernel of a function that writes into its arguments and returns nothing.

    The call launches it on the current stream and returns; the body runs later, on the device, where tensors are plain
    ones and whatever torch does with host tensors is at hand.

        @kernel("mine::scale(Tensor x, float by, Tensor(a!) out) -> ()")
        def scale(x, by, out):
            torch.mul(x, by, out=out)

    Args:
        schema: an operator's, as `torch.library` writes it.
    """
    name, _, signature = schema.partition("(")
    namespace, operator = name.split("::")

    def register(body: Callable[..., None]) -> Callable[..., None]:
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
        library.define(f"{operator}({signature}")
        # The device runs what torch has for host tensors, on its own memory; to launch, shapes are enough.
        library.impl(operator, body, "CPU")
        library.impl(operator, lambda *args: None, "Meta")
        launch: Any = getattr(getattr(torch.ops, namespace), operator)
        launch.__doc__ = body.__doc__
        return launch  # type: ignore[no-any-return]

    return register
