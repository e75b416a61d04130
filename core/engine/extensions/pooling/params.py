"""What a request for pooling asks for, under the names that vLLM's users know. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import RequestError

Task = Literal["embed", "token_embed", "classify", "token_classify", "score"]
"""What is made of a text: a vector, a vector a token, a number a class, a number a class and token, one number."""


@dataclass
class PoolingParams:
    """What is made of one request's states.

    Args:
        task: ``"embed"``, ``"token_embed"``, ``"classify"``, ``"token_classify"`` or ``"score"``; None takes the
            model's first.
        dimensions: keep so many leading numbers of an embedding, for models that were trained for it (Matryoshka).
        normalize: scale embeddings to length 1; None does what the checkpoint says, and does so where it says nothing.
        use_activation: softmax or sigmoid for classes and scores; None does what the checkpoint says. For embeddings it
            is another name of `normalize`.
        truncate_prompt_tokens: cut longer prompts to so many tokens, special ones included; -1 cuts to the model's
            limit. None refuses longer prompts.
    """

    task: Task | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model; raises `RequestError`."""
        if self.task is not None and self.task not in get_args(Task):
            raise RequestError(f"task must be one of {', '.join(get_args(Task))}, got {self.task!r}")
        for name, least in (("dimensions", 1), ("truncate_prompt_tokens", -1)):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least or value == 0:
                or_all = ", or -1 for the model's limit" if least < 0 else ""
                raise RequestError(f"{name} must be a whole number of at least 1{or_all}, got {value!r}")
        for name in ("normalize", "use_activation"):
            if not isinstance(getattr(self, name), bool | None):
                raise RequestError(f"{name} must be true, false or None, got {getattr(self, name)!r}")
