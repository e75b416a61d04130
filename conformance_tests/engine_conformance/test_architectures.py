"""L6: every architecture that the engine claims comes out right on the platform, and every other one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from engine_conformance.architectures import check_architecture, looks_ahead
from engine_conformance.tiny_models import causal_lm_names
from engine_sdk import Platform

EXPECTED: dict[str, str] = json.loads(Path(__file__).with_name("architectures.json").read_text())
"""Architecture to the reason why it is refused; empty where it runs."""


@pytest.mark.parametrize("name", [n for n in causal_lm_names() if n in EXPECTED])
def test_architecture(
    name: str, conformance_platform: Platform, record_property: Callable[[str, object], None]
) -> None:
    """The outcome is the one that the supported-models page states."""
    outcome = check_architecture(name, conformance_platform.name)
    if outcome.status == "undeclared":
        record_property("rejected", outcome.detail)
    if outcome.status in ("refused", "wrong") and not EXPECTED[name] and looks_ahead(name):
        detail = f"it attends to later tokens in Transformers {transformers.__version__}, which is no reference then"
        record_property("inconclusive", f"{outcome.status}: {detail}")
        return
    assert outcome.status in ({"refused"} if EXPECTED[name] else {"right", "undeclared"}), outcome
    assert outcome.detail or outcome.status == "right", "a refusal gives its reason"


def test_every_architecture_is_accounted_for() -> None:
    """No architecture of the newest tested Transformers is missing from the table."""
    missing = set(causal_lm_names()) - set(EXPECTED)
    assert not missing, f"run scripts/supported_models: {sorted(missing)}"
    assert sum(not reason for reason in EXPECTED.values()) >= 130
