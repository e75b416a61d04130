"""The command line: `engine COMMAND`. A command's module is imported when it is chosen, so that help comes at once."""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from engine.errors import EngineError
from engine.version import __version__


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        name: what the user types.
        help: a line in the list of commands.
        module: has ``add_arguments(parser) -> None`` and ``run(args) -> int``, the exit code; or, if it reads its words
            itself, ``main(words) -> int``.
        extra: the extra of this distribution that the command needs; told when something cannot be imported.
    """

    name: str
    help: str
    module: str
    extra: str = ""


COMMANDS = (
    Command("generate", "complete prompts", "engine.extensions.cli.generate"),
    Command("chat", "talk with a model", "engine.extensions.cli.chat"),
    Command("serve", "answer OpenAI's API over HTTP", "engine.extensions.cli.serve", extra="server"),
    Command("run-batch", "answer a file of OpenAI requests", "engine.extensions.cli.run_batch", extra="server"),
    Command("bench", "measure speed", "engine.extensions.cli.bench"),
    Command("platforms", "list the hardware plugins and what they can do", "engine.extensions.cli.platforms"),
    Command("doctor", "describe this installation, for a bug report", "engine.extensions.cli.doctor"),
    Command("plugin", "start a hardware plugin of your own, and find its faults", "engine_sdk.commands"),
    Command("conformance", "judge a platform: run the suite", "engine_conformance.command", "conformance"),
)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code; errors that are meant for users are a few lines on stderr."""
    words = sys.argv[1:] if argv is None else argv
    gc.set_threshold(20_000)  # imports make a million objects, which stay: there is little to find
    # Taken out here, so that it works behind a command as well, and before anything could fail.
    debug, words = "--debug" in words, [w for w in words if w != "--debug"]
    # No option before the command takes a value, so the first word is the command.
    position = next((i for i, w in enumerate(words) if not w.startswith("-")), len(words))
    command = next((c for c in COMMANDS if [c.name] == words[position : position + 1]), None)
    try:
        _top_level(words[: position + 1])
        code = _run(command, words[position + 1 :]) if command else 0
        sys.stdout.flush()
    except (EngineError, KeyboardInterrupt, OSError, ModuleNotFoundError) as error:
        if debug:
            traceback.print_exc()
        return _explain(error, command)
    return code


@contextmanager
def starting() -> Iterator[None]:
    """While a model is loaded: nothing is searched for garbage, which took a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _top_level(words: Sequence[str]) -> None:
    width = max(len(c.name) for c in COMMANDS)
    parser = argparse.ArgumentParser(
        "engine",
        usage="engine [--version] [--debug] COMMAND ...",
        description="LLM inference on any hardware.",
        epilog="commands:\n" + "\n".join(f"  {c.name:{width}}  {c.help}" for c in COMMANDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"engine {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "command", nargs="?", metavar="COMMAND", choices=[c.name for c in COMMANDS], help=argparse.SUPPRESS
    )
    if parser.parse_args(words).command is None:
        parser.print_help()


def _run(command: Command, words: Sequence[str]) -> int:
    module = importlib.import_module(command.module)
    code: int
    if hasattr(module, "main"):
        code = module.main(list(words))
    else:
        about = (module.__doc__ or "").partition("\n\n")[0]
        parser = _Parser(f"engine {command.name}", description=about, allow_abbrev=False)
        parser.elsewhere = getattr(module, "ELSEWHERE", {})
        module.add_arguments(parser)
        code = module.run(parser.parse_args(words))
    return code


class _Parser(argparse.ArgumentParser):
    """Tells what could have been meant by a flag that does not exist, and errors in a line.

    Attributes:
        elsewhere: what to do in place of flags that other engines have.
    """

    elsewhere: Mapping[str, str] = MappingProxyType({})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the base does, of a subcommand too, but nothing may be unknown."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, 1)
            hint = self.elsewhere.get(flag) or (f"did you mean {close[0]}?" if close else "--help lists what there is")
            self.error(f"unknown argument {flag}: {hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """End with status 2; the usage of a command with many flags would hide the message."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _explain(error: BaseException, command: Command | None) -> int:
    """Tell the user on stderr; the exit code. Raises what is not meant for users."""
    match error:
        case EngineError():
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        case ModuleNotFoundError(name=missing) if command and command.extra:
            remedy = f"pip install 'engine[{command.extra}]'"
            print(f"error: engine {command.name} needs {missing}\nremedy: {remedy}", file=sys.stderr)
            return 1
        case KeyboardInterrupt():
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        case OSError():
            # The reader left, as `head` does, or the disk is full. Python flushes again at exit, and must find room.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return 128 + signal.SIGPIPE
            print(f"error: {error}", file=sys.stderr)
            return 1
    raise error
