"""Triton's kernels without a device: right under its interpreter, and compiled ahead of time for absent GPUs.

The interpreter is chosen when Triton is imported, so its tests run in a process of their own.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
INTERPRETED = ROOT / "tests" / "interpreted"
SUITE = ROOT / "conformance_tests" / "engine_conformance"

pytest.importorskip("triton")


def interpreted(*args: object, site: Path | None = None) -> None:
    """Run pytest under the interpreter; its output is shown where it fails."""
    path = [str(INTERPRETED), *([str(site)] if site else []), *filter(None, sys.path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("tests", sorted(INTERPRETED.glob("test_*.py")), ids=lambda path: path.stem)
def test_interpreted(tests: Path) -> None:
    interpreted(tests)


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("test_attention.py", "test_agrees_with_reference or kv_dtypes or bias or share or every_bit or fp8"),
        ("test_kv_cache.py", ""),
        ("test_graphs.py", "sliding_window or buckets"),
        ("test_ops.py", ""),
        ("test_sampling.py", "not large_vocabulary and not spread and not shares and not batch"),
    ],
)
def test_interpreted_conformance(file: str, wanted: str, tmp_path: Path) -> None:
    """The suite's own cases, at the size of a simulator."""
    info = tmp_path / "interpreted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: interpreted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[engine.platforms]\ninterpreted = engine_interpreted:InterpretedPlatform\n")
    interpreted(SUITE / file, "-k", wanted, "--platform=interpreted", "--conformance-profile=sim", site=tmp_path)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """scripts/kernel_table, as a module."""
    return runpy.run_path(str(ROOT / "scripts" / "kernel_table"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950", "gfx1100"])
def test_compiles_ahead_of_time(
    table: dict[str, Any], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of a usual layer compile for the target, fit into its memory, and nearly keep to its registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    one = table["TARGETS"][target]
    titles = ["32 heads of 8, 128; decode", "32 heads of 8, 128; prefill", "128 heads of 1, 576 and 512; decode"]
    if target == "sm_90":
        titles += ["32 heads of 8, 128; prefill, Hopper's", "64 heads of 8, 64; prefill, Hopper's"]
    rows = list(table["rows"]({target: one}, titles=titles))
    assert len(rows) > 2
    for row in rows:
        assert row.footprint is not None, f"{row.case}: {row.error}"
        assert row.footprint.shared <= one.device.shared_bytes, row
        # Of latent attention docs/kernels.md says where registers are spilled.
        assert row.footprint.spilled <= 256 or "576" in row.case, row


def test_hopper_overlaps_softmax_and_products(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In machine code the softmax lies where a product is under way: the assembler neither serialised nor moved it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    one = table["TARGETS"]["sm_90"]
    with table["recording"]() as launches:
        table["CASES"]["32 heads of 8, 128; prefill, Hopper's"](one)
    kernel = table["compile_launch"](launches[-1], one.target)
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(sys.modules["triton"].__file__ or "").parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "-sass", str(tmp_path / "kernel.cubin")]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The scores of a tile are waited for while one product is outstanding, and then that product.
    under_way = re.findall(r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR\.LE gsb0, 0x0", code, re.DOTALL)
    assert len(under_way) == 4, "two consumers have a loop that masks and one that does not"
    for softmax in under_way:
        assert softmax.count("MUFU.EX2") >= 64, "an exponential for each of a lane's scores"
        assert "HGMMA" not in softmax
