"""Whether a plugin's class keeps the contract: its version, its methods, and no method that nothing calls."""

from __future__ import annotations

import difflib
import re
import sys
import types
from typing import NamedTuple

from engine.interfaces import CONTRACT, Platform

_MAJOR, _MINOR = map(int, CONTRACT.split("."))

LOADABLE: dict[int, int] = {_MAJOR: _MINOR}
"""Contract majors that load, and the newest minor of each: the current one and, once there is one, the major before.

Minors only add. So a plugin of an older minor loads, and one of a newer minor may lean on what is not here.
"""

REMOVED: dict[str, str] = {}
"""What an earlier contract had, as ``"Platform.method"``, and what replaces it."""

_VOCABULARY = ("engine.interfaces.", "engine_sdk.")
"""Packages whose classes say what may be overridden; a plugin's own classes may only use their names."""

_NEUTRAL = frozenset(sys.stdlib_module_names) | {"torch"}
"""Packages whose classes may be mixed in, whatever they define."""


class Problem(NamedTuple):
    """Why a class is refused, and what would help."""

    cause: str
    remedy: str


def check_platform(found: object, name: str) -> Problem | None:
    """Whether what the entry point `name` names is a platform that this engine can run; calls none of its methods."""
    if not (isinstance(found, type) and issubclass(found, Platform)):
        what = found.__qualname__ if isinstance(found, type) else f"a {type(found).__name__}"
        return Problem(f"its entry point names {what}, not a subclass of Platform", "derive it from TorchPlatform")
    if not isinstance(version := getattr(found, "contract", None), str):
        return Problem(f"{found.__qualname__} does not say its contract", f'set contract = "{CONTRACT}" in the class')
    if problem := check_version(version):
        return problem
    if (own := getattr(found, "name", None)) != name:
        return Problem(f"its entry point is called {name!r} and its class {own!r}", "give both the same name")
    if not isinstance(getattr(found, "device_type", None), str):
        return Problem(f"{found.__qualname__} has no device_type", "set device_type to torch's name of the device")
    if missing := sorted(found.__abstractmethods__):
        return Problem(f"{found.__qualname__} lacks {', '.join(missing)}", "write it, or derive from TorchPlatform")
    if unknown := check_overrides(found, Platform):
        return Problem("; ".join(unknown), "call what was meant by its name, and begin names of helpers with _")
    return None


def check_version(contract: str) -> Problem | None:
    """Whether a plugin written for this contract version loads; the rule is `LOADABLE`."""
    if not (match := re.fullmatch(r"(\d+)\.(\d+)", contract)):
        return Problem(f"its contract {contract!r} is not a version", f'write it as major.minor: "{CONTRACT}"')
    major, minor = map(int, match.groups())
    cause = f"it was written for contract {contract}, and this engine has {CONTRACT}"
    if major < min(LOADABLE):
        return Problem(f"{cause}, which takes {min(LOADABLE)}.0 and later", "install a newer version of the plugin")
    if minor > LOADABLE.get(major, -1):
        return Problem(cause, "upgrade the engine (pip install -U engine), or install an older version of the plugin")
    return None


def check_overrides(cls: type, base: type) -> list[str]:
    """Public methods and properties of a plugin's class that the contract does not have, a sentence each.

    Nothing calls such a method: it is misspelt, was removed, or is a helper that wants an underscore.

    Args:
        cls: the plugin's class.
        base: the class of `engine.interfaces` that it implements.
    """
    allowed = {name for c in cls.__mro__ if _speaks(c) for name in {*vars(c), *vars(c).get("__annotations__", ())}}
    problems = []
    for owner in cls.__mro__:
        if _speaks(owner) or owner.__module__.partition(".")[0] in _NEUTRAL:
            continue
        for name, value in vars(owner).items():
            data = isinstance(value, types.MemberDescriptorType) or not (callable(value) or hasattr(value, "__get__"))
            if not data and not name.startswith("_") and name not in allowed:
                problems.append(f"{owner.__qualname__}.{name} {_advice(name, base)}")
    return problems


def _speaks(cls: type) -> bool:
    return f"{cls.__module__}.".startswith(_VOCABULARY)


def _advice(name: str, base: type) -> str:
    if replacement := REMOVED.get(f"{base.__name__}.{name}"):
        return f"was removed from the contract: use {replacement}"
    close = difflib.get_close_matches(name, [n for n in dir(base) if not n.startswith("_")], 1)
    return "overrides nothing in the contract" + (f": did you mean {close[0]}?" if close else "")
