"""Distributions that exist for one test: real metadata and modules in a folder at the front of the path."""

import importlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

# A shell that starts pytest in the background has it ignore interrupts, and whatever a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

DUMMY_BASE = '''
"""What the dummy platforms share: a platform that can be probed, made and asked what it can do, and no more."""

from engine.interfaces import Capabilities, DeviceInfo, Platform, Probe

MADE = []


class Base(Platform):
    device_type = "cpu"
    contract = "1.0"
    _probe = Probe(True, devices=(DeviceInfo(0, "Dummy One", 3 << 30), DeviceInfo(1, "Dummy One", 3 << 30)))

    def __init__(self, device_index=0):
        super().__init__(device_index)
        MADE.append(self.name)

    @classmethod
    def probe(cls):
        return cls._probe

    def capabilities(self):
        return Capabilities()

    device = attention = ops = linear = experts = communicator = graphs = compiler = memory = configure = None


class HostBase(Base):
    _probe = Probe(True, accelerator=False)
'''


class Install(Protocol):
    """Writes a distribution with entry points of one group; `modules` maps module names to their source."""

    def __call__(
        self,
        distribution: str,
        entry_points: Mapping[str, str],
        modules: Mapping[str, str] = ...,
        *,
        version: str = ...,
        group: str = ...,
    ) -> None: ...


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed distributions at the front of the path, of this process and of those it starts."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "dummy_base.py").write_text(DUMMY_BASE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, sys.path)]))
    monkeypatch.delenv("ENGINE_PLATFORM", raising=False)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name, module in list(sys.modules.items()):
        if str(folder) in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def install(site: Path) -> Install:
    """Installs dummy distributions; the platforms of this checkout are hidden, so that no test depends on hardware."""

    def install(
        distribution: str,
        entry_points: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        *,
        version: str = "1.0",
        group: str = "engine.platforms",
    ) -> None:
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = "".join(f"{name} = {target}\n" for name, target in entry_points.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        for module, source in (modules or {}).items():
            (site / f"{module}.py").write_text(source)
        importlib.invalidate_caches()

    # Of two distributions of one name the first on the path counts, so this one stands in for the installed engine.
    host = 'from dummy_base import HostBase\nclass Host(HostBase):\n    name = "host"\n'
    install("engine", {"host": "dummy_host:Host"}, {"dummy_host": host})
    return install
