"""Write the repository of a hardware plugin, which passes conformance as it is where torch drives the device.

`engine plugin new NAME`, and `engine plugin diff` for a repository that an earlier template made. The files are those
of `template/base`, and of `template/triton` over them where asked for: their suffix ``.tmpl`` goes, ``NAME`` in a path
and ``$name`` and the like in a text are replaced.
"""

from __future__ import annotations

import keyword
import re
import tomllib
from collections.abc import Iterator
from difflib import unified_diff
from importlib.metadata import entry_points, version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from engine.errors import ConfigError
from engine.interfaces import CONTRACT

TEMPLATE = 2
"""The template's version, raised by each change to its files."""

_SUFFIX = ".tmpl"
_NOTE = ".engine-plugin.toml"
_OURS = ("sdk", "conformance")  # engine_sdk and engine_conformance are packages of the engine


def write_plugin(name: str, device_type: str | None = None, *, triton: bool = False, directory: Path = Path()) -> Path:
    """Write the repository ``engine-plugin-NAME`` into `directory`, which is made if needed.

    Args:
        name: the platform's; lower case, a Python identifier, and not that of another distribution's platform.
        device_type: torch's name of the device; None: the same.
        triton: with the SDK's kernels in Triton; it needs a device other than the host.
        directory: the repository's parent.

    Returns:
        The repository's folder.

    Raises:
        ConfigError: a name that cannot be used, Triton for the host, or the folder exists; nothing was written.
    """
    _check_name(name)
    device_type = name if device_type is None else device_type
    if not re.fullmatch("[a-z][a-z0-9_]*", device_type):
        raise ConfigError(f"device type {device_type!r} is not torch's: it is lower case and has no index, like 'xpu'")
    if triton and device_type == "cpu":
        raise ConfigError("Triton has no kernels for the host: leave out --triton, or name another --device-type")
    target = directory / f"engine-plugin-{name}"
    if target.exists():
        raise ConfigError(f"{target} exists already\nremedy: move it away, or write elsewhere with --directory DIR")
    for path, text in _render(name, device_type, triton).items():
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    return target


def compare_plugin(folder: Path) -> str:
    """What would make a repository as this engine's template writes it: a patch that ``git apply`` takes.

    Where the author changed a file on purpose, the patch would undo it; take over the parts that are wanted.

    Args:
        folder: of a repository that `write_plugin` wrote, with its ``.engine-plugin.toml``.

    Raises:
        ConfigError: the folder has no ``.engine-plugin.toml``, or one that `write_plugin` did not write.
    """
    noted = folder / _NOTE
    try:
        made = tomllib.loads(noted.read_text("utf-8"))
        name, device_type, triton = (made[key] for key in ("name", "device_type", "triton"))
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(
            f"{noted} does not say what the repository was made from: {error}\n"
            "remedy: name a folder that engine plugin new wrote"
        ) from error
    patch: list[str] = []
    for path, text in sorted(_render(name, device_type, triton).items()):
        mine = (folder / path).read_text("utf-8") if (folder / path).is_file() else ""
        old = f"a/{path}" if (folder / path).is_file() else "/dev/null"
        patch += unified_diff(mine.splitlines(True), text.splitlines(True), old, f"b/{path}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in patch)


def _render(name: str, device_type: str, triton: bool) -> dict[str, str]:
    """Relative path to text of each file of a repository."""
    values = {
        "name": name,
        "class_name": "".join(part.capitalize() for part in name.split("_")) + "Platform",
        "device_type": device_type,
        "triton": str(triton).lower(),
        "contract": CONTRACT,
        "engine": version("engine"),
        "template": TEMPLATE,
    }
    template = files("engine_sdk") / "template"
    texts = dict(_files(template / "base"))
    if triton:
        texts |= _files(template / "triton")
    return {path.replace("NAME", name): Template(text).substitute(values) for path, text in texts.items()}


def _check_name(name: str) -> None:
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name in _OURS:
        raise ConfigError(
            f"{name!r} cannot name a plugin: it becomes part of a package's name and what --platform selects\n"
            "remedy: use a lower-case letter, then lower-case letters, digits and _; no word of Python's, nor "
            + " or ".join(_OURS)
        )
    for group in ("engine.platforms", "engine.platform_families"):
        for entry in entry_points(group=group, name=name):
            # The plugin itself may be installed while a later template is written beside it.
            owner = entry.dist.name if entry.dist else "unknown"
            if re.sub("[-_.]+", "-", owner) != re.sub("[-_.]+", "-", f"engine-plugin-{name}"):
                raise ConfigError(
                    f"{owner} has a platform {name!r} already, and two of a name cannot be told apart\n"
                    "remedy: choose another name"
                )


def _files(folder: Traversable, path: str = "") -> Iterator[tuple[str, str]]:
    """Relative path and text of each file of a template."""
    for item in folder.iterdir():
        if item.is_dir():
            yield from _files(item, f"{path}{item.name}/")
        elif item.name.endswith(_SUFFIX):
            yield path + item.name.removesuffix(_SUFFIX), item.read_text("utf-8")
