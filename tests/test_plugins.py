"""Which platform is selected, and what is said when a plugin is missing, broken, or of another contract."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from engine import contract, plugins
from engine.contract import check_overrides, check_version
from engine.discovery import HOOKS, PLATFORMS, discover
from engine.errors import (
    AmbiguousPlatformError,
    ConfigError,
    ContractError,
    PlatformNotFoundError,
    PlatformUnavailableError,
    PluginError,
)
from engine.info import EngineStats
from engine.interfaces import CONTRACT, AttentionBackend
from engine.plugins import get_hooks, load_platform

Install = Callable[..., None]


def source(name: str, body: str = "", base: str = "Base") -> str:
    """A module with a platform class `P`."""
    head = "import functools\nfrom dummy_base import *\nfrom dummy_base import Base, HostBase\n"
    return f"{head}class P({base}):\n    name = {name!r}\n{indent(body, '    ')}\n"


def made() -> list[str]:
    """The dummy platforms that were constructed."""
    names: list[str] = importlib.import_module("dummy_base").MADE
    return names


def refuse(kind: type[Exception], name: str | None, *words: str) -> str:
    """Loading fails with exactly this error, its message has the words and a remedy, and nothing was run instead."""
    with pytest.raises(kind) as caught:
        load_platform(name)
    message = str(caught.value)
    assert type(caught.value) is kind
    for word in (*words, "remedy: "):
        assert word in message
    assert made() == []
    return message


def test_the_host_runs_where_nothing_else_is_installed(install: Install) -> None:
    assert load_platform().name == "host"
    assert made() == ["host"]


def test_an_available_accelerator_wins(install: Install) -> None:
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": source("npu")})
    platform = load_platform(device_index=1)
    assert (platform.name, platform.device_index, made()) == ("npu", 1, ["npu"])


def test_an_unavailable_accelerator_leaves_the_host(install: Install) -> None:
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": source("npu", '_probe = Probe(False, "no driver")')})
    assert load_platform().name == "host"
    assert made() == ["host"]


def test_a_named_platform_that_is_unavailable(install: Install) -> None:
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": source("npu", '_probe = Probe(False, "no driver")')})
    refuse(PlatformUnavailableError, "npu", "'npu' (dummy-npu 1.0)", "no driver")


def test_no_platform_is_available(install: Install) -> None:
    install(
        "engine", {"host": "dummy_host:P"}, {"dummy_host": source("host", '_probe = Probe(False, "too old a CPU")')}
    )
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": source("npu", '_probe = Probe(False, "no driver")')})
    refuse(PlatformUnavailableError, None, "'host' (engine 1.0): too old a CPU", "'npu' (dummy-npu 1.0): no driver")


def test_no_platform_is_installed(install: Install) -> None:
    install("engine", {})
    refuse(PlatformNotFoundError, None, "no platform is installed")


def test_two_accelerators_must_be_told_apart(install: Install) -> None:
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": source("npu")})
    install("dummy-xpu", {"xpu": "dummy_xpu:P"}, {"dummy_xpu": source("xpu")}, version="2.0")
    ways = ("--platform NAME", "ENGINE_PLATFORM=NAME", "LLM(platform=NAME)")
    refuse(AmbiguousPlatformError, None, "'npu' (dummy-npu 1.0)", "'xpu' (dummy-xpu 2.0)", *ways)
    assert load_platform("xpu").name == "xpu"


def test_the_environment_names_a_platform_and_an_argument_wins(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": source("npu")})
    monkeypatch.setenv("ENGINE_PLATFORM", "host")
    assert load_platform().name == "host"
    assert load_platform("npu").name == "npu"
    monkeypatch.setenv("ENGINE_PLATFORM", "")
    assert load_platform().name == "npu"


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_platform_that_is_not_installed(install: Install, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": source("npu")}, version="3.2.1")
    monkeypatch.setenv("ENGINE_PLATFORM", "npv")
    installed = ("host (engine 1.0)", "npu (dummy-npu 3.2.1)")
    refuse(PlatformNotFoundError, "npv" if by == "argument" else None, "'npv'", "did you mean 'npu'", *installed)


def test_a_device_that_the_accelerator_does_not_have(install: Install) -> None:
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": source("npu")})
    with pytest.raises(ConfigError, match=r"device_index 2.*'npu' \(dummy-npu 1.0\) has 0, 1"):
        load_platform("npu", 2)
    assert made() == []


def test_a_named_platform_is_loaded_alone(install: Install) -> None:
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": "raise RuntimeError('imported')"})
    assert load_platform("host").name == "host"
    assert "dummy_npu" not in sys.modules


def test_discovery_imports_nothing(install: Install) -> None:
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": "raise RuntimeError('imported')"})
    found = {p.name: f"{p.distribution} {p.version} {p.target}" for p in discover(PLATFORMS)}
    assert found == {"host": "engine 1.0 dummy_host:Host", "npu": "dummy-npu 1.0 dummy_npu:P"}
    assert not {"dummy_npu", "dummy_host"} & set(sys.modules)


BROKEN: Mapping[str, tuple[str, str, type[Exception], tuple[str, ...]]] = {
    "import fails": (
        "import a_driver_that_is_not_there",
        "dummy_npu:P",
        PluginError,
        ("No module named 'a_driver_that_is_not_there'", "install what it needs"),
    ),
    "import exits": ("raise SystemExit(0)", "dummy_npu:P", PluginError, ("SystemExit: 0",)),
    "attribute error inside": (
        "import sys\nsys.nothing",
        "dummy_npu:P",
        PluginError,
        ("cannot be imported", "nothing"),
    ),
    "module missing": ("", "dummy_npv:P", PluginError, ("dummy_npv", "correct the entry point 'npu'")),
    "attribute missing": ("", "dummy_npu:Npu", PluginError, ("'dummy_npu:Npu'", "correct the entry point 'npu'")),
    "target malformed": ("", "dummy-npu!", PluginError, ("'dummy-npu!'", "module:attribute", "correct the entry")),
    "function": ("def P(): pass", "dummy_npu:P", ContractError, ("a function, not a subclass of Platform", "Torch")),
    "other class": ("class P: pass", "dummy_npu:P", ContractError, ("P, not a subclass of Platform", "TorchPlatform")),
    "name differs": (source("mpu"), "dummy_npu:P", ContractError, ("'npu'", "'mpu'", "the same name")),
    "no contract": (source("npu", "contract = None"), "dummy_npu:P", ContractError, ('contract = "1.0"',)),
    "no device type": (source("npu", "device_type = 7"), "dummy_npu:P", ContractError, ("set device_type",)),
    "abstract": (
        "from engine.interfaces import Platform\nclass P(Platform): name, contract, device_type = 'npu', '1.0', 'cpu'",
        "dummy_npu:P",
        ContractError,
        ("lacks attention, capabilities,", "TorchPlatform"),
    ),
    "contract too new": (
        source("npu", 'contract = "1.1"'),
        "dummy_npu:P",
        ContractError,
        ("contract 1.1", "has 1.0", "pip install -U engine"),
    ),
    "contract of the future": (
        source("npu", 'contract = "2.0"'),
        "dummy_npu:P",
        ContractError,
        ("contract 2.0", "has 1.0", "pip install -U engine"),
    ),
    "contract too old": (
        source("npu", 'contract = "0.9"'),
        "dummy_npu:P",
        ContractError,
        ("contract 0.9", "takes 1.0 and later", "install a newer version of the plugin"),
    ),
    "contract malformed": (source("npu", 'contract = "one"'), "dummy_npu:P", ContractError, ("'one'", "major.minor")),
    "override unknown": (
        source("npu", "def graph(self): pass"),
        "dummy_npu:P",
        ContractError,
        ("P.graph overrides nothing", "did you mean graphs?", "begin names of helpers with _"),
    ),
    "property unknown": (
        source("npu", "warm = property(int)"),
        "dummy_npu:P",
        ContractError,
        ("P.warm overrides nothing in the contract\n", "begin names"),
    ),
    "override unknown in a base": (
        source("base", "@staticmethod\ndef graph(): pass") + "class Q(P):\n name = 'npu'",
        "dummy_npu:Q",
        ContractError,
        ("P.graph overrides nothing",),
    ),
    "override removed": (
        source("npu", "def old_graphs(self): pass"),
        "dummy_npu:P",
        ContractError,
        ("P.old_graphs was removed from the contract: use Platform.graphs",),
    ),
    "probe raises": (
        source("npu", "@classmethod\ndef probe(cls): raise OSError('bus error')"),
        "dummy_npu:P",
        PluginError,
        ("probe() raised OSError: bus error", "report it to its authors"),
    ),
    "probe returns a boolean": (
        source("npu", "@classmethod\ndef probe(cls): return True"),
        "dummy_npu:P",
        ContractError,
        ("probe() returned a bool, not a Probe", "report it to its authors"),
    ),
    "constructor raises": (
        source("npu", "def __init__(self, device_index=0): raise ValueError('firmware 7 is too old')"),
        "dummy_npu:P",
        PluginError,
        ("constructor raised ValueError: firmware 7 is too old",),
    ),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_an_error(install: Install, monkeypatch: pytest.MonkeyPatch, case: str, named: bool) -> None:
    module, target, kind, words = BROKEN[case]
    monkeypatch.setitem(contract.REMOVED, "Platform.old_graphs", "Platform.graphs")
    install("dummy-npu", {"npu": target}, {"dummy_npu": module}, version="3.2.1")
    message = refuse(kind, "npu" if named else None, "platform plugin 'npu' (dummy-npu 3.2.1): ", *words)
    assert message.endswith("choose another platform with --platform NAME, ENGINE_PLATFORM=NAME or LLM(platform=NAME)")


@pytest.mark.parametrize("contract_of_plugin", ["2.0", "0.9", "1.1"])
def test_the_contract_is_checked_before_the_device_is_touched(install: Install, contract_of_plugin: str) -> None:
    body = f"contract = {contract_of_plugin!r}\n@classmethod\ndef probe(cls): raise AssertionError('touched')"
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": source("npu", body)})
    refuse(ContractError, None, "'npu' (dummy-npu 1.0)", contract_of_plugin)


@pytest.mark.parametrize("name", ["npu", None])
def test_two_distributions_with_one_name(install: Install, name: str | None) -> None:
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": source("npu")})
    install("other-npu", {"npu": "other_npu:P"}, {"other_npu": source("npu")}, version="2.0")
    refuse(PluginError, name, "'npu' (dummy-npu 1.0)", "other-npu 2.0", "keep one of them: pip uninstall dummy-npu")
    assert load_platform("host").name == "host"


def test_what_a_plugin_may_define(install: Install) -> None:
    """Data, helpers with an underscore, the contract's names, and what a mixin of the standard library brings."""
    body = "LIMIT = 7\ndef _helper(self): pass\n@functools.cached_property\ndef graphs(self): pass"
    module = "import threading\n" + source("npu", body, base="threading.Thread, Base")
    install("dummy-npu", {"npu": "dummy_npu:P"}, {"dummy_npu": module})
    assert plugins.select_platform().plugin.name == "npu"


