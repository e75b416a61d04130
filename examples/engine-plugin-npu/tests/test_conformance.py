"""The engine's conformance suite, as a vendor runs it: in a folder of its own, on what is installed."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(3600)
def test_conformance(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--pyargs", "engine_conformance", "--platform=npu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
