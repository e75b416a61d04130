"""The examples in the documentation run, and the documentation names what there is.

A fenced block marked ``python`` or ``bash`` runs; one marked ``py`` or ``sh`` is only shown. A block of any language
with a ``title`` is written to a file of that name instead. Each page runs in an empty folder: first its files are
written, then its Python blocks run as one script, then its bash blocks in their order.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from engine import errors
from engine.config import EngineArgs
from engine.request import SamplingParams

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[a-z]+[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


class Block(NamedTuple):
    language: str
    title: str | None
    code: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    for match in FENCE.finditer(page.read_text()):
        language, _, rest = match["info"].partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        found.append(Block(language, title and title[1], match["code"]))
    return found


def runs(block: Block) -> bool:
    return block.language in ("python", "bash") and not block.title


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def environment(folder: Path) -> dict[str, str]:
    """This environment, with what pip installs in it kept in the folder."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this variable as the value of --build-isolation
        "PIP_NO_DEPS": "1",
        "PIP_TARGET": str(folder),
        "PYTHONPATH": str(folder),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs, blocks(page)))], ids=name)
def test_examples_run(page: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = ""
    commands = []
    for block in blocks(page):
        if block.title:
            (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.title).write_text(block.code)
        elif block.language == "python":
            script += block.code
        elif block.language == "bash":
            commands.append(["bash", "-euo", "pipefail", "-c", block.code])
    if script:
        (tmp_path / "examples.py").write_text(script)
        commands.insert(0, [sys.executable, "examples.py"])
    env = environment(tmp_path_factory.mktemp("installed"))
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout.decode()}\n{done.stderr.decode()}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    missing = [target for target in LINK.findall(prose) if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("options", [EngineArgs, SamplingParams])
def test_every_option_is_documented(options: type) -> None:
    """The reference is made from the docstrings, so an option that lacks a line there would be missing in it."""
    documented = re.findall(r"^        (\w+): ", options.__doc__ or "", re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(options)]


def test_every_error_has_a_remedy() -> None:
    table = (ROOT / "docs" / "errors.md").read_text()
    defined = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.EngineError)]
    assert [e.__name__ for e in defined if f"| `{e.__name__}` |" not in table] == []
