"""Checkpoints in Hugging Face's format, a plugin like any other's: ``--load-format auto`` reads safetensors files,
or uses them where they lie; ``copy`` reads all of them.

Registered in the entry-point group ``engine.plugins``; nothing of Transformers is imported before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from engine.hooks import hookimpl


@hookimpl
def engine_load_formats() -> Mapping[str, Callable[..., Any]]:
    """The default, the same with nothing used in place, and weights that need no files."""
    files = _Files()
    return {"auto": files, "copy": files, "dummy": _dummy}


class _Files:
    """Safetensors files."""

    def __call__(self, model: Any, args: Any) -> object:
        """A plan of what is read where."""
        from engine.extensions.checkpoints.plan import LoadPlan

        return LoadPlan(model, args.folder, in_place=args.load_format == "auto")

    def nbytes(self, args: Any) -> int:
        """Bytes of the files, where weights are kept as they are stored; 0 where they are not, or nothing is there."""
        try:
            config = json.loads((args.folder / "config.json").read_bytes())
            changed = args.quantization or args.dtype != "auto" or config.get("quantization_config")
            return 0 if changed else sum(file.stat().st_size for file in args.folder.glob("*.safetensors"))
        except (OSError, ValueError, AttributeError):
            return 0  # whoever reads the model tells what is wrong with it


def _dummy(model: Any, args: Any) -> object:
    from engine.extensions.checkpoints.dummy import DummyPlan

    return DummyPlan(model, args.seed)
