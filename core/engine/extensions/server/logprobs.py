"""Log probabilities in the two shapes of OpenAI's answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from engine.extensions.server.answers import ChatLogprobs, TextLogprobs, TokenLogprob, Top
from engine.request import Logprob
from engine.text import Tokenizer

Entry = Mapping[int, Logprob]
Namer = Callable[[int, Logprob], str]

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have


def namer(as_ids: bool) -> Namer:
    """How tokens are called: by their text, or as ``token_id:N``, which is exact where texts are not."""
    return (lambda i, _: f"token_id:{i}") if as_ids else (lambda _, entry: entry.decoded_token or "")


def text_logprobs(
    tokens: Sequence[int], entries: Sequence[Entry | None], name: Namer, offset: int, num_top: int, tokenizer: Tokenizer
) -> TextLogprobs:
    """As completions have them.

    Args:
        tokens: of the text.
        entries: one a token, the token itself first; None for a prompt's first token, which has none.
        name: of a token.
        offset: in characters, of the first token in the text.
        num_top: alternatives that were asked for; the token itself comes on top of them.
        tokenizer: names tokens that have no entry.
    """
    found = TextLogprobs([], [], [], [])
    for token_id, entry in zip(tokens, entries, strict=True):
        chosen = entry[token_id] if entry else Logprob(0.0, 0, tokenizer.token_text(token_id))
        found.text_offset.append(offset)
        found.tokens.append(name(token_id, chosen))
        found.token_logprobs.append(_finite(chosen) if entry else None)
        # the likeliest last, so that of two tokens with one text it is the one that counts
        top = {name(i, p): _finite(p) for i, p in reversed(list(entry.items()))} if entry and num_top else None
        found.top_logprobs.append(top)
        offset += len(chosen.decoded_token or "")
    return found


def chat_logprobs(entries: Sequence[Entry], name: Namer, num_top: int, tokenizer: Tokenizer) -> ChatLogprobs:
    """As chats have them: the `num_top` likeliest tokens with each."""
    content = []
    for entry in entries:
        chosen, logprob = next(iter(entry.items()))
        top = sorted(entry.items(), key=lambda item: item[1].rank)[:num_top]
        content.append(
            TokenLogprob(
                name(chosen, logprob),
                _finite(logprob),
                token_bytes(tokenizer, chosen),
                [Top(name(i, p), _finite(p), token_bytes(tokenizer, i)) for i, p in top],
            )
        )
    return ChatLogprobs(content)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> list[int] | None:
    """The bytes of a token, of which several may make a character; None where only the text is known to be broken."""
    text = tokenizer.token_text(token_id)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return list(text.encode())
    piece: str | None = tokenizer.hf.backend_tokenizer.id_to_token(token_id) if tokenizer.hf.is_fast else None
    if piece is not None and len(piece) == 6 and piece.startswith("<0x"):  # a byte of SentencePiece
        return [int(piece[3:5], 16)]
    table = _byte_level()
    return [table[c] for c in piece] if piece and all(c in table for c in piece) else None


@functools.cache
def _byte_level() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, _LEAST)
