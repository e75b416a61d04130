"""`engine generate`: complete prompts, streaming to the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from engine.config import EngineArgs
from engine.errors import ConfigError
from engine.extensions.cli import starting
from engine.extensions.cli.options import add_flags, given
from engine.request import SamplingParams

_DEFAULT_MAX_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("prompt", nargs="*", help="one or more prompts; '-' reads one from standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt, with token ids and times")
    parser.add_argument("--no-stream", action="store_true", help="print a completion once it is whole")
    add_flags(parser, SamplingParams, "sampling", skip=("logits_processors", "detokenize"))
    add_flags(parser, EngineArgs, "engine", skip=("seed",))


def run(args: argparse.Namespace) -> int:
    """Load the model and print completions."""
    prompts = [sys.stdin.read() if p == "-" else p for p in args.prompt]
    if not prompts:
        raise ConfigError('give a prompt, as in: engine generate "def fibonacci(n):"')
    sampling = given(args, SamplingParams)
    SamplingParams(**sampling)  # a wrong value is told before the model is loaded
    with starting():
        from engine.llm import LLM

        llm = LLM(**given(args, EngineArgs))
    params = llm.get_default_sampling_params()
    params = SamplingParams(**{**asdict(params), "max_tokens": _DEFAULT_MAX_TOKENS, **sampling})
    if args.json or args.no_stream or params.n > 1:
        for output in llm.generate(prompts, params, use_tqdm=not args.json):
            if args.json:
                print(json.dumps(asdict(output)), flush=True)
                continue
            for completion in output.outputs:
                print((output.prompt or "") + completion.text, flush=True)
        return 0
    for prompt in prompts:
        shown = 0
        print(prompt, end="", flush=True)
        for output in llm.stream(prompt, params):
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
        print(flush=True)
    return 0
