"""Fixtures of the suite."""

from __future__ import annotations

import pytest

from engine_conformance.cases import SCALES, Scale
from engine_conformance.plugin import platforms
from engine_sdk import Capabilities, Platform


@pytest.fixture(scope="session")
def conformance_platform(request: pytest.FixtureRequest) -> Platform:
    """The platform under test, its device made current."""
    platform = platforms(request.config)[request.param]
    platform.device().activate()
    return platform


@pytest.fixture(scope="session")
def capabilities(conformance_platform: Platform) -> Capabilities:
    """What the platform declares."""
    return conformance_platform.capabilities()


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    """How many examples a case draws, and how large they may be."""
    return SCALES[request.config.getoption("conformance_profile")]
