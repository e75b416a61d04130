"""Text in and out: the tokenizer, token ids to text while they come, stop strings, and one completion's output.

token ids -> IncrementalDetokenizer -> StopChecker -> CompletionOutput.text
             holds half characters     holds what may become a stop string
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from engine.plugins import get_hooks, pick
from engine.request import CompletionOutput, CoreOutput, Logprob, SamplingParams, TokenLogprobs

_HALF = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no character (yet)
_CONTEXT = 6  # prompt tokens that are decoded with the first new one


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer; plugins bring them (`engine.hooks.engine_tokenizers`)."""

    hf: Any  # the tokenizer of Transformers that it is, or what answers like one

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, by default with those that the tokenizer puts around it (such as a first BOS)."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Ids that the tokenizer does not know, of a padded vocabulary, have none."""

    def token_text(self, token_id: int) -> str:
        """Text of one token inside a text: with its leading space, special tokens by name."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, **variables: Any) -> str:
        """The prompt of a conversation, special tokens included; raises `RequestError` if that cannot be made."""


def load_tokenizer(folder: str, mode: str = "auto", *, trust: bool = False, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in `folder`, as `mode` reads it; `vocab_size` is how many rows the model's embedding has.

    Raises `CheckpointError` if there is no tokenizer, it cannot be read, or it has more tokens than the model, and
    `ConfigError` for a mode that no plugin has.
    """
    load = pick("tokenizer_mode", mode, get_hooks().engine_tokenizers())
    return cast(Tokenizer, load(folder, trust, vocab_size))


class IncrementalDetokenizer:
    """Turns token ids into text as they come. The pieces joined are the text of all.

    A character is held back until all of its bytes are there. Text is decoded in a window that starts with the tokens
    of the last piece, since the text of a token depends on the one before it; at first these are of the prompt, so that
    a word that follows it keeps its space. What a decoder makes of later tokens never changes a piece that is out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        size = _CONTEXT
        self._show(prompt_token_ids[-size:])
        # special tokens alone tell nothing of spaces, and the window must not start inside a character
        while (not self._shown or self._shown.startswith(_HALF)) and size < len(prompt_token_ids):
            size *= 2
            self._show(prompt_token_ids[-size:])

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while half a character waits for the rest."""
        self._window.append(token_id)
        text = self._decode(self._window)
        piece = "" if text.endswith(_HALF) else self._beyond_shown(text)
        if piece:  # half a character of the prompt stays with its other half
            self._show(self._window[0 if self._shown.endswith(_HALF) else self._num_shown :])
        return piece

    def flush(self) -> str:
        """The end: what was held back, as far as it is text."""
        return self._beyond_shown(self._decode(self._window))

    def _beyond_shown(self, text: str) -> str:
        # Where the prompt ended in half a character that is whole now, it belongs to the new text.
        shown = self._shown if text.startswith(self._shown) else self._shown.rstrip(_HALF)
        return text[len(shown) :]

    def _show(self, token_ids: Sequence[int]) -> None:
        """Begin a window with tokens whose text is out."""
        self._window = list(token_ids)
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)


class StopChecker:
    """Finds stop strings in text that comes in pieces, and holds back what may become one.

    The stop string that is complete first ends the text; of several that end at the same character, the longest. So the
    outcome does not depend on how the text was cut into pieces. `include` keeps the stop string in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, piece: str, armed: bool = True) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string that ended it, if one did.

        A stop string counts only if it ends in an `armed` piece.
        """
        text, begin = self._held + piece, len(self._held)
        if armed:
            found = [(at + len(s), at, s) for s in self._stops if (at := text.find(s, max(0, begin - len(s) + 1))) >= 0]
            if found:
                end, at, stop = min(found)
                self._held = ""
                return text[: end if self._include else at], stop
        cut = len(text) - max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """The end: what was held back is text after all."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, and is not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class SequenceOutput:
    """One completion while it grows; without a tokenizer it has no text.

    Attributes:
        completion: all so far; text that may yet become part of a stop string is not in it.
    """

    def __init__(
        self, index: int, params: SamplingParams, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int]
    ) -> None:
        self.completion = CompletionOutput(index)
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = StopChecker(list(params.stop or ()), params.include_stop_str_in_output)
        if params.logprobs is not None:
            self.completion.logprobs, self.completion.cumulative_logprob = [], 0.0

    def push(self, output: CoreOutput) -> CompletionOutput:
        """Take in what a step brought, up to the token that completes a stop string, if one does.

        The completion then has the finish reason ``"stop"`` though `output` has none: the core must be told to abort.
        The text of a stop token is left out, unless `include_stop_str_in_output`.
        """
        done, stop = self.completion, None
        for i, token_id in enumerate(output.token_ids):
            done.token_ids.append(token_id)
            if done.logprobs is not None and output.logprobs:
                done.logprobs.append(self.logprob_dict(output.logprobs[i]))
                done.cumulative_logprob = (done.cumulative_logprob or 0.0) + output.logprobs[i].logprobs[0]
            ends = output.finish_reason == "stop" and i == len(output.token_ids) - 1
            if self._detokenizer is not None and not (ends and not self._params.include_stop_str_in_output):
                stop = self._add_text(self._detokenizer.push(token_id))
                if stop is not None:
                    break
        if stop is None and output.finish_reason is not None and self._detokenizer is not None:
            stop = self._add_text(self._detokenizer.flush())
            done.text += self._stops.flush()
        if stop is not None:
            done.finish_reason, done.stop_reason = "stop", stop
        elif output.finish_reason is not None:
            done.finish_reason, done.stop_reason = output.finish_reason, output.stop_reason
        return done

    def logprob_dict(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """Log probabilities by token id, the chosen token first."""
        text = self._tokenizer.token_text if self._tokenizer is not None else lambda _: None
        chosen = entry.token_ids[0]
        found = {chosen: Logprob(entry.logprobs[0], entry.rank, text(chosen))}
        for rank, (token_id, logprob) in enumerate(zip(entry.token_ids[1:], entry.logprobs[1:], strict=True), 1):
            if token_id != chosen:
                found[token_id] = Logprob(logprob, rank, text(token_id))
        return found

    def _add_text(self, piece: str) -> str | None:
        armed = len(self.completion.token_ids) > self._params.min_tokens
        text, stop = self._stops.push(piece, armed)
        self.completion.text += text
        return stop
