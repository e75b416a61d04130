"""Plugins as the metadata of installed distributions names them: nothing of a plugin runs until it is loaded."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import importlib_metadata

from engine.errors import PluginError

PLATFORMS = "engine.platforms"
"""The entry-point group of platforms, `engine.interfaces.Platform`."""

FAMILIES = "engine.platform_families"
"""The entry-point group of functions from a word to a platform, which ``--platform FAMILY:WORD`` calls."""

HOOKS = "engine.plugins"
"""The entry-point group of hooks, `engine.hooks`."""

RUNNERS = "engine.runners"
"""The entry-point group of subclasses of `engine.runner.ModelRunner`, each for the models that its ``claims`` says."""

ENV_PLATFORM = "ENGINE_PLATFORM"
"""The environment variable that names the platform where no argument does."""

CHOOSE = f"--platform NAME, {ENV_PLATFORM}=NAME or LLM(platform=NAME)"
"""How users choose a platform, for messages."""

_KINDS = {PLATFORMS: "platform plugin", FAMILIES: "platform family", HOOKS: "hook plugin", RUNNERS: "runner"}


@dataclass(frozen=True)
class Plugin:
    """One entry point, ``name = "module:attribute"``.

    Attributes:
        group: `PLATFORMS`, `FAMILIES` or `HOOKS`.
        name: unique in its group; what ``--platform`` selects.
        target: what it points to.
        distribution, version: who declares it.
        rivals: other distributions that declare the same name; `load` refuses then.
    """

    group: str
    name: str
    target: str
    distribution: str
    version: str
    rivals: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{_KINDS[self.group]} {self.name!r} ({self.distribution} {self.version})"

    def fault(self, cause: str, remedy: str, kind: type[PluginError] = PluginError) -> PluginError:
        """The error to raise: it names this plugin, its distribution, the cause, the remedy, and how to do without."""
        without = f"choose another platform with {CHOOSE}"
        if self.group == HOOKS:
            without = f"pip uninstall {self.distribution}"
        return kind(f"{self}: {cause}\nremedy: {remedy}; to go on without it: {without}")

    def load(self) -> object:
        """Import the plugin and return what its entry point names; whatever goes wrong is a `PluginError`."""
        if self.rivals:
            raise self.fault(
                f"{' and '.join(self.rivals)} declares a {_KINDS[self.group]} of the same name",
                f"keep one of them: pip uninstall {self.distribution}, or the other",
            )
        repair = f"correct the entry point {self.name!r} in the plugin's pyproject.toml and install it again"
        entry = importlib_metadata.EntryPoint(self.name, self.target, self.group)
        try:
            # An extra in brackets is no part of the path, and a value that is no path at all raises here.
            module_name, path = entry.module, entry.attr or ""
        except ValueError as error:
            raise self.fault(f"its entry point {self.target!r} is not of the form module:attribute", repair) from error
        try:
            found: object = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == module_name
            remedy = repair if missing else f"install what it needs, or another version of {self.distribution}"
            raise self.fault(f"cannot be imported: {describe(error)}", remedy) from error
        for attribute in filter(None, path.split(".")):
            try:
                found = getattr(found, attribute)
            except AttributeError as error:
                raise self.fault(f"its entry point is {self.target!r}, but {error}", repair) from error
        return found


def describe(error: BaseException) -> str:
    """An exception in a line: ``ImportError: no module named ...``."""
    return f"{type(error).__name__}: {error}".strip(": ")


def discover(group: str) -> tuple[Plugin, ...]:
    """All plugins of a group, by name. Of a distribution that is installed twice, the first on the path counts."""
    entries: dict[tuple[str, str], tuple[str, importlib_metadata.EntryPoint]] = {}
    for entry in importlib_metadata.entry_points(group=group):
        distribution, version = _origin(entry)
        entries.setdefault((entry.name, distribution), (version, entry))
    return tuple(
        Plugin(
            group=group,
            name=name,
            target=entry.value,
            distribution=distribution,
            version=version,
            rivals=tuple(f"{d} {v}" for (n, d), (v, _) in entries.items() if n == name and d != distribution),
        )
        for (name, distribution), (version, entry) in sorted(entries.items(), key=lambda item: item[0])
    )


def _origin(entry: importlib_metadata.EntryPoint) -> tuple[str, str]:
    try:
        return (entry.dist.name, entry.dist.version) if entry.dist else ("unknown distribution", "")
    except FileNotFoundError:
        # What an interrupted (un)installation leaves behind.
        return "unknown distribution", "without metadata"
