"""From a folder to a model that runs on a platform: the swaps in order. Read `load_model` as a recipe.

The modelling code is Transformers' own. What it calls for attention, experts and linear layers is exchanged, so that
one step of many requests runs as one flattened sequence of tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from engine.config import EngineArgs
from engine.errors import UnsupportedModelError
from engine.interfaces import Platform
from engine.model import attention, experts, probe
from engine.model.attention import AttentionLayer, StepContext
from engine.model.config import max_model_len, read_config, resolve_dtype, resolve_kv_dtype
from engine.model.load import allocate
from engine.model.probe import Observations
from engine.model.share import Share
from engine.plugins import get_hooks, pick

_STATES = frozenset({"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"})
"""Names in a configuration's `layer_types` of layers that keep more of a sequence than keys and values."""


class AdaptedModel:
    """A loaded model: Transformers' module, its parts exchanged.

    Attributes:
        attention_layers: by name, in the order in which they run.
        context: what attention reads in each step.
        vocab_size: V of the logits.
        max_model_len: most tokens of a sequence that the model was made for; None without a limit.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config: PreTrainedConfig = model.config
        self.attention_layers: Mapping[str, AttentionLayer] = {}
        self.context = StepContext()
        self.vocab_size = 0
        self.max_model_len = max_model_len(model.config)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_index: Tensor) -> Tensor:
        """One step over the flattened tokens of a batch, `input_ids` and `position_ids` int64 [N].

        Gives the logits of the tokens `logits_index`, int64 [S]: [S, V] in the model's dtype, after whatever the model
        does to its logits.
        """
        kept = {"logits_to_keep": logits_index} if self._keeps_logits else {}
        logits: Tensor = self.run(input_ids, position_ids, **kept).logits[0]
        return logits if kept else logits[logits_index]

    def run(self, input_ids: Tensor, position_ids: Tensor, **arguments: Any) -> Any:
        """The model's own output for the flattened tokens of a batch, int64 [N], with a batch dimension of 1."""
        self.context.begin(position_ids)
        inputs = {"input_ids": input_ids[None], "position_ids": position_ids[None]}
        return self.model(**inputs, use_cache=False, return_dict=True, **arguments)

    def attach(self, seen: Observations, platform: Platform, kv_dtype: torch.dtype) -> None:
        """Take over what a probe saw: the size of the vocabulary, and attention, with the platform's backends."""
        self.vocab_size = seen.vocab_size
        self.attention_layers = attention.attach(self.model, seen, platform, kv_dtype, self.context)


def load_model(
    args: EngineArgs, platform: Platform, share: Share | None = None, *, begin: Any = None, progress: bool = False
) -> AdaptedModel:
    """Build the model that `args` name, or a rank's `share` of it, with its weights on the platform's device.

    ``begin(config, dtype, args)`` is how it begins, without weights, where it does not generate.

    Raises `CheckpointError` for files that are missing or wrong, `UnsupportedModelError` for an architecture that needs
    what is not built yet, `UnsupportedCapability` for one that needs what the platform lacks.
    """
    config = read_config(args)
    dtype = resolve_dtype(args.dtype, config)
    kv_dtype = resolve_kv_dtype(args.kv_cache_dtype, dtype, platform.capabilities().kv_dtypes)
    device = platform.device()
    linear = platform.linear(None)

    trust = args.trust_remote_code
    adapted = begin(config, dtype, args) if begin else AdaptedModel(build(config, dtype, trust_remote_code=trust))
    model = adapted.model
    if adapter := get_hooks().engine_models().get(type(model).__name__):
        reserved = adapter(model, adapted.context)
        if adapted.max_model_len is not None:
            adapted.max_model_len -= reserved or 0
    if share is not None:
        share.cut(adapted)
    use(model, probe.IMPLEMENTATION)
    seen: Observations | None = None
    with suppress(UnsupportedModelError):  # where the model's code looks at data, the weights must come first
        seen = probe.observe(model, adapted.run, torch.device("meta"))
    if seen is not None:
        adapted.attach(seen, platform, kv_dtype)
    stored = getattr(config, "quantization_config", None) or {}
    if word := args.quantization or stored.get("quant_method", stored and "unnamed"):
        pick("quantization", word, get_hooks().engine_quantization())(model, args, seen)
    plan = pick("load_format", args.load_format, get_hooks().engine_load_formats())(model, args)
    parts: list[Any] = []
    for swap in get_hooks().engine_swaps().values():
        parts += swap(model, seen or Observations(), platform.linear)

    allocate(model, parts, device.torch_device)
    plan.fill(device, progress=progress)
    if share is not None:
        share.loaded(adapted)
    for part in parts:
        part.pack(linear)

    if seen is None:
        seen = probe.observe(model, adapted.run, device.torch_device)
        adapted.attach(seen, platform, kv_dtype)
    experts.attach(seen, platform, None if args.enforce_eager else platform.compiler())
    use(model, attention.IMPLEMENTATION)
    _check_tokens_apart(adapted, device.torch_device)
    return adapted


