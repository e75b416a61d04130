"""Reward models of Qwen2's kind, whose code comes with the checkpoint: two layers on each token's state."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput

NUM_LABELS = {"ForRewardModel": 1, "ForProcessRewardModel": 2}
"""Ends of the names of such architectures: one gives a number a token, the other two, for wrong and right."""


class RewardModel(PreTrainedModel):
    """A body, and ``score`` on each of its states."""

    base_model_prefix = "model"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        auto: Any = AutoModel
        self.model = auto.from_config(config)
        size: Any = config.get_text_config().hidden_size
        self.score = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, config.num_labels or 1))
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, *, trust_remote_code: bool = False, **options: Any
    ) -> PreTrainedModel:
        """As Transformers' auto classes; the checkpoint's own code is not needed."""
        name = (config.architectures or [""])[0]
        config.num_labels = next(num for end, num in NUM_LABELS.items() if name.endswith(end))
        model: PreTrainedModel = cls._from_config(config, **options)  # type: ignore[no-untyped-call]
        return model

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **arguments: Any) -> Any:
        """As Transformers' models for token classification."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **arguments).last_hidden_state
        return TokenClassifierOutput(logits=self.score(states))
