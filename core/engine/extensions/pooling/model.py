"""A model that pools: its body runs in each step, and what follows the body runs on the states of whole texts.

    tokens -> body -> states [N, E] -> collected a request -> pool, classify or score -> float32
              engine's attention       [n, E] or its last

What follows is the model's own code: its `forward` is called with states in place of its body's, so whatever lies
behind the body of an architecture (a pooler, a head of several layers, a scaled product) is as Transformers has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as BodyOutput

from engine.config import EngineArgs
from engine.errors import UnsupportedModelError
from engine.extensions.pooling import poolers
from engine.extensions.pooling.checkpoint import Kind, Recipe, read_recipe
from engine.extensions.pooling.rewards import NUM_LABELS, RewardModel
from engine.interfaces import Platform
from engine.model.adapt import AdaptedModel, build
from engine.model.probe import Observations
from engine.staging import Staged

Asked = dict[str, Any]
"""`CoreRequest.pooling`: ``task``, and where they matter ``dimensions``, ``normalize``, ``activation``, ``skip``."""

_AUTOS: dict[Kind, Any] = {
    "embed": AutoModel,
    "classify": AutoModelForSequenceClassification,
    "token_classify": AutoModelForTokenClassification,
    "token_score": AutoModelForCausalLM,
}
_NO_PAD = -1  # a padding token that no text has


def begin(config: PreTrainedConfig, dtype: torch.dtype, args: EngineArgs) -> PoolingModel:
    """The model that `args` name, without weights."""
    recipe = read_recipe(args, config.to_dict())
    name = (config.architectures or [""])[0]
    auto = RewardModel if name.endswith(tuple(NUM_LABELS)) else _AUTOS[recipe.kind]
    model = build(config, dtype, auto, trust_remote_code=args.trust_remote_code)
    # a checkpoint may have heads that this model has not, and lack a pooler that embeddings do not read
    model._keys_to_ignore_on_load_unexpected = {r".*"}
    if recipe.kind == "embed" and isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = nn.Identity()
    return PoolingModel(model, recipe)


class PoolingModel(AdaptedModel):
    """A loaded model whose states are its output.

    Attributes:
        recipe: how it pools.
        token_types: int64 [N] of the step, for encoders of pairs; None for zeros.
        sees_ahead: its tokens attend to later ones, so it takes a prompt whole.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe) -> None:
        self.recipe = recipe
        self._limit: int | None = None
        super().__init__(model)
        self._keeps_logits = False
        self._body: Any = model.base_model
        takes = inspect.signature(self._body.forward).parameters
        self._fixed = {k: v for k, v in (("use_cache", False), ("return_dict", True)) if k in takes}
        self.takes_types = "token_type_ids" in takes and getattr(model.config, "type_vocab_size", 2) > 1
        self.token_types: Staged | None = None
        self.sees_ahead = False
        self._layers = [poolers.After(layer) for layer in recipe.layers]
        self._tokens: list[int] = []

    @property
    def max_model_len(self) -> int | None:
        """Most tokens of a prompt: what the model was made for, or less where sentence-transformers says so."""
        return min((n for n in (self._limit, self.recipe.max_len) if n), default=None)

    @max_model_len.setter
    def max_model_len(self, value: int | None) -> None:
        self._limit = value

    def run(self, input_ids: Tensor, position_ids: Tensor, **arguments: Any) -> Any:
        """The body's states [1, N, E] as ``logits``, for the flattened tokens of a batch, int64 [N]."""
        self.context.begin(position_ids)
        if self.token_types is not None:
            arguments["token_type_ids"] = self.token_types.device[None]
        given = {"input_ids": input_ids[None], "position_ids": position_ids[None], **self._fixed, **arguments}
        output = self._body(**given)
        return SimpleNamespace(logits=output.last_hidden_state)

    def attach(self, seen: Observations, platform: Platform, kv_dtype: torch.dtype) -> None:
        """As the base does; raises `UnsupportedModelError` where tokens meet outside of the engine's attention."""
        seen.ahead = True
        super().attach(seen, platform, kv_dtype)
        if not self.attention_layers:
            raise UnsupportedModelError(f"{type(self.model).__name__} attends by itself, which is not built yet")
        self.vocab_size = self.config.get_text_config().vocab_size
        self.sees_ahead = not all(layer.spec.causal for layer in self.attention_layers.values())

    def ready(self, token_ids: Sequence[int]) -> None:
        """The weights are there; `token_ids` are those of the recipe's two answers, if it has any."""
        self._tokens = list(token_ids)
        self._check_positions()
        text = self.model.config.get_text_config()
        text.pad_token_id = self.model.config.pad_token_id = _NO_PAD

    @torch.inference_mode()
    def _check_positions(self) -> None:
        """Raise `UnsupportedModelError` if the model's code, left alone, would not count positions from 0.

        Those that an adapter made count as the engine tells them are right already.
        """
        if any(hasattr(module, "engine_context") for module in self.model.modules()):
            return
        parameter = next(self.model.parameters())
        ids = torch.arange(4, 8, device=parameter.device) % self.vocab_size
        positions = torch.arange(4, device=ids.device)
        told = self.run(ids, positions).logits
        self.context.begin(positions)
        alone = self._body(input_ids=ids[None], **self._fixed).last_hidden_state
        if not (told - alone).abs().max() <= (1e-3 if told.dtype == torch.float32 else 2e-2) * told.abs().max():
            what = f"{type(self.model).__name__} counts positions by itself, and not from 0"
            raise UnsupportedModelError(f"{what}; support for that is not built yet")

    @property
    def ways(self) -> tuple[str, ...]:
        """How embeddings are pooled."""
        return self.recipe.pooling or (("mean",) if self.sees_ahead else ("lasttoken",))

    def whole_states(self) -> bool:
        """Whether what is made of a whole text needs the states of all its tokens."""
        return self.sees_ahead if self.recipe.kind != "embed" else self.ways != ("lasttoken",)

    @torch.inference_mode()
    def make(self, asked: Sequence[Asked], states: Sequence[Tensor]) -> list[Tensor]:
        """What each request gets of its states [n, E], of all tokens or the last one: float32."""
        match self.recipe.kind:
            case "embed":
                return self._embeddings(asked, states)
            case "token_classify":
                found = [self._through_head(s[None])[0] for s in states]
            case "classify" if self.sees_ahead:
                found = [self._through_head(s[None])[0] for s in states]
            case "classify":
                found = list(self._through_head(torch.stack([s[-1:] for s in states])))
            case _:
                logits = self._through_head(torch.stack([s[-1:] for s in states]))[:, -1]
                found = list(logits[:, self._tokens])
        return [self._activate(x, a) for x, a in zip(found, asked, strict=True)]

    def describe(self) -> dict[str, Any]:
        """`EngineInfo.pooling`: see `engine.extensions.pooling.requests`, which reads it."""
        config, recipe = self.model.config, self.recipe
        tasks = {
            "embed": ["embed", "token_embed"],
            "classify": ["classify", "score"] if config.num_labels == 1 else ["classify"],
            "token_classify": ["token_classify"],
            "token_score": ["score"],
        }
        labels, num_labels = getattr(config, "id2label", None) or {}, config.num_labels or 1
        found: dict[str, Any] = {
            "tasks": tasks[recipe.kind],
            "whole_states": self.whole_states(),
            "prompts": recipe.prompts,
            "default_prompt": recipe.default_prompt,
            "include_prompt": recipe.include_prompt,
            "lower_case": recipe.lower_case,
            "similarity": recipe.similarity,
            "template": recipe.template,
            "instruction": recipe.instruction,
            "token_types": self.takes_types and self.sees_ahead,
            "labels": [labels.get(i, f"LABEL_{i}") for i in range(num_labels)],
        }
        if recipe.kind == "embed":
            found["dimensions"] = self._embed(torch.zeros(1, config.get_text_config().hidden_size)).shape[-1]
            allowed = getattr(config, "matryoshka_dimensions", None)
            found["matryoshka"] = list(allowed) if allowed else bool(getattr(config, "is_matryoshka", False))
        return found

    def _embeddings(self, asked: Sequence[Asked], states: Sequence[Tensor]) -> list[Tensor]:
        both = list(zip(asked, states, strict=True))
        pooled = [poolers.pool(s.float(), self.ways, a.get("skip", 0)) for a, s in both if a["task"] == "embed"]
        vectors = iter(self._behind(torch.stack(pooled)) if pooled else ())
        # a vector a token goes without the layers behind a pooling
        return [self._finish(next(vectors) if a["task"] == "embed" else s.float(), a) for a, s in both]

    def _embed(self, states: Tensor) -> Tensor:
        return self._behind(poolers.pool(states, self.ways)[None])

    def _behind(self, x: Tensor) -> Tensor:
        """Pooled vectors [n, E] through the layers behind the pooling."""
        for layer in self._layers:
            x = layer(x)
        return x

    def _finish(self, x: Tensor, asked: Asked) -> Tensor:
        x = x[..., : asked.get("dimensions")]
        normalize = asked.get("normalize")
        return nn.functional.normalize(x, dim=-1) if (self.recipe.normalize if normalize is None else normalize) else x

    def _activate(self, x: Tensor, asked: Asked) -> Tensor:
        """Numbers of classes [labels] or [n, labels] as the configuration, the recipe or the request wants them."""
        x, config = x.float(), self.model.config
        wanted = self.recipe.activation if asked.get("activation") is None else asked["activation"]
        if self.recipe.kind == "token_score":
            return (x[..., 1:] - x[..., :1]).sigmoid() if wanted is not False else x[..., 1:] - x[..., :1]
        if wanted is False:
            return x
        if asked["task"] == "score" and (name := score_activation(config)):
            return poolers.named_activation(name)(x)
        problem, one = getattr(config, "problem_type", None), config.num_labels == 1
        if wanted is None and (problem == "regression" or (one and isinstance(self.model, RewardModel))):
            return x
        return x.sigmoid() if one or problem == "multi_label_classification" else x.softmax(-1)

    def _through_head(self, states: Tensor) -> Tensor:
        """The logits of what follows the body, of states [texts, n, E]."""
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict": True}
        takes = inspect.signature(self.model.forward).parameters
        with _in_place_of(self._body, states):
            logits: Tensor = self.model(**{k: v for k, v in given.items() if k in takes}).logits
        return logits


def score_activation(config: PreTrainedConfig) -> str | None:
    """The activation that sentence-transformers' cross-encoders keep in the configuration, by the path of its class."""
    own = getattr(config, "sentence_transformers", None) or {}
    name: str | None = own.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    return name


@contextmanager
def _in_place_of(body: nn.Module, states: Tensor) -> Iterator[None]:
    """Meanwhile `body` gives `states` [texts, n, E], and what its own pooler makes of them."""
    pooler: Any = getattr(body, "pooler", None)
    if isinstance(pooler, nn.Linear):  # Albert's
        activation: Any = body.pooler_activation
        pooled = activation(pooler(states[:, 0]))
    else:
        pooled = None if pooler is None else pooler(states)
    output = BodyOutput(last_hidden_state=states, pooler_output=pooled)
    vars(body)["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del vars(body)["forward"]