def test_overrides_of_other_interfaces() -> None:
    class Slotted:
        __slots__ = ("table",)

    class Backend(AttentionBackend, Slotted):
        features = frozenset({"softcap"})

        def layouts(self, block_size: int) -> None: ...

    (problem,) = check_overrides(Backend, AttentionBackend)
    assert problem.endswith("Backend.layouts overrides nothing in the contract: did you mean layout?")


def test_contracts_of_this_and_the_previous_major_load(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_version(CONTRACT) is None
    for major, minor in {2: 3, 1: 7}.items():
        monkeypatch.setitem(contract.LOADABLE, major, minor)
    loads = {v: check_version(v) is None for v in ("2.0", "2.3", "2.4", "1.0", "1.7", "1.8", "0.9", "3.0")}
    assert [v for v, ok in loads.items() if ok] == ["2.0", "2.3", "1.0", "1.7"]


def test_at_most_two_majors_load() -> None:
    newest = max(contract.LOADABLE)
    assert f"{newest}.{contract.LOADABLE[newest]}" == CONTRACT
    assert set(contract.LOADABLE) <= {newest, newest - 1}


@pytest.fixture
def hook(install: Install) -> Iterator[Callable[..., None]]:
    """Installs a hook plugin from the source of its module."""

    def add(body: str, name: str = "sink", distribution: str = "dummy-sink", target: str = "") -> None:
        module = f"dummy_{name}"
        text = f"import pluggy\nhookimpl = pluggy.HookimplMarker('engine')\nSEEN = []\n{body}"
        install(distribution, {name: target or module}, {module: text}, group=HOOKS, version="4.5")

    get_hooks.cache_clear()
    yield add
    get_hooks.cache_clear()


STATS = EngineStats(1, 2, 0.5, 0, 0, 0, 0, 0)
OPTIONS: dict[str, Any] = {"model": "m", "block_size": None, "max_num_seqs": 8}


def test_no_hooks(install: Install) -> None:
    hooks = plugins.Hooks([])
    hooks.engine_stats(STATS)
    assert hooks.engine_config_defaults(OPTIONS) == hooks.engine_models() == {}


def test_hooks_are_called_and_cached(hook: Callable[..., None]) -> None:
    hook("@hookimpl\ndef engine_stats(stats): SEEN.append(stats)")
    hook(
        "@hookimpl\ndef engine_config_defaults(options): return {'block_size': 32, 'max_num_seqs': 4}\n"
        "@hookimpl\ndef engine_models(): return {'LlamaForCausalLM': print}\n"
        "@hookimpl\ndef engine_stats(): SEEN.append('called')",
        "more",
        "dummy-more",
    )
    hooks = get_hooks()
    assert hooks is get_hooks()
    hooks.engine_stats(STATS)
    assert importlib.import_module("dummy_sink").SEEN == [STATS]
    assert importlib.import_module("dummy_more").SEEN == ["called"]
    assert hooks.engine_config_defaults(OPTIONS) == {"block_size": 32}
    assert hooks.engine_models() == {"LlamaForCausalLM": print}


BROKEN_HOOKS = {
    "import fails": ("import a_driver_that_is_not_there", "", ("a_driver_that_is_not_there", "install what it needs")),
    "wrong signature": (
        "@hookimpl\ndef engine_stats(step, stats): pass",
        "",
        ("engine_stats", "{'step'}", "upgrade it"),
    ),
    "unknown hook": (
        "@hookimpl\ndef engine_stat(stats): pass",
        "",
        ("unknown hook 'engine_stat'", "has engine_config"),
    ),
    "not marked": ("def engine_stats(stats): pass", "", ("engine_stats is not marked as a hook", "with hookimpl")),
    "nothing marked": ("def sink(stats): pass", "", ("no function that is marked", "with hookimpl")),
    "a class": ("class Sink: pass", "dummy_sink:Sink", ("names a class, Sink", "name an instance, or a module")),
}


@pytest.mark.parametrize("case", BROKEN_HOOKS)
def test_a_broken_hook_plugin_is_an_error(hook: Callable[..., None], case: str) -> None:
    body, target, words = BROKEN_HOOKS[case]
    hook(body, target=target)
    with pytest.raises(PluginError) as caught:
        get_hooks()
    for word in ("hook plugin 'sink' (dummy-sink 4.5): ", *words, "remedy: "):
        assert word in str(caught.value)
    assert str(caught.value).endswith("pip uninstall dummy-sink")


Call = Callable[[plugins.Hooks], object]
ASK_STATS: Call = lambda hooks: hooks.engine_stats(STATS)  # noqa: E731
ASK_MODELS: Call = lambda hooks: hooks.engine_models()  # noqa: E731
ASK_DEFAULTS: Call = lambda hooks: hooks.engine_config_defaults(OPTIONS)  # noqa: E731


@pytest.mark.parametrize(
    ("ask", "body", "words"),
    [
        (ASK_STATS, "def engine_stats(stats): 1 / 0", ("engine_stats raised ZeroDivisionError",)),
        (ASK_MODELS, "def engine_models(): return ['Llama']", ("engine_models returned a list, not a mapping",)),
        (
            ASK_DEFAULTS,
            "def engine_config_defaults(options): return {'block_sise': 1}",
            ("'block_sise' that does not exist", "did you mean 'block_size'"),
        ),
    ],
    ids=["raises", "wrong type", "unknown option"],
)
def test_a_hook_that_fails_has_a_name(hook: Callable[..., None], ask: Call, body: str, words: tuple[str, ...]) -> None:
    hook(f"@hookimpl\n{body}")
    hooks = get_hooks()
    with pytest.raises(PluginError) as caught:
        ask(hooks)
    for word in ("'sink' (dummy-sink 4.5)", *words, "remedy: "):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("ask", "body"),
    [
        (ASK_DEFAULTS, "def engine_config_defaults(): return {'block_size': VALUE}"),
        (ASK_MODELS, "def engine_models(): return {'Llama': 'VALUE'}"),
    ],
    ids=["defaults", "models"],
)
def test_hook_plugins_that_disagree(hook: Callable[..., None], ask: Call, body: str) -> None:
    for plugin, value in (("one", "16"), ("two", "32")):
        hook(f"@hookimpl\n{body.replace('VALUE', value)}", plugin, f"dummy-{plugin}")
    hooks = get_hooks()
    with pytest.raises(PluginError) as caught:
        ask(hooks)
    for word in ("16", "32", "'one' (dummy-one 4.5)", "'two' (dummy-two 4.5)", "remedy: keep one of them"):
        assert word in str(caught.value)


def test_hook_plugins_with_one_name(hook: Callable[..., None]) -> None:
    hook("@hookimpl\ndef engine_stats(stats): pass")
    hook("@hookimpl\ndef engine_stats(stats): pass", distribution="other-sink")
    with pytest.raises(
        PluginError, match=r"\(dummy-sink 4.5\): other-sink 4.5 declares a hook plugin of the same name"
    ):
        get_hooks()


@pytest.mark.usefixtures("install")
def test_a_plugin_that_pip_installed(site: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "really_npu").mkdir(parents=True)
    (project / "really_npu" / "__init__.py").write_text(source("npu"))
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "really-npu"\nversion = "0.3.0"\n'
        '[project.entry-points."engine.platforms"]\nnpu = "really_npu:P"\n'
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", str(site), str(project)], check=True)
    code = "from engine.plugins import load_platform as load; print(load().name, type(load()).__module__)"
    for environment, printed in (({}, "npu really_npu"), ({"ENGINE_PLATFORM": "host"}, "host dummy_host")):
        ran = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() == printed
