"""Tokenizers of Transformers, fast and slow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, RequestError

_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


class HuggingFaceTokenizer:
    """A tokenizer of Transformers as an `engine.text.Tokenizer`; `hf` is the tokenizer itself."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self._backend = hf.backend_tokenizer if hf.is_fast else None
        self._texts: dict[int, str] = {}
        self._anchor: list[int] = self.encode("a", add_special_tokens=False)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, by default with those that the tokenizer puts around it (such as a first BOS)."""
        return list(self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Ids that the tokenizer does not know, of a padded vocabulary, have none."""
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        known = [i for i in token_ids if i < len(self.hf)]
        return str(self.hf.decode(known, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Text of one token inside a text: with its leading space, special tokens by name."""
        if token_id not in self._texts:
            before = self.decode(self._anchor, skip_special_tokens=False)
            text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
            if not text.startswith(before):
                before, text = "", self.decode([token_id], skip_special_tokens=False)
            self._texts[token_id] = text[len(before) :]
        return self._texts[token_id]

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation, by the model's chat template. It has its special tokens already.

        Args:
            messages: each with a ``"role"`` and a ``"content"``.
            tools: descriptions of functions, for templates that take them.
            add_generation_prompt: end with what opens the assistant's turn.
            chat_template: Jinja source that replaces the model's.
            continue_final_message: leave the last message open, to be continued; wins over `add_generation_prompt`.
            variables: further variables of the template.

        Raises `RequestError` if there is no template, it is no valid Jinja, or it refuses the messages.
        """
        if not messages:
            raise RequestError("the conversation is empty; it needs at least one message")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                like = {"role": "user", "content": "Hello"}
                raise RequestError(f"a message is a dictionary like {like}, this one is {message!r}")
        if not (chat_template or getattr(self.hf, "chat_template", None)):
            raise RequestError(
                "the model's tokenizer has no chat template; pass one as chat_template (Jinja source), or write the "
                "prompt as plain text and use generate"
            )
        try:
            text = self.hf.apply_chat_template(
                [dict(m) for m in messages],
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # Jinja's errors, and whatever a template's own expressions raise
            raise RequestError(f"the chat template cannot render these messages: {error}") from error
        return str(text)


def load(folder: str, trust_remote_code: bool, vocab_size: int | None) -> HuggingFaceTokenizer:
    """Load the tokenizer in `folder`; nothing is downloaded. See `engine.text.load_tokenizer`."""
    if not (trust_remote_code or any(any(Path(folder).glob(pattern)) for pattern in _FILES)):
        raise CheckpointError(
            f"there is no tokenizer in {folder!r}: none of {', '.join(_FILES)}. Name its folder with the option "
            f"tokenizer, or work with token ids only (skip_tokenizer_init)"
        )
    from transformers import AutoTokenizer  # takes seconds to import, and only those who need text pay

    try:
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        largest = max(hf.get_vocab().values())
    except Exception as error:  # each kind of tokenizer raises its own
        raise CheckpointError(f"cannot load the tokenizer in {folder!r}: {error}") from error
    if vocab_size is not None and largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder!r} has token ids up to {largest}, and the model has {vocab_size} embeddings; "
            f"they do not belong together"
        )
    return HuggingFaceTokenizer(hf)
