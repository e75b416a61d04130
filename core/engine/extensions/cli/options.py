"""Command-line flags made from the option dataclasses, so that a flag, its type and its help are written once."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.errors import ConfigError


def documented(cls: type) -> dict[str, str]:
    """Field name to its sentence in the class's docstring (Google style, ``Args:``)."""
    text = (cls.__doc__ or "").partition("Args:")[2]
    found = re.findall(r"^        (\w+): (.*(?:\n {12,}.*)*)", text, re.MULTILINE)
    return {name: " ".join(line.replace("``", "").split()) for name, line in found}


def add_flags(parser: argparse.ArgumentParser, cls: type, title: str, skip: Iterable[str] = ()) -> None:
    """A flag for each field of the dataclass: ``max_model_len`` becomes ``--max-model-len``."""
    group = parser.add_argument_group(title)
    hints, help_of = typing.get_type_hints(cls), documented(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        flag, kind = "--" + field.name.replace("_", "-"), _bare(hints[field.name])
        about: dict[str, Any] = {"dest": field.name, "default": None, "help": help_of[field.name].replace("%", "%%")}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **about)
        elif typing.get_origin(kind) is Literal:
            group.add_argument(flag, choices=typing.get_args(kind), **about)
        elif typing.get_origin(kind) is list and typing.get_args(kind)[0] in (int, str):
            group.add_argument(flag, nargs="+", type=typing.get_args(kind)[0], **about)
        elif typing.get_origin(kind) is dict:
            group.add_argument(flag, type=_json_object, metavar="JSON", **about)
        elif kind in (int, float, str):
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **about)


class FromFile(argparse.Action):
    """``--config FILE``: flags from a file of YAML or JSON, by their names; those on the command line win."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Read the file, as if its flags had come first."""
        found = _read(Path(values))
        model = found.pop("model", None)
        words = [word for name, value in found.items() for word in _words(name, value)]
        for name, value in {**vars(parser.parse_args(words)), "model": model}.items():
            if value is not None and getattr(namespace, name, None) is None:
                setattr(namespace, name, value)
                parser.set_defaults(**{name: value})  # a word that is left out gets its default at the end


def _read(path: Path) -> dict[str, Any]:
    try:
        found = msgspec.yaml.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"config {str(path)!r} must be a file of YAML with a flag a line: {error}") from error
    if "config" in found:
        raise ConfigError(f"config {str(path)!r} names another one; put all flags into one file")
    return found


def _words(name: str, value: Any) -> list[str]:
    """A flag as on the command line."""
    flag = "--" + name.replace("_", "-")
    if value is None or value == []:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]  # it may begin with a dash


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of the dataclass that the user set, for ``cls(**given(args, cls))``."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def _bare(hint: Any) -> Any:
    """The type without ``| None``; of a union, the last member, which is the general one."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [t for t in typing.get_args(hint) if t is not type(None)][-1]
    return hint


def _json_object(text: str) -> dict[Any, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is needed, got {text!r}")
    return {int(k) if k.lstrip("-").isdigit() else k: v for k, v in value.items()}
