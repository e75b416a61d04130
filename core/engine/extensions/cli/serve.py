"""`engine serve`: answer OpenAI's API over HTTP."""

from __future__ import annotations

import argparse

from engine.config import EngineArgs
from engine.extensions.cli.options import FromFile, add_flags, given
from engine.extensions.server import ServerArgs, serve

ELSEWHERE = {
    "--allowed-origins": "it is --cors-origins here",
    "--disable-log-requests": "requests' text is not logged unless --log-prompts asks for it",
    "--disable-uvicorn-access-log": "it is --no-access-log here",
    "--enable-auto-tool-choice": "leave it out: the chat template or --tool-call-parser tells the format",
    "--enable-log-requests": "it is --log-prompts here",
    "--enable-prompt-tokens-details": "leave it out: usage always has them",
    "--enable-reasoning": "leave it out: the chat template or --reasoning-parser tells the format",
    "--enable-request-id-headers": "leave it out: answers always have X-Request-Id",
    "--enable-ssl-refresh": "leave it out: certificates are read again when they change",
    "--shutdown-timeout": "it is --drain-timeout here",
    "--uvicorn-log-level": "it is --log-level here",
}
"""Flags of vLLM's that have another name here, or are not needed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("model", nargs="?", help="a folder with the model; none is the one that ships with the engine")
    about = "a YAML file with flags by their names, and model; those on the command line win"
    parser.add_argument("--config", action=FromFile, metavar="FILE", default=argparse.SUPPRESS, help=about)
    add_flags(parser, ServerArgs, "server")
    add_flags(parser, EngineArgs, "engine", skip=("model",))


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    return serve(ServerArgs(**given(args, ServerArgs)), EngineArgs.of(**given(args, EngineArgs)))
