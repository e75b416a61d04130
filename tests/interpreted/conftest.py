"""Tests of Triton's kernels under its interpreter, which `tests/test_triton.py` runs in a process of their own."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from engine_interpreted import InterpretedPlatform

    @pytest.fixture(scope="session")
    def platform() -> InterpretedPlatform:
        return InterpretedPlatform()
