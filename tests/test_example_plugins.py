"""The example plugins as a stranger has them: installed from their folders, found by entry points, and run."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {folder.name: folder for folder in ROOT.glob("examples/engine-plugin-*")}
SIMULATOR = "npu_sim"

COMPARE = """
import json, sys
from engine import LLM, SamplingParams

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
found = {}
for platform in ("cpu", "minimal", "npu"):
    llm = LLM(folder, platform=platform, skip_tokenizer_init=True, num_blocks=64, max_model_len=160, max_num_seqs=3)
    found[platform] = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions, as pip installs them."""
    folder = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder)]
    subprocess.run([*command, *map(str, EXAMPLES.values())], check=True, capture_output=True)
    return folder


def run(site: Path, *arguments: str) -> Any:
    """What a command beside this Python prints as JSON, with the installed plugins on its path."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    environment.pop("ENGINE_PLATFORM", None)
    command = [str(Path(sys.executable).with_name(arguments[0])), *arguments[1:]]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=site)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sources(folder: Path) -> list[Path]:
    """The modules of a distribution's packages, the simulated chip apart."""
    packages = [p.parent for p in folder.glob("*/__init__.py") if p.parent.name != SIMULATOR]
    return [path for package in packages for path in package.rglob("*.py")]


def imported(source: str) -> set[str]:
    """Top-level names of what a module imports, within functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").partition(".")[0])
    return found


def test_there_are_two_examples() -> None:
    assert set(EXAMPLES) == {"engine-plugin-minimal", "engine-plugin-npu"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_plugin_imports_the_sdk_only(name: str) -> None:
    own = {path.parent.name for path in EXAMPLES[name].glob("*/__init__.py")}
    allowed = {"engine_sdk", "torch", *sys.stdlib_module_names, *own}
    for path in sources(EXAMPLES[name]):
        assert imported(path.read_text()) <= allowed, path


@pytest.mark.parametrize(("name", "most"), [("engine-plugin-minimal", 12), ("engine-plugin-npu", 1000)])
def test_a_plugin_is_small(name: str, most: int) -> None:
    lines = sum(len(path.read_text().splitlines()) for path in sources(EXAMPLES[name]))
    assert 0 < lines < most


def test_the_command_line_lists_them(site: Path) -> None:
    found = run(site, "engine", "platforms", "--json")
    rows = {row["name"]: row for row in found["platforms"]}
    for name in ("npu", "minimal"):
        assert (rows[name]["status"], rows[name]["distribution"]) == ("available", f"engine-plugin-{name}"), rows[name]
    assert rows["npu"]["accelerator"] is True
    assert rows["minimal"]["accelerator"] is False
    assert [device["name"] for device in rows["npu"]["devices"]] == ["NPU-2", "NPU-2"]
    assert rows["npu"]["capabilities"]["block_sizes"] == "{128}"
    assert found["selected"] == "npu", "the one accelerator is chosen"


def test_they_generate_the_hosts_tokens(site: Path, tmp_path: Path) -> None:
    from engine_conformance.tiny_models import tiny_model

    tiny_model("qwen3").save_pretrained(tmp_path)
    prompts = [[3 + 7 * i % 120 for i in range(n)] for n in (1, 20, 126, 140)]
    tokens = run(site, "python", "-c", COMPARE, str(tmp_path), json.dumps(prompts))
    assert tokens["npu"] == tokens["cpu"] == tokens["minimal"]
    assert {len(ids) for ids in tokens["npu"]} == {10}
