"""What config.json and generation_config.json say, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from engine.config import EngineArgs
from engine.errors import CheckpointError, ConfigError, UnsupportedCapability, UnsupportedModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(args: EngineArgs) -> PreTrainedConfig:
    """The configuration with the overrides applied; reads the folder only, never a hub.

    Raises `CheckpointError` where the files are missing or wrong, and `UnsupportedModelError` for a model type that the
    installed Transformers does not have.
    """
    folder, overrides = args.folder, args.hf_overrides
    raw = _read_json(folder, "config.json")
    if raw is None:
        there = f"{folder} has no config.json" if folder.is_dir() else f"{folder} does not exist"
        what = "the folder of a model in Hugging Face's format (config.json, *.safetensors)"
        raise CheckpointError(f"{there}; give {what}")
    trusted = {"trust_remote_code": args.trust_remote_code, "local_files_only": True}
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **trusted)
        return type(config).from_dict(_merge(raw, overrides)) if overrides else config
    except Exception as error:  # every configuration class validates in its own way
        if "auto_map" in raw and not args.trust_remote_code:
            raise ConfigError(f"{folder} brings its own Python code; set trust_remote_code if you trust it") from error
        if "model_type" in raw and raw["model_type"] not in transformers.CONFIG_MAPPING:
            ours = f"Transformers {transformers.__version__}; a newer Transformers may have it"
            raise UnsupportedModelError(f"model type {raw['model_type']!r} is unknown to {ours}") from error
        raise CheckpointError(f"{folder / 'config.json'} is not a valid configuration: {error}") from error


def resolve_dtype(requested: str, config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the weights: as `requested`, or for ``"auto"`` the checkpoint's own, fp32 if it names none."""
    own = config.dtype or config.get_text_config().dtype or torch.float32
    wanted = str(own).removeprefix("torch.") if requested == "auto" else requested
    if wanted not in DTYPES:
        of = "" if wanted == requested else " of the checkpoint"
        raise ConfigError(f"dtype {wanted!r}{of} is not supported; choose one of {', '.join(DTYPES)}")
    return DTYPES[wanted]


def resolve_kv_dtype(requested: str, dtype: torch.dtype, declared: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of the KV cache; of 8-bit floats the first by name, of those asked for, that the platform declares."""
    if not requested.startswith("fp8"):
        return DTYPES.get(requested, dtype)
    begin = requested.replace("fp8", "torch.float8")
    if found := sorted((known for known in declared if str(known).startswith(begin)), key=str):
        return found[0]
    raise UnsupportedCapability("kv_dtypes", requested, "the platform has no KV cache of this kind; use auto")


def max_model_len(config: PreTrainedConfig) -> int | None:
    """Most tokens of a sequence that the model was made for; None where the configuration sets no limit."""
    text, names = config.get_text_config(), ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return next((x for name in names if isinstance(x := getattr(text, name, None), int) and x > 0), None)


def eos_token_ids(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """The tokens that end a text: those of generation_config.json, else those of config.json."""
    own = getattr(config.get_text_config(), "eos_token_id", None)
    for ids in (generation_defaults(folder).get("eos_token_id"), own):
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    return ()


def generation_defaults(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json; empty where there is none."""
    return _read_json(folder, "generation_config.json") or {}


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name} does not hold a JSON object; download it again")
    return content


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    both = [name for name in top if isinstance(base.get(name), dict) and isinstance(top[name], dict)]
    return {**base, **top, **{name: _merge(base[name], top[name]) for name in both}}
