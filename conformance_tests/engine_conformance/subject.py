"""What is tested: a platform, who has it, which files it is made of, and where it runs.

``python -m engine_conformance.subject NAME`` prints it as JSON, so that another process can ask for a platform that may
crash when it is loaded.
"""

from __future__ import annotations

import json
import platform as host
import signal
import subprocess
import sys
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import msgspec

from engine.discovery import PLATFORMS, describe, discover
from engine.errors import EngineError, PluginError
from engine.plugins import load_platform
from engine.version import __version__
from engine_conformance.results import Subject, Suite

MUTATION = Path(__file__).with_name("mutation.json")
"""What ``scripts/mutation`` wrote: ``killed`` of ``faulty`` backends, ``passed`` of ``correct`` ones."""

OURS = ("engine", "engine_sdk", "engine_conformance")
"""Packages of this project that are no plugin's."""

_MARK = "engine_conformance.subject: "
_PATIENCE = 300.0
_DRIVERS = ("nvidia", "amdgpu", "xe", "i915", "habanalabs", "metax", "mthreads", "davinci")
"""Kernel modules of accelerators, which say their version in sysfs."""


def subject_of(platform: Any, driver: str = "") -> Subject:
    """Describe a platform that was made; raises `PluginError` where it cannot say what it can do.

    Args:
        platform: an `engine_sdk.Platform`.
        driver: its driver's version, where the user knows it.
    """
    from engine_sdk import Capabilities

    try:
        capabilities = platform.capabilities()
        probe = platform.probe()
    except Exception as error:
        raise PluginError(
            f"platform {platform.name!r}: {describe(error)}\nremedy: capabilities() and probe() must not raise"
        ) from error
    if not isinstance(capabilities, Capabilities):
        raise PluginError(
            f"platform {platform.name!r}: capabilities() returned a {type(capabilities).__name__}\n"
            "remedy: return an engine_sdk.Capabilities"
        )
    distribution, version = _distribution(platform.name)
    return Subject(
        name=platform.name,
        contract=platform.contract,
        distribution=distribution,
        version=version,
        digest=digest(packages(platform)),
        device_type=platform.device_type,
        devices=tuple(device.name for device in probe.devices),
        driver=driver or (_driver() if probe.accelerator else ""),
        capabilities=capabilities.to_dict(),
    )


def ask(name: str, driver: str = "") -> Subject:
    """Describe a platform in a process of its own.

    Raises:
        PluginError: it cannot be loaded, its process died or did not answer; the message says which.
    """
    command = [sys.executable, *safe_path(), "-m", __name__, name, driver]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise PluginError(
            f"platform {name!r}: the process that loads it gave no answer within {_PATIENCE:g} s\n"
            f"remedy: see where it waits: python -X faulthandler -m {__name__} {name}"
        ) from error
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return msgspec.json.decode(line.removeprefix(_MARK), type=Subject)
    if done.returncode == 1 and done.stderr.startswith("error: "):
        raise PluginError(done.stderr.removeprefix("error: ").strip())
    raise PluginError(
        f"platform {name!r}: the process that loads it {ending(done.returncode)}\n{done.stderr[-2000:]}".strip()
    )


def ending(code: int) -> str:
    """How a process ended, in words: ``"died of SIGSEGV"``."""
    if code >= 0:
        return f"ended with exit status {code}"
    return f"died of {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"died of signal {-code}"


def safe_path() -> list[str]:
    """Python's options such that a process looks for modules where this one does."""
    return [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]


def suite() -> Suite:
    """This suite."""
    from engine_sdk import CONTRACT

    mutation = json.loads(MUTATION.read_text()) if MUTATION.exists() else {}
    return Suite(__version__, digest([Path(__file__).parent], leave=MUTATION), CONTRACT, mutation)


def software() -> dict[str, str]:
    """Versions of what runs beneath."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {**versions, "python": host.python_version(), "system": host.platform(terse=True)}


def packages(platform: Any) -> list[Path]:
    """The packages, or single modules, that a plugin is made of: its class's, and others of its distribution.

    Of a distribution that is ours, only the class's own counts.
    """
    own = type(platform).__module__.partition(".")[0]
    names = {own} if own in OURS else {own, *_others(_distribution(platform.name)[0])}
    return sorted(path for name in names if (path := _place(name)))


def _others(distribution: str) -> set[str]:
    """Top-level names of a distribution other than ours, from its files; of an editable one, those that are loaded."""
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return set()
    if found.metadata["Name"] == "engine":
        return set()
    names = {
        file.parts[0].removesuffix(".py")
        for file in found.files or ()
        if file.suffix == ".py" and not file.parts[0].endswith(".dist-info")
    }
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        root = Path(unquote(urlparse(origin["url"]).path))
        names |= {  # top-level modules alone: a device's module may stand in torch's namespace
            name
            for name, module in list(sys.modules.items())
            if "." not in name and (file := getattr(module, "__file__", None)) and Path(file).is_relative_to(root)
        }
    return {name for name in names if name.isidentifier() and name not in OURS}


def _place(name: str) -> Path | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file:
        from importlib.util import find_spec

        file = getattr(find_spec(name), "origin", None)
    if not file:
        return None
    return Path(file).parent if Path(file).stem == "__init__" else Path(file)


def _distribution(name: str) -> tuple[str, str]:
    from engine.plugins import select_platform

    found = next((p for p in discover(PLATFORMS) if p.name == name), None) or select_platform(name).plugin
    return found.distribution, found.version


def digest(places: list[Path], leave: Path | None = None) -> str:
    """SHA-256 over the names and bytes of files: the same wherever they lie.

    Args:
        places: packages, whole, but for what Python makes there; or single modules.
        leave: a file that does not count.
    """
    whole = sha256()
    for place in places:
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and file != leave:
                data = file.read_bytes()
                whole.update(f"{file.relative_to(place.parent).as_posix()}\0{len(data)}\0".encode() + data)
    return whole.hexdigest()


def _driver() -> str:
    found = (Path("/sys/module") / name / "version" for name in _DRIVERS)
    return next((f"{path.parent.name} {path.read_text().strip()}" for path in found if path.is_file()), "")


def main(words: list[str]) -> int:
    """Print the subject that `words` name, ``[NAME, DRIVER]``; the exit status."""
    try:
        found = subject_of(load_platform(words[0]), words[1] if len(words) > 1 else "")
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{_MARK}{msgspec.json.encode(found).decode()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
