"""`engine platforms`: every hardware plugin that is installed, whether it can run here, and what it can do."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from engine.discovery import PLATFORMS, Plugin, describe, discover
from engine.errors import EngineError
from engine.extensions.cli.text import fields, paragraph, size, table
from engine.plugins import examine, select_platform


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the list. A broken plugin is part of it, not a failure of the command."""
    platforms, (selected, problem) = survey(), selection()
    if args.json:
        print(json.dumps({"selected": selected, "problem": problem, "platforms": platforms}, indent=2))
        return 0
    print(table(("NAME", "STATUS", "CONTRACT", "DEVICES", "DISTRIBUTION"), [_row(p) for p in platforms]))
    for p in platforms:
        if p["reason"]:
            print("\n" + paragraph(p["reason"], f"{p['name']}: "))
    for p in platforms:
        if p["capabilities"] is not None:
            print(f"\n{p['name']} can\n" + fields({k.replace("_", " "): v for k, v in p["capabilities"].items()}))
    if not selected and (broken := [p["name"] for p in platforms if p["status"] == "broken"]):
        problem = f"{', '.join(broken)} must be mended or uninstalled"
    print("\n" + paragraph(f"Unless another is chosen, {selected} runs." if selected else f"None runs: {problem}"))
    return 0


def survey() -> list[dict[str, Any]]:
    """Each platform plugin, as plain data: ``status`` is ``"available"``, ``"unavailable"`` or ``"broken"``."""
    return [_describe(plugin) for plugin in discover(PLATFORMS)]


def selection() -> tuple[str | None, str]:
    """The platform that runs when the user names none, or None and why."""
    try:
        return select_platform().plugin.name, ""
    except EngineError as error:
        return None, str(error)


def _describe(plugin: Plugin) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": plugin.name,
        "status": "broken",
        "reason": "",
        "distribution": plugin.distribution,
        "version": plugin.version,
        "target": plugin.target,
        "contract": None,
        "accelerator": None,
        "devices": [],
        "capabilities": None,
    }
    try:
        candidate = examine(plugin)
        probe = candidate.probe
        row.update(
            contract=candidate.platform.contract,
            accelerator=probe.accelerator,
            reason=probe.reason,
            devices=[dataclasses.asdict(d) for d in probe.devices],
        )
        if probe.available:
            platform = candidate.create(probe.devices[0].index if probe.devices else 0)
            row["capabilities"] = platform.capabilities().to_dict()
        row["status"] = "available" if probe.available else "unavailable"
    except EngineError as error:
        row["reason"] = str(error)
    except Exception as error:
        row["reason"] = str(plugin.fault(f"capabilities() raised {describe(error)}", "report it to its authors"))
    return row


def _row(platform: dict[str, Any]) -> tuple[str, ...]:
    devices: dict[str, int] = {}
    for d in platform["devices"]:
        label = d["name"] + (f" ({size(d['memory'])})" if d["memory"] else "")
        devices[label] = devices.get(label, 0) + 1
    return (
        platform["name"],
        platform["status"],
        platform["contract"] or "",
        ", ".join(f"{n} x {label}" if n > 1 else label for label, n in devices.items()),
        f"{platform['distribution']} {platform['version']}",
    )
