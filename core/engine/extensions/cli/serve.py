"""`engine serve`: answer OpenAI's API over HTTP."""

from __future__ import annotations

import argparse

from engine.config import EngineArgs
from engine.extensions.cli.options import add_flags, given
from engine.extensions.server import ServerArgs, serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("model", nargs="?", help="a folder with the model; none is the one that ships with the engine")
    add_flags(parser, ServerArgs, "server")
    add_flags(parser, EngineArgs, "engine", skip=("model",))


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    return serve(ServerArgs(**given(args, ServerArgs)), EngineArgs.of(**given(args, EngineArgs)))
