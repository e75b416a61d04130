"""Write the repository of a hardware plugin, which passes conformance as it is where torch drives the device.

`engine plugin new NAME`. The files are those of `template/base`, and of `template/triton` over them where asked for:
their suffix ``.tmpl`` goes, ``NAME`` in a path and ``$name`` and the like in a text are replaced.
"""

from __future__ import annotations

import argparse
import keyword
import re
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from engine.errors import ConfigError
from engine.interfaces import CONTRACT

TEMPLATE = 1
"""The template's version, raised by each change to its files."""

_SUFFIX = ".tmpl"
_OURS = ("sdk", "conformance")  # engine_sdk and engine_conformance are packages of the engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    new = parser.add_subparsers(required=True, metavar="new").add_parser(
        "new",
        help="write a new plugin's repository",
        description="Write a new plugin's repository.",
        allow_abbrev=False,
    )
    new.add_argument("name", metavar="NAME", help="what --platform will select: lower-case letters, digits and _")
    new.add_argument("--device-type", metavar="TYPE", help="torch's name of the device; NAME if not given")
    new.add_argument("--triton", action="store_true", help="add a kernel in Triton, which replaces the RMS norm")
    new.add_argument("--directory", type=Path, default=Path(), metavar="DIR", help="where engine-plugin-NAME is made")


def run(args: argparse.Namespace) -> int:
    """Write it, and say what to do next."""
    made = write_plugin(args.name, args.device_type, triton=args.triton, directory=args.directory)
    print(f"wrote {made}\nnext: cd {made} && pip install -e '.[test]' && engine platforms; then see its README.md")
    return 0


def write_plugin(name: str, device_type: str | None = None, *, triton: bool = False, directory: Path = Path()) -> Path:
    """Write the repository ``engine-plugin-NAME`` into `directory`, which is made if needed.

    Args:
        name: the platform's; lower case, a Python identifier, and not that of another distribution's platform.
        device_type: torch's name of the device; None: the same.
        triton: with a kernel in Triton; it needs a device other than the host.
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
    values = {
        "name": name,
        "class_name": "".join(part.capitalize() for part in name.split("_")) + "Platform",
        "device_type": device_type,
        "triton": str(triton).lower(),
        "triton_flag": " --triton" if triton else "",
        "contract": CONTRACT,
        "engine": version("engine"),
        "template": TEMPLATE,
    }
    template = files("engine_sdk") / "template"
    written = dict(_files(template / "base"))
    if triton:
        written |= _files(template / "triton")
    for path, text in written.items():
        place = target / path.replace("NAME", name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(Template(text).substitute(values), encoding="utf-8")
    return target


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