def build(
    config: PreTrainedConfig, dtype: torch.dtype, auto: Any = AutoModelForCausalLM, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model without weights: parameters on `meta`, in their final dtypes; buffers too.

    Raises `UnsupportedModelError` where it is no causal language model, or keeps more than keys and values.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        try:
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code, **options)
        except ValueError as error:
            # The text part of a larger model, saved by itself, is known by its class only.
            part = getattr(transformers, (config.architectures or [""])[0], None)
            if part is None or part.config_class is not type(config):
                what = f"Transformers {transformers.__version__} has no causal language model for {config.model_type!r}"
                raise UnsupportedModelError(f"{what}: {str(error).splitlines()[0]}") from error
            model = part._from_config(config, **options)
    _refuse_states(model)
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if re.search(pattern.replace("*", ".*"), name):
                tensor.data = tensor.data.to(kept)
    model.eval().requires_grad_(False)
    return model


def use(model: PreTrainedModel, implementation: str) -> None:
    """Let every part of `model` find its attention and experts functions under the name `implementation`."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = implementation
            config._experts_implementation = implementation


def _refuse_states(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    if states := _STATES & set(getattr(config, "layer_types", None) or ()):
        what = f"layers with a state ({', '.join(sorted(states))})"
    elif getattr(model, "_is_stateful", False):
        what = "layers with a state"
    elif config.is_encoder_decoder:
        what = "an encoder beside its decoder"
    else:
        return
    raise UnsupportedModelError(f"{type(model).__name__} has {what}, which is not built yet")


def _check_tokens_apart(adapted: AdaptedModel, device: torch.device) -> None:
    """Raise `UnsupportedModelError` if a token's logits depend on more than its id, its position, and attention.

    The engine runs many sequences as one, and only its attention knows where one ends. So equal tokens at equal
    positions must come out equal wherever they stand and whatever stands beside them; attention, which has no plans
    yet, keeps them apart here.
    """
    a, b, c, d = (adapted.vocab_size * i // 5 for i in (4, 2, 3, 1))
    pad = getattr(adapted.config.get_text_config(), "pad_token_id", None)
    beside = (c, pad if pad is not None and 0 <= pad < adapted.vocab_size else d)
    positions = torch.tensor([0, 1, 2, 1, 0], device=device)
    index = torch.arange(5, device=device)
    first, other = (
        adapted.forward(torch.tensor([a, b, middle, b, a], device=device), positions, index).nan_to_num()
        for middle in beside
    )
    tolerance = (1e-3 if first.dtype == torch.float32 else 2e-2) * first.abs().max()
    differences = torch.cat((first[:2] - first[3:].flip(0), first[:2] - other[:2], first[3:] - other[3:]))
    if not (differences.abs() <= tolerance).all():
        raise UnsupportedModelError(
            f"{type(adapted.model).__name__} lets tokens meet outside of attention (in a state, a convolution "
            "or attention of its own), or counts positions by itself; support for that is not built yet"
        )
