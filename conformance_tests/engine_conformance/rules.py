"""What a plugin may not do: import the engine's inside, or change anything of ours.

A vendor needs nothing but ``engine_sdk``. What a plugin takes from elsewhere may be gone in the next release, and what
it patches breaks for everybody.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

from engine.errors import EngineError
from engine.plugins import load_platform
from engine_conformance.subject import OURS, ending, packages, safe_path

_MARK = "engine_conformance.rules: "
_WATCHED = ("engine", "engine_sdk")


def forbidden_imports(platform: Any) -> list[str]:
    """Where the modules of a platform's plugin name a module of ``engine``, as ``"file:line: name"``.

    Within functions too, and where the name is a text that is imported. Defaults of ours have no plugin to look at.
    """
    if type(platform).__module__.partition(".")[0] in OURS:
        return []
    found = []
    for place in packages(platform):
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            named = imported(file.read_text(encoding="utf-8"))
            found += [f"{file.relative_to(place.parent)}:{line}: {name}" for name, line in named if _is_engine(name)]
    return found


def imported(source: str) -> Iterator[tuple[str, int]]:
    """What a module imports by its absolute name, and in which lines."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=str(name), level=0):
                yield name, node.lineno
            case ast.Call(
                func=ast.Name("__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str(name)), *_],
            ):
                yield name, node.lineno
            case ast.Subscript(value=ast.Attribute(attr="modules"), slice=ast.Constant(str(name))):
                yield name, node.lineno


def _is_engine(name: str) -> bool:
    return name.partition(".")[0] == "engine"


def patches(name: str, timeout: float = 240.0) -> list[str]:
    """Functions and classes of ours that are others once a platform was loaded and used, asked in another process."""
    command = [sys.executable, *safe_path(), "-m", __name__, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return [str(found) for found in json.loads(line.removeprefix(_MARK))]
    raise AssertionError(f"the process that loads the platform {ending(done.returncode)}:\n{done.stderr[-4000:]}")


def snapshot() -> dict[str, object]:
    """The functions, classes and methods of ours by their full names; a function stands with its code."""
    found: dict[str, object] = {}
    for label in sorted(sys.modules):
        module = sys.modules[label]
        if label.partition(".")[0] in _WATCHED and isinstance(module, types.ModuleType):
            for name, value in vars(module).items():
                if inspect.isroutine(value) or isinstance(value, type):
                    found[f"{label}.{name}"] = _identity(value)
                if isinstance(value, type) and value.__module__ == label:
                    found |= {f"{label}.{name}.{part}": _identity(x) for part, x in vars(value).items() if _is_code(x)}
    found |= {f"transformers, {where}": _identity(value) for where, value in _registered()}
    return found


def _is_code(value: object) -> bool:
    return inspect.isroutine(value) or isinstance(value, property | staticmethod | classmethod | type)


def _identity(value: object) -> object:
    """The object and its code, which can be exchanged in place."""
    return value, getattr(value, "__code__", None), getattr(value, "__defaults__", None)


def _registered() -> Iterator[tuple[str, object]]:
    """What we registered with Transformers under our names."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface

    for registry in (AttentionInterface(), ExpertsInterface()):
        for key in registry.valid_keys():
            if str(key).startswith("engine"):
                yield f"{type(registry).__name__} {key}", registry[key]


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Names that stand for something else than before, or for nothing."""
    return [name for name, value in before.items() if not _same(value, after.get(name))]


def _same(a: object, b: object) -> bool:
    return isinstance(a, tuple) and isinstance(b, tuple) and all(x is y for x, y in zip(a, b, strict=True))


def use(name: str) -> None:
    """Load a platform and do with it what makes a plugin do its work: devices, an attention call, its other parts."""
    from engine_sdk import GroupSpec, UnsupportedCapability

    platform = load_platform(name)
    platform.device().activate()
    parts = (
        platform.capabilities,
        platform.ops,
        platform.graphs,
        platform.compiler,
        platform.memory,
        lambda: platform.linear(None),
        lambda: platform.communicator(GroupSpec("tp", (0,), 0)),
        lambda: _attend(platform),
    )
    for part in parts:
        try:
            part()
        except UnsupportedCapability:
            continue
    platform.device().synchronize()


def _attend(platform: Any) -> None:
    from engine_conformance.arena import check
    from engine_conformance.cases import Case, Row, block, layer

    declared = platform.capabilities()
    spec = layer(declared)
    check(platform, platform.attention(spec), Case(spec, block(declared), (Row(3, 1), Row(0, 5))))


def load_ours() -> None:
    """Import every module of ours that can be imported here, so that a later import is no change."""
    for label in _WATCHED:
        package = importlib.import_module(label)
        for module in pkgutil.walk_packages(package.__path__, f"{label}.", onerror=lambda _: None):
            if not module.name.endswith("__main__") and ".template" not in module.name:
                try:
                    importlib.import_module(module.name)
                except (ImportError, EngineError):  # of an extra that is not installed
                    continue


def main(words: list[str]) -> int:
    """Print what a platform, the first of `words`, changes."""
    load_ours()
    before = snapshot()
    use(words[0])
    print(f"\n{_MARK}{json.dumps(changed(before, snapshot()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
