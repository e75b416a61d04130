"""`engine run-batch`: answer a file of requests in OpenAI's batch format, without a server.

Each line is an object with ``custom_id``, ``method``, ``url`` (``/v1/chat/completions``, ``/v1/completions``,
``/v1/responses``, ``/v1/embeddings``, ``/v1/score``, ``/v1/rerank`` or ``/v1/classify``) and ``body``. Each line of the
output has ``custom_id`` and ``response`` or ``error``, in the order of the input; a failed line does not end the run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.config import EngineArgs
from engine.extensions.cli.options import add_flags, given
from engine.extensions.server import ServerArgs
from engine.extensions.server.batch import run_batch

_SERVER = ("served_model_name", "max_logprobs", "chat_template", "tool_call_parser", "reasoning_parser")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("model", nargs="?", help="a folder with the model; none is the one that ships with the engine")
    parser.add_argument("-i", "--input-file", type=Path, required=True, help="requests, a JSON object a line")
    parser.add_argument("-o", "--output-file", type=Path, required=True, help="where the answers go")
    others = [name for name in ServerArgs.__dataclass_fields__ if name not in (*_SERVER, "allow_unknown_fields")]
    add_flags(parser, ServerArgs, "answers", skip=others)
    add_flags(parser, EngineArgs, "engine", skip=("model",))


def run(args: argparse.Namespace) -> int:
    """Answer all; 1 where a request failed."""
    server = ServerArgs(**given(args, ServerArgs), log_level="warning", access_log=False)
    total, failed = run_batch(server, EngineArgs.of(**given(args, EngineArgs)), args.input_file, args.output_file)
    print(f"{total} requests, {failed} failed", file=sys.stderr)
    return 1 if failed else 0
