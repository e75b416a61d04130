"""Which platform runs, and which hooks are called. A plugin that is installed and broken is an error, never skipped."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import pluggy

from engine import hooks
from engine.discovery import CHOOSE, ENV_PLATFORM, FAMILIES, HOOKS, PLATFORMS, Plugin, describe, discover
from engine.errors import (
    AmbiguousPlatformError,
    ConfigError,
    ContractError,
    PlatformNotFoundError,
    PlatformUnavailableError,
)

if TYPE_CHECKING:
    from engine.info import EngineStats
    from engine.interfaces import Platform, Probe


def load_platform(name: str | None = None, device_index: int = 0) -> Platform:
    """Select a platform, as `select_platform` does, and make it.

    Args:
        name: the platform; None takes the environment's choice, or the accelerator that is available.
        device_index: which of its devices.
    """
    return select_platform(name).create(device_index)


@dataclass(frozen=True)
class Candidate:
    """A platform whose class keeps the contract, and what its probe said."""

    plugin: Plugin
    platform: type[Platform]
    probe: Probe

    def create(self, device_index: int = 0) -> Platform:
        """Make the platform for one device; raises `ConfigError` for a device that the accelerator does not have."""
        indices = [d.index for d in self.probe.devices]
        # A host's platform may be asked for more ranks than it lists devices: they share it.
        if self.probe.accelerator and indices and device_index not in indices:
            raise ConfigError(f"device_index {device_index}: {self.plugin} has {', '.join(map(str, indices))}")
        try:
            return self.platform(device_index)
        except Exception as error:
            raise self.plugin.fault(f"its constructor raised {describe(error)}", "see its documentation") from error


def examine(plugin: Plugin) -> Candidate:
    """Load a platform's class, check it against the contract, and only then probe; raises `PluginError`."""
    from engine.contract import check_platform
    from engine.interfaces import Probe

    found = plugin.load()
    if plugin.group == FAMILIES:
        found = cast("Callable[[str], object]", found)(plugin.name.partition(":")[2])
    if problem := check_platform(found, plugin.name):
        raise plugin.fault(*problem, ContractError)
    platform = cast("type[Platform]", found)
    report = "upgrade it, or report it to its authors"
    try:
        probe = platform.probe()
    except Exception as error:
        raise plugin.fault(f"probe() raised {describe(error)}", report) from error
    if not isinstance(probe, Probe):
        raise plugin.fault(f"probe() returned a {type(probe).__name__}, not a Probe", report, ContractError)
    return Candidate(plugin, platform, probe)


def select_platform(name: str | None = None) -> Candidate:
    """Find the platform to run; nothing is made yet.

    A named one is loaded alone. Otherwise all are loaded and probed: the one accelerator that is available wins, and
    the platform of the host runs where there is none.

    Args:
        name: the platform; None takes ``ENGINE_PLATFORM``.

    Raises:
        PlatformNotFoundError: none is installed, or none of that name.
        PlatformUnavailableError: it, or every one, cannot run here.
        AmbiguousPlatformError: several can, and none was named.
        PluginError: one that was considered is broken.
    """
    plugins = discover(PLATFORMS)
    if not plugins:
        raise PlatformNotFoundError("no platform is installed\nremedy: install the engine again: pip install -U engine")
    if name := name or os.environ.get(ENV_PLATFORM):
        candidate = examine(_find(name, plugins))
        if not candidate.probe.available:
            raise candidate.plugin.fault(
                f"it cannot run here: {candidate.probe.reason}", "see the cause", PlatformUnavailableError
            )
        return candidate
    return _choose([examine(plugin) for plugin in plugins])


def _find(name: str, plugins: Sequence[Plugin]) -> Plugin:
    for plugin in plugins:
        if plugin.name == name:
            return plugin
    for family in discover(FAMILIES):
        if family.name == name.partition(":")[0]:
            return replace(family, name=name)
    close = difflib.get_close_matches(name, [p.name for p in plugins], 1)
    installed = ", ".join(f"{p.name} ({p.distribution} {p.version})" for p in plugins)
    raise PlatformNotFoundError(
        f"no platform {name!r} is installed"
        + (f": did you mean {close[0]!r}?" if close else "")
        + f"\ninstalled: {installed}\nremedy: install the distribution that has it, or choose one with {CHOOSE}"
    )


def _choose(candidates: Sequence[Candidate]) -> Candidate:
    usable = [c for c in candidates if c.probe.available]
    best = [c for c in usable if c.probe.accelerator] or usable
    if len(best) == 1:
        return best[0]
    if best:
        named = " and ".join(str(c.plugin) for c in best)
        raise AmbiguousPlatformError(f"{len(best)} platforms can run here: {named}\nremedy: choose one with {CHOOSE}")
    reasons = "\n".join(f"  {c.plugin}: {c.probe.reason}" for c in candidates)
    raise PlatformUnavailableError(f"no platform can run here\n{reasons}\nremedy: install what one of them asks for")


