"""The rules of `docs/architecture.md`, read from the source: who may import whom, and what the core may name."""

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "engine"
EXTENSIONS = CORE / "extensions"
SDK = ROOT / "plugin_sdk" / "engine_sdk"
PLATFORMS = sorted(path for path in ROOT.glob("platforms/*/engine_*") if path.is_dir())
CONFORMANCE = ROOT / "conformance_tests" / "engine_conformance"

OURS = {path.name for path in (CORE, SDK, *PLATFORMS, CONFORMANCE)}
CONTRACT = ("engine.interfaces", "engine.errors")
DEVICES = {"cuda", "is_cuda", "rocm", "hip", "npu", "xpu", "mps", "hpu", "tpu", "mtia", "privateuseone"}
MAX_CORE_LINES = 6000
BESIDE_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
TORCH_FREE = (
    *("engine", "engine.cli", "engine.config", "engine.errors", "engine.request", "engine.step", "engine.scheduler"),
    *("engine.kv.spec", "engine.kv.allocator", "engine.kv.manager"),
)


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if folder == EXTENSIONS or EXTENSIONS not in path.parents)


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def wrong_imports(folder: Path, *allowed: str) -> list[str]:
    """Imports of our own packages, other than the folder's own and those allowed."""
    own = (*allowed, folder.name)
    return [
        f"{path.relative_to(ROOT)}: {module}"
        for path in sources(folder)
        for module in imports(path)
        if module.split(".")[0] in OURS and not within(module, own)
    ]


def test_interfaces_import_torch_and_the_standard_library_only() -> None:
    allowed = (*CONTRACT, "torch", *sys.stdlib_module_names)
    found = [(path.name, m) for path in sources(CORE / "interfaces") for m in imports(path) if not within(m, allowed)]
    assert not found


def test_errors_import_nothing() -> None:
    assert set(imports(CORE / "errors.py")) == {"__future__.annotations"}


def test_core_imports_no_platform_no_extension_and_no_kernels() -> None:
    assert not wrong_imports(CORE)
    outside = ("engine.extensions", "triton")
    assert not [(path.name, module) for path in sources(CORE) for module in imports(path) if within(module, outside)]


def test_sdk_imports_the_contract_only() -> None:
    assert not wrong_imports(SDK, *CONTRACT)


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda path: path.name)
def test_platforms_import_the_sdk_only(platform: Path) -> None:
    assert not wrong_imports(platform, "engine_sdk")


def test_conformance_imports_no_platform() -> None:
    assert not wrong_imports(CONFORMANCE, "engine", "engine_sdk")


def named(node: ast.AST) -> str:
    """What a node of the syntax tree names, as an identifier or as a string."""
    match node:
        case ast.Constant(value=str(name)) | ast.Attribute(attr=name) | ast.Name(id=name) | ast.alias(name=name):
            return name
    return ""


def test_core_names_no_device() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {named(node)}"
        for path in sources(CORE)
        for node in ast.walk(ast.parse(path.read_text()))
        if DEVICES & set(re.split("[.:]", named(node).lower()))
    ]
    assert not found


def test_torch_free_modules_import_no_torch() -> None:
    """Hypothesis drives the scheduler and the KV manager in microseconds, and the command line starts at once."""
    code = f"import sys, {', '.join(TORCH_FREE)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor a comment, nor part of a docstring."""
    with tokenize.open(path) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in BESIDE_CODE]
    docstrings = {
        line
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


def test_core_stays_small() -> None:
    lines = sum(map(code_lines, sources(CORE)))
    assert lines <= MAX_CORE_LINES, f"the core has {lines} lines of code"
