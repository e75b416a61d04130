"""`engine chat`: talk with a model in the terminal."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from engine.config import EngineArgs
from engine.errors import RequestError
from engine.extensions.cli import starting
from engine.extensions.cli.options import add_flags, given
from engine.request import SamplingParams

_HELP = "/reset starts over, /undo takes the last exchange back, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--system", help="a system message to begin with")
    parser.add_argument("--chat-template", help="Jinja source that replaces the tokenizer's chat template")
    add_flags(parser, SamplingParams, "sampling", skip=("n", "logits_processors", "detokenize"))
    add_flags(parser, EngineArgs, "engine", skip=("seed",))


def run(args: argparse.Namespace) -> int:
    """Read a line, answer, repeat."""
    sampling = given(args, SamplingParams)
    SamplingParams(**sampling)
    with starting():
        from engine.llm import LLM

        llm = LLM(**given(args, EngineArgs))
    params = SamplingParams(**{**asdict(llm.get_default_sampling_params()), "max_tokens": None, **sampling})
    opening: list[dict[str, Any]] = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    print(f"{llm.info.architecture} on {llm.info.platform}. {_HELP}", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return 0
        if line in ("/exit", "/quit"):
            return 0
        if line == "/reset":
            messages = list(opening)
        elif line == "/undo":
            messages = messages[: max(len(messages) - 2, len(opening))]
        elif line.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": _answer(llm, messages, params, args.chat_template)})
            except RequestError as error:
                messages.pop()
                print(f"error: {error}", file=sys.stderr)


def _answer(llm: Any, messages: list[dict[str, Any]], params: SamplingParams, template: str | None) -> str:
    """Print the answer as it comes; Ctrl-C ends it there."""
    text = ""
    try:
        for output in llm.stream_chat(messages, params, chat_template=template):
            new = output.outputs[0].text
            print(new[len(text) :], end="", flush=True)
            text = new
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)
    return text
