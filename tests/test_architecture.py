"""The rules of `docs/architecture.md`, read from the source: who may import whom, what the core may name, and its size.

A rule is a function from all modules to what is wrong with them, so each is shown to find a planted violation.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).parents[1]
Tree = Mapping[str, str]
"""Module name to source; a package is its ``__init__``."""

PLATFORMS = {p.name for p in ROOT.glob("platforms/*/engine_*")}
VENDORS = {p.parent.name for p in ROOT.glob("examples/engine-plugin-*/*/__init__.py")}
OURS = {"engine", "engine_sdk", "engine_conformance", *PLATFORMS, *VENDORS}
CONTRACT = ("engine.interfaces", "engine.errors")
STANDARD = tuple(sys.stdlib_module_names)

DEVICES = {"cuda", "rocm", "hip", "gpu", "npu", "mlu", "musa", "xpu", "hpu", "tpu", "mps", "mtia", "privateuseone"}
NO_DEVICE = {"gpu_memory_utilization", "num_gpu_blocks"}  # an option and a metric that users know by these names
BUILDS_ON = {
    "engine.extensions.server": "engine.extensions.serving",
    "engine.extensions.serving": "engine.extensions.tokenizers",
    "engine.extensions.quantization": "engine.extensions.checkpoints",
    "engine.extensions.server.pooling": "engine.extensions.pooling",
    "engine.extensions.server.routes.embeddings": "engine.extensions.pooling",
    "engine.extensions.server.routes.scores": "engine.extensions.pooling",
    "engine.extensions.cli.serve": "engine.extensions.server",
    "engine.extensions.cli.run_batch": "engine.extensions.server",
}
"""Extensions that need another one: the server the asynchronous engine, a command what it runs."""

TORCH_FREE = (
    *("engine.request", "engine.step", "engine.config", "engine.errors", "engine.info", "engine.scheduler"),
    *("engine.kv.spec", "engine.kv.allocator", "engine.kv.manager"),
)
STARTS_WITHOUT_TORCH = (
    *TORCH_FREE,
    "engine",
    "engine.extensions.cli",
    "engine.extensions.cli.serve",
    "engine.extensions.serving",
    "engine.hooks",
    "engine.discovery",
    "engine.plugins",
)
MAX_CORE_LINES = 6000


@cache
def tree() -> Tree:
    folders = [ROOT / "core/engine", ROOT / "plugin_sdk/engine_sdk", ROOT / "conformance_tests/engine_conformance"]
    folders += [
        *ROOT.glob("platforms/*/engine_*"),
        *(p.parent for p in ROOT.glob("examples/engine-plugin-*/*/__init__.py")),
    ]
    return {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for folder in folders
        for path in folder.rglob("*.py")
    }


parse = cache(ast.parse)


def within(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in packages)


def is_package(module: str, modules: Tree) -> bool:
    return any(m.startswith(f"{module}.") for m in modules) or "." not in module


def imports(module: str, modules: Tree, when: Literal["ever", "run", "load"] = "ever") -> Iterator[str]:
    """What a module imports, as ``module.name``.

    ``"run"`` leaves out what only type checkers see; ``"load"`` what functions import when they are called, too.
    """
    package = module if is_package(module, modules) else module.rpartition(".")[0]
    waiting: list[ast.AST] = [parse(modules[module])]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if when == "load":
                continue
            case ast.If(test=ast.Name("TYPE_CHECKING"), orelse=otherwise) if when != "ever":
                waiting += otherwise
                continue
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                base = importlib.util.resolve_name("." * level + (source or ""), package)
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name("__import__") | ast.Name("import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str(name)), *_],
            ):
                yield name
        waiting += ast.iter_child_nodes(node)


def outside(modules: Tree, package: str, *allowed: str, theirs: bool = True) -> list[str]:
    """Imports of a package beyond itself and `allowed`; without `theirs`, only imports of our own packages count."""
    return [
        f"{module} imports {target}"
        for module in modules
        if within(module, package)
        for target in imports(module, modules)
        if not within(target, package, *allowed) and (theirs or within(target, *OURS))
    ]


def interfaces_import_torch_only(modules: Tree) -> list[str]:
    return outside(modules, "engine.interfaces", *CONTRACT, "torch", *STANDARD)


def errors_import_nothing(modules: Tree) -> list[str]:
    return outside(modules, "engine.errors", "__future__")


def some_modules_never_import_torch(modules: Tree) -> list[str]:
    """Not even in a function, nor through what they import; what only type checkers see is no import."""
    direct = [
        f"{module} imports {target}"
        for module in TORCH_FREE
        for target in imports(module, modules, "run")
        if within(target, "torch", "transformers")
    ]
    return direct + [found for module in STARTS_WITHOUT_TORCH for found in leads_to_torch(module, modules)]


def leads_to_torch(start: str, modules: Tree) -> list[str]:
    """The ways in which importing a module imports torch."""
    chains, seen, found = [[start]], set(), []
    while chains:
        chain = chains.pop()
        parts = chain[-1].split(".")
        # Importing a module imports the packages around it; an imported name may be a module itself.
        for module in (".".join(parts[:n]) for n in range(1, len(parts) + 1)):
            if module in seen or module not in modules:
                continue
            seen.add(module)
            for target in imports(module, modules, "load"):
                if within(target, "torch", "transformers"):
                    found.append(" imports ".join([*chain[:-1], module, target]))
                elif within(target, "engine"):
                    chains.append([*chain[:-1], module, target])
    return found


def core_imports_no_platform(modules: Tree) -> list[str]:
    return outside(modules, "engine", theirs=False)


def core_imports_no_extension(modules: Tree) -> list[str]:
    """And an extension only itself, or what it declares to build on: each can be deleted."""
    return [
        f"{module} imports {target}"
        for module in modules
        if within(module, "engine")
        for target in imports(module, modules)
        if within(target, "engine.extensions")
        and target.split(".")[:3] != module.split(".")[:3]
        and not any(within(module, m) and within(target, other) for m, other in BUILDS_ON.items())
    ]


def core_names_no_device(modules: Tree) -> list[str]:
    found = []
    for module in modules:
        for node in ast.walk(parse(modules[module])) if within(module, "engine") else ():
            name = named(node)
            words = re.split(r"[\W_]", name.lower()) if re.fullmatch(r"[\w.]+(:\w*)?", name) else []
            if DEVICES & set(words) and name not in NO_DEVICE:
                found.append(f"{module}:{getattr(node, 'lineno', 0)} names {name}")
    return found


def named(node: ast.AST) -> str:
    """What a node of the syntax tree names, as an identifier or as a string."""
    match node:
        case ast.Constant(value=str(name)) | ast.Attribute(attr=name) | ast.Name(id=name) | ast.alias(name=name):
            return name
        case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.keyword(arg=str(name)):
            return name
    return ""


def sdk_imports_the_contract_only(modules: Tree) -> list[str]:
    return outside(modules, "engine_sdk", *CONTRACT, "torch", "triton", "pluggy", *STANDARD)


def platforms_import_the_sdk_only(modules: Tree) -> list[str]:
    ours = [found for p in PLATFORMS for found in outside(modules, p, "engine_sdk", "torch", "triton", *STANDARD)]
    return ours + [found for p in VENDORS for found in outside(modules, p, "engine_sdk", *VENDORS, theirs=False)]


def conformance_imports_what_is_public(modules: Tree) -> list[str]:
    """No platform, since it tests any; and nothing of the engine that begins with an underscore."""
    private = [
        f"{module} imports {target}"
        for module in modules
        if within(module, "engine_conformance")
        for target in imports(module, modules)
        if within(target, "engine", "engine_sdk") and re.search(r"\._(?!_)", target)
    ]
    return outside(modules, "engine_conformance", "engine", "engine_sdk", theirs=False) + private


def core_stays_small(modules: Tree) -> list[str]:
    core = [m for m in modules if within(m, "engine") and not within(m, "engine.extensions")]
    lines = sum(len(modules[m].splitlines()) for m in core)
    return [f"engine has {lines} lines, more than {MAX_CORE_LINES}"] if lines > MAX_CORE_LINES else []


RULES: tuple[Callable[[Tree], list[str]], ...] = (
    interfaces_import_torch_only,
    errors_import_nothing,
    some_modules_never_import_torch,
    core_imports_no_platform,
    core_imports_no_extension,
    core_names_no_device,
    sdk_imports_the_contract_only,
    platforms_import_the_sdk_only,
    conformance_imports_what_is_public,
    core_stays_small,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Tree], list[str]]) -> None:
    assert rule(tree()) == []


PLANTED = [
    (interfaces_import_torch_only, "engine.interfaces.ops", "import numpy"),
    (interfaces_import_torch_only, "engine.interfaces.ops", "from engine.config import EngineArgs"),
    (interfaces_import_torch_only, "engine.interfaces", "def f():\n    from ..request import SamplingParams"),
    (errors_import_nothing, "engine.errors", "import torch"),
    (errors_import_nothing, "engine.errors", "from engine import request"),
    (some_modules_never_import_torch, "engine.scheduler", "import torch.nn"),
    (some_modules_never_import_torch, "engine.scheduler", "def f():\n    from torch import Tensor"),
    (some_modules_never_import_torch, "engine.kv.manager", "try:\n    import transformers\nexcept ImportError: ..."),
    (some_modules_never_import_torch, "engine.kv.spec", "from engine.interfaces import Platform"),
    (some_modules_never_import_torch, "engine", "from engine.llm import LLM"),
    (some_modules_never_import_torch, "engine.kv", "from engine.kv import pool"),
    (some_modules_never_import_torch, "engine.extensions.cli", "from . import platforms\nfrom engine import contract"),
    (core_imports_no_platform, "engine.runner", "import engine_cuda"),
    (core_imports_no_platform, "engine.runner", "def f():\n    from engine_sdk import TorchPlatform"),
    (core_imports_no_platform, "engine.extensions.cli.bench", "import_module('engine_cpu')"),
    (core_imports_no_platform, "engine.extensions.lora", "from engine_conformance import tiny_models"),
    (core_imports_no_extension, "engine.llm", "from engine.extensions.lora import Adapter"),
    (
        core_imports_no_extension,
        "engine.extensions.cli",
        "import importlib\nimportlib.import_module('engine.extensions.server')",
    ),
    (core_imports_no_extension, "engine.extensions.lora", "from engine.extensions.grammar import mask"),
    (core_imports_no_extension, "engine.extensions.serving", "from engine.extensions.server import ServerArgs"),
    (core_imports_no_extension, "engine.extensions.server.app", "from engine.extensions.cli import main"),
    (core_names_no_device, "engine.runner", "x.cuda()"),
    (core_names_no_device, "engine.runner", "torch.npu.synchronize()"),
    (core_names_no_device, "engine.runner", "if x.is_cuda: ..."),
    (core_names_no_device, "engine.runner", "device = 'cuda:0'"),
    (core_names_no_device, "engine.runner", "device = f'xpu:{index}'"),
    (core_names_no_device, "engine.runner", "name = platform.name == 'ROCM'"),
    (core_names_no_device, "engine.runner", "from torch import cuda"),
    (core_names_no_device, "engine.runner", "graph = capture_cuda_graph(pool, gpu=True)"),
    (core_names_no_device, "engine.extensions.lora", "backend = 'hip'"),
    (sdk_imports_the_contract_only, "engine_sdk.attention", "from engine.request import SamplingParams"),
    (sdk_imports_the_contract_only, "engine_sdk", "import engine"),
    (sdk_imports_the_contract_only, "engine_sdk", "import engine_cpu"),
    (sdk_imports_the_contract_only, "engine_sdk", "import transformers"),
    (platforms_import_the_sdk_only, "engine_cuda", "from engine.interfaces import Platform"),
    (platforms_import_the_sdk_only, "engine_rocm", "from engine_cuda import CudaPlatform"),
    (platforms_import_the_sdk_only, "engine_cpu", "import numpy"),
    (conformance_imports_what_is_public, "engine_conformance.tiny_models", "from engine_cpu import CpuPlatform"),
    (conformance_imports_what_is_public, "engine_conformance.tiny_models", "from engine.scheduler import _Row"),
    (core_stays_small, "engine.kv.more", "x = 1\n" * MAX_CORE_LINES + "x = 1\n"),
]


@pytest.mark.parametrize(("rule", "module", "source"), PLANTED)
def test_rule_finds_a_planted_violation(rule: Callable[[Tree], list[str]], module: str, source: str) -> None:
    planted = {**tree(), module: f"{tree().get(module, '')}\n{source}\n"}
    found = set(rule(planted)) - set(rule(tree()))
    assert found
    assert all(module in text or text.startswith("engine has") for text in found)


ALLOWED = [
    (some_modules_never_import_torch, "engine.scheduler", "if TYPE_CHECKING:\n    from torch import Tensor"),
    (some_modules_never_import_torch, "engine.plugins", "def f():\n    from engine.interfaces import Platform"),
    (core_imports_no_extension, "engine.extensions.lora", "from engine.extensions.lora.layers import Layer"),
    (core_imports_no_extension, "engine.extensions.lora", "from engine.llm import LLM"),
    (core_names_no_device, "engine.runner", '"""Graphs: cuda and hip have them."""\nargs.gpu_memory_utilization'),
    (platforms_import_the_sdk_only, "engine_cuda", "from engine_cuda import kernels\nimport triton, ctypes"),
    (conformance_imports_what_is_public, "engine_conformance.tiny_models", "from engine.kv.manager import KVPlan"),
    (core_stays_small, "engine.extensions.more", "x = 1\n" * MAX_CORE_LINES),
]


@pytest.mark.parametrize(("rule", "module", "source"), ALLOWED)
def test_rule_lets_pass_what_is_allowed(rule: Callable[[Tree], list[str]], module: str, source: str) -> None:
    assert set(rule({**tree(), module: f"{tree().get(module, '')}\n{source}\n"})) <= set(rule(tree()))


def test_torch_free_modules_load_no_torch() -> None:
    """The same as `some_modules_never_import_torch`, asked of Python itself."""
    code = f"import sys, {', '.join(STARTS_WITHOUT_TORCH)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
