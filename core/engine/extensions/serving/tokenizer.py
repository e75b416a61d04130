"""The core's tokenizer in another process, without Transformers there: what the core loaded, sent as text.

Transformers takes seconds to import and brings torch. The core has both anyway, so it loads the tokenizer, and its
front rebuilds the same one from the fast tokenizer's own serialisation, in a fraction of a second.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine.extensions.serving import chat_template as templates
from engine.extensions.tokenizers.hugging_face import HuggingFaceTokenizer
from engine.text import Tokenizer


class TokenizerData(msgspec.Struct):
    """All of a fast tokenizer that its users see.

    Attributes:
        backend: the `tokenizers` library's JSON.
        chat_template: Jinja source, or several by name.
        special_tokens: variables that every template sees, such as ``bos_token``.
    """

    backend: str
    chat_template: str | dict[str, str] | None
    special_tokens: dict[str, Any]


def pack(tokenizer: Tokenizer) -> TokenizerData | None:
    """What rebuilds the tokenizer; None where it is written in Python and cannot be sent."""
    hf = tokenizer.hf
    if not hf.is_fast:
        return None
    special = {
        name: [str(t) for t in token] if isinstance(token, (list, tuple)) else str(token)
        for name, token in hf.special_tokens_map.items()
    }
    return TokenizerData(hf.backend_tokenizer.to_str(), hf.chat_template, special)


def unpack(data: TokenizerData) -> Tokenizer:
    """The tokenizer again; its `hf` has what the engine uses of a Transformers tokenizer, and no more."""
    return HuggingFaceTokenizer(_Portable(data))


class _Portable:
    """Answers like a fast tokenizer of Transformers, as far as `engine.text.Tokenizer` asks."""

    is_fast = True

    def __init__(self, data: TokenizerData) -> None:
        import tokenizers

        self.backend_tokenizer = tokenizers.Tokenizer.from_str(data.backend)
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self.chat_template = data.chat_template
        self.special_tokens_map = data.special_tokens

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str:
        assert not tokenize, "Tokenizer.render_chat asks for text"
        named = self.chat_template if isinstance(self.chat_template, dict) else {}
        return templates.render(
            named.get(chat_template or "") or chat_template or templates.select(self.chat_template, tools),
            conversation,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens_map, **variables},
        )
