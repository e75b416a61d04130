"""Adapters for architectures that attend, or count positions, by themselves: a plugin like any other's.

Registered in the entry-point group ``engine.plugins``; nothing of Transformers is imported before one is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.hooks import hookimpl

ARCHITECTURES = [
    "BartForCausalLM",
    "BigBirdForCausalLM",
    "BigBirdPegasusForCausalLM",
    "BioGptForCausalLM",
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "BloomForCausalLM",
    "CamembertForCausalLM",
    "CodeGenForCausalLM",
    "Data2VecTextForCausalLM",
    "FalconForCausalLM",
    "GPTJForCausalLM",
    "GPTNeoForCausalLM",
    "GPTNeoXJapaneseForCausalLM",
    "GitForCausalLM",
    "Llama4ForCausalLM",
    "MBartForCausalLM",
    "MarianForCausalLM",
    "MegatronBertForCausalLM",
    "MptForCausalLM",
    "MvpForCausalLM",
    "OPTForCausalLM",
    "OpenAIGPTLMHeadModel",
    "PLBartForCausalLM",
    "PegasusForCausalLM",
    "ProphetNetForCausalLM",
    "RemBertForCausalLM",
    "RoFormerForCausalLM",
    "RobertaForCausalLM",
    "RobertaPreLayerNormForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
    "XGLMForCausalLM",
    "XLMRobertaForCausalLM",
    "XLMRobertaXLForCausalLM",
    "XmodForCausalLM",
]
"""Names of model classes that `adopt` changes."""


_HEADS = ("ForCausalLM", "LMHeadModel")
_OTHER_HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification")


@hookimpl
def engine_models() -> Mapping[str, Callable[..., int]]:
    """The same adapter for each: it looks at the parts of the model. Their bodies with other heads are alike."""
    stems = [name.removesuffix(head) for name in ARCHITECTURES for head in _HEADS if name.endswith(head)]
    stems.append("MPNet")
    return dict.fromkeys([*ARCHITECTURES, *(stem + head for stem in stems for head in _OTHER_HEADS)], _adopt)


def _adopt(model: Any, context: Any) -> int:
    from engine.extensions.models.inline import adopt

    return adopt(model, context)
