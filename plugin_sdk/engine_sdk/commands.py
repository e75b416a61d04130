"""Write a hardware plugin's repository, compare one with a later template, and run recorded calls again."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.errors import PlatformUnavailableError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Subcommands of `engine plugin`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    new = commands.add_parser(
        "new",
        help="write a new plugin's repository",
        description="Write a new plugin's repository.",
        allow_abbrev=False,
    )
    new.add_argument("name", metavar="NAME", help="what --platform will select: lower-case letters, digits and _")
    new.add_argument("--device-type", metavar="TYPE", help="torch's name of the device; NAME if not given")
    new.add_argument("--triton", action="store_true", help="take the SDK's kernels in Triton where it is installed")
    new.add_argument("--directory", type=Path, default=Path(), metavar="DIR", help="where engine-plugin-NAME is made")
    new.set_defaults(command=_new)

    diff = commands.add_parser(
        "diff",
        help="what a plugin's repository would change to be as this engine's template",
        description="What a plugin's repository would change to be as this engine's template, as a patch.",
        allow_abbrev=False,
    )
    diff.add_argument("folder", type=Path, nargs="?", default=Path(), help="the repository; here if not given")
    diff.set_defaults(command=_diff)

    replay = commands.add_parser(
        "replay",
        help="run a call again that --platform record:NAME wrote down",
        description="Run a recorded call again, and tell what is wrong with its result.",
        allow_abbrev=False,
    )
    replay.add_argument("file", type=Path, metavar="FILE", help="the recording, as in recordings/attention-1.pt")
    replay.add_argument("--platform", metavar="NAME", help="where to run it; where it was recorded if not given")
    replay.add_argument("--device-index", type=int, default=0, metavar="N", help="which of the platform's devices")
    replay.set_defaults(command=_replay)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; its exit code."""
    code: int = args.command(args)
    return code


def _new(args: argparse.Namespace) -> int:
    from engine_sdk.scaffold import write_plugin

    made = write_plugin(args.name, args.device_type, triton=args.triton, directory=args.directory)
    print(f"wrote {made}\nnext: cd {made} && pip install -e '.[test]' && engine platforms; then see its README.md")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from engine_sdk.scaffold import compare_plugin

    print(compare_plugin(args.folder), end="")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from engine_sdk.recording import find_platform, load_recording, replay

    recording = load_recording(args.file)
    platform = find_platform((args.platform or recording.platform).removeprefix("record:"))
    if not (probe := platform.probe()).available:
        raise PlatformUnavailableError(f"{platform.name} cannot run here: {probe.reason}")
    print(f"{args.file}: {recording.call.kind} on {recording.platform}\nthen: {recording.problem}")
    problem = replay(recording.call, platform(args.device_index))
    print(f"now on {platform.name}: {problem or 'right'}")
    return 1 if problem else 0
