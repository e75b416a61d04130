"""L0: a plugin uses what every vendor can use, and changes nothing of ours."""

from __future__ import annotations

from engine_conformance.rules import forbidden_imports, patches
from engine_sdk import Capabilities, Platform


def test_imports_the_sdk_only(conformance_platform: Platform) -> None:
    """No module of the plugin imports ``engine`` beside ``engine_sdk``."""
    found = forbidden_imports(conformance_platform)
    assert not found, "import it from engine_sdk, or ask for it to be there: " + "; ".join(found)


def test_patches_nothing(conformance_platform: Platform) -> None:
    """Loading and using the platform leaves our functions, classes and registrations as they are."""
    found = patches(conformance_platform.name)
    assert not found, "the plugin changes " + ", ".join(found)


def test_declares_the_same_every_time(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """What a platform can do does not depend on when it is asked."""
    assert conformance_platform.capabilities() == capabilities
