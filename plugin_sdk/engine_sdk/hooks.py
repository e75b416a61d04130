"""The marker of functions that answer the engine's hooks, which a package names in the group ``engine.plugins``.

    from engine_sdk import hookimpl


    @hookimpl
    def engine_stats(stats):
        print(stats.num_running)

The hooks are `engine_config_defaults`, `engine_models` and `engine_stats`; the contract's reference says what each gets
and gives.
"""

from __future__ import annotations

import pluggy

hookimpl = pluggy.HookimplMarker("engine")
"""Marks a function as the answer to the hook of its name."""
