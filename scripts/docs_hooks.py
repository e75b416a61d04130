"""MkDocs hook: ``<!-- help: COMMAND -->`` becomes the command's own help, so that the reference cannot go stale."""

import os
import re
import subprocess


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by MkDocs with each page's source."""
    return re.sub(r"<!-- help:(.*?)-->", lambda match: _help(match[1].split()), markdown)


def _help(command: list[str]) -> str:
    environment = os.environ | {"COLUMNS": "100"}
    shown = subprocess.run(["engine", *command, "--help"], env=environment, check=True, capture_output=True, text=True)
    return f"```text\n{shown.stdout.rstrip()}\n```"
