"""The host's processor as a platform: runs wherever torch does, and is chosen when there is no accelerator."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine_sdk import ConfigPatch, Probe, TorchPlatform


class CpuPlatform(TorchPlatform):
    """The host. Every step is done when it returns, and memory is shared with everything else that runs there."""

    name = "cpu"
    device_type = "cpu"
    contract = "1.0"

    @classmethod
    def probe(cls) -> Probe:
        """Always available, and never before an accelerator."""
        found = super().probe()
        return dataclasses.replace(found, devices=tuple(dataclasses.replace(d, name=_name()) for d in found.devices))

    def configure(self, options: Mapping[str, Any]) -> ConfigPatch:
        """Sizes for a host.

        Small steps keep the wait for the next token short: a few hundred tokens already keep the matrix products busy.
        """
        return ConfigPatch(
            defaults={
                **super().configure(options).defaults,
                "block_size": 32,
                "max_num_batched_tokens": 1024,
                "max_num_seqs": 64,
                "async_scheduling": False,
            }
        )


def _name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
