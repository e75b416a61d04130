"""From a folder to a model that runs on a platform: the swaps in order. Read `load_model` as a recipe.

The modelling code is Transformers' own. What it calls for attention, experts and linear layers is exchanged, so that one
step of many requests runs as one flattened sequence of tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from engine.errors import UnsupportedModelError
from engine.interfaces import Platform
from engine.model import attention, experts, probe
from engine.model.attention import AttentionLayer, StepContext
from engine.model.config import DTYPES, ModelSource, max_model_len, read_config, resolve_dtype
from engine.model.linear import fuse, pack
from engine.model.load import load_weights, read_index
from engine.model.storage import allocate, fill_dummy, settle_ties


class AdaptedModel:
    """A loaded model.

    Attributes:
        model: Transformers' module, its parts exchanged.
        config: its configuration.
        attention_layers: by name, in the order in which they run.
        context: what attention reads in each step.
        vocab_size: V of the logits.
        max_model_len: most tokens of a sequence that the model was made for; None without a limit.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Mapping[str, AttentionLayer], context: StepContext, vocab_size: int
    ) -> None:
        self.model = model
        self.config: PreTrainedConfig = model.config
        self.attention_layers = layers
        self.context = context
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len(model.config)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_index: Tensor) -> Tensor:
        """One step over the flattened tokens of a batch.

        Args:
            input_ids, position_ids: int64 [N].
            logits_index: int64 [S], the tokens whose logits are wanted.

        Returns:
            [S, V] in the model's dtype, after whatever the model does to its logits.
        """
        arguments = _arguments(self.model, position_ids)
        if self._keeps_logits:
            arguments["logits_to_keep"] = logits_index
        logits: Tensor = self.model(input_ids=input_ids[None], **arguments).logits[0]
        return logits if self._keeps_logits else logits[logits_index]


def load_model(source: ModelSource, platform: Platform, *, progress: bool = False) -> AdaptedModel:
    """Build the model that `source` names, with its weights on the platform's device.

    Raises `CheckpointError` for files that are missing or wrong, `UnsupportedModelError` for an architecture that needs
    what is not built yet, `UnsupportedCapability` for one that needs what the platform lacks.
    """
    config = read_config(source)
    dtype = resolve_dtype(source.dtype, config)
    entries = read_index(source.folder) if source.load_format == "auto" else {}
    device = platform.device()

    model = build(config, dtype, trust_remote_code=source.trust_remote_code)
    use(model, probe.IMPLEMENTATION)
    seen = probe.observe(model, _arguments(model, torch.arange(probe.NUM_TOKENS, device="meta")))
    context = StepContext()
    layers = attention.attach(model, seen, platform, DTYPES.get(source.kv_cache_dtype, dtype), context)
    method = platform.linear(None)
    projections = fuse(model, seen, all_linears=method is not None)

    settle_ties(model, entries)
    allocate(model, projections, device.torch_device)
    if source.load_format == "dummy":
        fill_dummy(model, source.seed)
    else:
        load_weights(model, entries, device, progress=progress)
    if method is not None:
        pack(projections, method)
    experts.attach(seen, platform)
    use(model, attention.IMPLEMENTATION)
    return AdaptedModel(model, layers, context, seen.vocab_size)


def build(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights: parameters on `meta`, in their final dtypes; buffers too."""
    try:
        with torch.device("meta"), init.meta_device_safe_creation_ops():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is no causal language model for Transformers: {error}"
        ) from error
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, parameter in model.named_parameters():
            if re.search(pattern.replace("*", ".*"), name):
                parameter.data = parameter.data.to(kept)
    return model.eval().requires_grad_(False)


def use(model: PreTrainedModel, implementation: str) -> None:
    """Let every part of `model` find its attention and experts functions under our names."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = implementation
            config._experts_implementation = implementation


def _arguments(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """What `model.forward` gets besides token ids and, for the logits, an index."""
    return {"position_ids": position_ids[None], "use_cache": False, "return_dict": True}
