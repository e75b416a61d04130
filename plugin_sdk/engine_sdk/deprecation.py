"""What a later release removes from the contract, and the warnings that tell a plugin so a release ahead."""

from __future__ import annotations

import warnings

DEPRECATED: dict[str, str] = {}
"""``"Platform.method"``, or an exported name, to what replaces it and the release that removes it."""


def warn_of_overrides(cls: type) -> None:
    """Warn of each method of a platform's class that a later release no longer calls."""
    for name in vars(cls):
        if advice := DEPRECATED.get(f"Platform.{name}"):
            warnings.warn(f"{cls.__qualname__}.{name} will be removed: {advice}", DeprecationWarning, stacklevel=4)