@functools.cache
def get_hooks() -> Hooks:
    """The hooks of all plugins, loaded once a process; raises `PluginError` when one is broken."""
    return Hooks(discover(HOOKS))


def _table(hook: str) -> Callable[[Hooks], dict[str, Callable[..., Any]]]:
    """A method: what the plugins answer to `hook`, by name; raises `PluginError` where two have one name."""
    return lambda self: {name: found for name, (_, found) in self._merge(hook).items()}


def pick(option: str, name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """What `table` has for the word that `option` took; raises `ConfigError` with the words that there are."""
    if name not in table:
        words = ", ".join(sorted(table)) or "none; install the engine again"
        raise ConfigError(f"no {option} {name!r}; there are: {words}")
    return table[name]


class Hooks:
    """Calls what `engine.hooks` specifies; each plugin has a manager of its own, so a failure has a name."""

    engine_models, engine_load_formats = _table("engine_models"), _table("engine_load_formats")
    engine_swaps, engine_executors = _table("engine_swaps"), _table("engine_executors")
    engine_tokenizers, engine_quantization = _table("engine_tokenizers"), _table("engine_quantization")

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        """Load and register `plugins`; raises `PluginError` for a wrong signature or a hook that does not exist."""
        self._managers = [(plugin, _register(plugin)) for plugin in plugins]

    def engine_config_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The plugins' values for options that are None in `options`; raises `PluginError` where two disagree."""
        answers = self._merge("engine_config_defaults", options=options)
        for name, (plugin, _) in answers.items():
            if name not in options:
                close = difflib.get_close_matches(name, options, 1)
                hint = f": did you mean {close[0]!r}?" if close else ""
                raise plugin.fault(
                    f"engine_config_defaults names an option {name!r} that does not exist{hint}",
                    "upgrade it, or report it to its authors",
                )
        return {name: value for name, (_, value) in answers.items() if options[name] is None}

    def engine_grammars(self, options: Mapping[str, Any], vocab_size: int) -> Any:
        """What holds outputs to a form, None if no plugin does; raises `PluginError` where two do."""
        return self._merge("engine_grammars", options=options, vocab_size=vocab_size).get("grammars", (None, None))[1]

    def engine_stats(self, stats: EngineStats) -> None:
        """Hand a snapshot to all sinks."""
        for _ in self._ask("engine_stats", stats=stats):
            pass

    def _ask(self, hook: str, **arguments: object) -> Iterator[tuple[Plugin, Any]]:
        for plugin, manager in self._managers:
            try:
                answers = getattr(manager.hook, hook)(**arguments)
            except Exception as error:
                raise plugin.fault(f"{hook} raised {describe(error)}", "report it to its authors") from error
            yield from ((plugin, answer) for answer in answers)

    def _merge(self, hook: str, **arguments: object) -> dict[str, tuple[Plugin, Any]]:
        merged: dict[str, tuple[Plugin, Any]] = {}
        for plugin, answer in self._ask(hook, **arguments):
            if not isinstance(answer, Mapping):
                raise plugin.fault(f"{hook} returned a {type(answer).__name__}, not a mapping", "upgrade it")
            for name, value in answer.items():
                first, other = merged.setdefault(name, (plugin, value))
                if other != value:
                    raise plugin.fault(
                        f"{hook} answers {value!r} for {name!r}, and {first} answers {other!r}",
                        f"keep one of them: pip uninstall {plugin.distribution}, or the other",
                    )
        return merged


def _register(plugin: Plugin) -> pluggy.PluginManager:
    found = plugin.load()
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    specified = [name for name in vars(hooks) if name.startswith("engine_")]
    if isinstance(found, type):
        raise plugin.fault(f"its entry point names a class, {found.__qualname__}", "name an instance, or a module")
    try:
        manager.register(found, plugin.name)
        manager.check_pending()
    except (pluggy.PluginValidationError, TypeError) as error:
        remedy = f"upgrade it; this engine has {', '.join(specified)}"
        raise plugin.fault(" ".join(str(error).split()), remedy) from error
    called = {caller.name for caller in manager.get_hookcallers(found) or ()}
    unmarked = [name for name in specified if callable(getattr(found, name, None)) and name not in called]
    if unmarked or not called:
        what = f"{', '.join(unmarked)} is not marked" if unmarked else "it has no function that is marked"
        raise plugin.fault(f"{what} as a hook, so nothing would call it", "mark its functions with hookimpl")
    return manager
