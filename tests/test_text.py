"""Text in and out, on tokenizers of each family that are trained here, and the demo model's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import engine
from engine.errors import CheckpointError, RequestError
from engine.extensions.tokenizers.hugging_face import HuggingFaceTokenizer
from engine.request import CompletionOutput, CoreOutput, Logprob, SamplingParams, TokenLogprobs
from engine.text import IncrementalDetokenizer, SequenceOutput, StopChecker, Tokenizer, load_tokenizer

DEMO = Path(engine.__file__).parent / "demo_model"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12,345.67 dollars, isn't it?",
    "Größe, naïveté, façade; Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم",
    "你好，世界。こんにちは世界。안녕하세요 세계. नमस्ते दुनिया. สวัสดีชาวโลก",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumbs, e\u0301 combining, 🇫🇷🇩🇪, Z͑ͫ̓ͪ̂ͫalgo",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}\n\n\t# comment   with   spaces",
] * 3


def byte_level() -> Backend:
    """As GPT-2, Llama 3 and Qwen: any bytes, so half characters at any token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return backend


def byte_fallback() -> Backend:
    """As Llama 2 and Gemma: words with their leading space, and bytes for what is in no word."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(
        [CORPUS[0], CORPUS[4]],
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        ),
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    state = json.loads(backend.to_str())  # bytes are words of the vocabulary, not special tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return Backend.from_str(json.dumps(state))


def unigram() -> Backend:
    """As T5 and ALBERT, with Metaspace."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=350, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    )
    return backend


def word_piece() -> Backend:
    """As BERT."""
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"])
    )
    return backend


def hugging(backend: Backend, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)


FAMILIES: dict[str, Callable[[], Backend]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "unigram": unigram,
    "word_piece": word_piece,
}
TOKENIZERS: dict[str, Tokenizer] = {name: HuggingFaceTokenizer(hugging(make())) for name, make in FAMILIES.items()}
TOKENIZERS["demo"] = load_tokenizer(str(DEMO))
ALL = pytest.mark.parametrize("name", TOKENIZERS)

SOME = st.one_of(st.text(max_size=6), st.sampled_from(CORPUS), st.sampled_from(["  ", "\n", "👩‍👩‍👧", "e\u0301"]))
TEXT = st.lists(SOME).map("".join)


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


# ------------------------------------------------------------------------------------------ detokenizer


@ALL
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_pieces_join_to_the_text_of_all(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    text = data.draw(TEXT)
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
    pieces = stream(tokenizer, ids[:cut], ids[cut:])
    expected = whole[len(before.rstrip("�")) if not whole.startswith(before) else len(before) :]
    assert "".join(pieces) == expected
    if "�" not in whole:
        assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("name", ["byte_level", "demo"])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_bytes_are_streamed_as_they_are_decoded(name: str, data: st.DataObject) -> None:
    """A model may produce bytes that are no text at all."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer.hf) + 3), max_size=30))
    for skip in (True, False):
        assert "".join(stream(tokenizer, [], ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@ALL
def test_words_keep_their_space_after_the_prompt(name: str) -> None:
    tokenizer, text = TOKENIZERS[name], "The quick brown fox jumps"
    ids = tokenizer.encode(text, add_special_tokens=False)
    spaces = 0
    for cut in range(1, len(ids)):
        begun = tokenizer.decode(ids[:cut])
        assert "".join(stream(tokenizer, ids[:cut], ids[cut:])) == text[len(begun) :]
        spaces += text[len(begun)] == " "
    assert spaces


def test_special_tokens_alone_do_not_hide_what_comes_before() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids, special = tokenizer.encode("a the", add_special_tokens=False), tokenizer.hf.convert_tokens_to_ids("</s>")
    cut = next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]) == "a")
    prompt = ids[:cut] + [special] * 20
    assert "".join(stream(tokenizer, prompt, ids[cut:])) == " the"
    assert "".join(stream(tokenizer, prompt, [special, special], skip=False)) == "</s></s>"
    assert stream(tokenizer, prompt, [special, special]) == ["", "", ""]


def test_a_character_that_the_prompt_began_is_given_whole() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode("a 你", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids[:-1], ids[-1:])) == "你"
    assert stream(tokenizer, ids[:-2], ids[-2:-1])[0] == ""


@ALL
def test_one_token_has_its_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("a The quick", add_special_tokens=False)
    assert "".join(map(tokenizer.token_text, ids)).strip() == "a The quick"
    special = "<|im_end|>" if name == "demo" else "</s>"
    assert tokenizer.token_text(tokenizer.hf.convert_tokens_to_ids(special)).strip() == special
    assert tokenizer.token_text(len(tokenizer.hf) + 7) == ""


# ------------------------------------------------------------------------------------------ stop strings


def first_stop(text: str, stops: list[str], begin: int = 0) -> tuple[int, str] | None:
    """Where a stop string is complete first (after `begin`), and the longest one that is."""
    for end in range(begin + 1, len(text) + 1):
        if hits := [s for s in stops if text[:end].endswith(s)]:
            return end, max(hits, key=len)
    return None


PIECES = st.lists(st.text("abc", max_size=4), max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


@settings(deadline=None, max_examples=500)
@given(PIECES, STOPS, st.booleans(), st.integers(0, 4))
def test_stop_strings_are_those_of_a_search_over_the_whole(
    pieces: list[str], stops: list[str], include: bool, unarmed: int
) -> None:
    text, begin = "".join(pieces), len("".join(pieces[:unarmed]))
    expected = first_stop(text, stops, begin)
    checker, shown, found = StopChecker(stops, include), "", None
    for i, piece in enumerate(pieces):
        out, found = checker.push(piece, i >= unarmed)
        shown += out
        read = "".join(pieces[: i + 1])
        # No more is held than what could still begin a stop string, and no part of one is shown.
        assert found or read == shown or any(s.startswith(read[len(shown) :]) for s in stops)
        if found:
            break
    if expected is None:
        assert found is None
        assert shown + checker.flush() == text
    else:
        end, stop = expected
        assert found == stop
        assert shown == text[: end if include else end - len(stop)]


def test_ties_of_stop_strings() -> None:
    assert StopChecker(["abcd", "bc"]).push("xabcdx") == ("xa", "bc")
    assert StopChecker(["c", "bc"]).push("xabc") == ("xa", "bc")


# ------------------------------------------------------------------------------------------ a completion


def run(
    text: str, params: SamplingParams, reason: Any = None, name: str = "byte_level"
) -> tuple[CompletionOutput, list[str]]:
    """Push the tokens of `text` one by one; the last has `reason`."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    sequence, deltas = SequenceOutput(0, params, tokenizer, []), []
    for i, token_id in enumerate(ids):
        last, shown = i == len(ids) - 1, len(sequence.completion.text)
        sequence.push(CoreOutput("r", [token_id], finish_reason=reason if last else None))
        deltas.append(sequence.completion.text[shown:])
        if sequence.completion.finished():
            break
    return sequence.completion, deltas


def test_a_stop_string_ends_a_completion_before_the_core_does() -> None:
    done, _ = run("The quick brown fox jumps", SamplingParams(stop=["fox", "own f"]))
    assert (done.text, done.finish_reason, done.stop_reason) == ("The quick br", "stop", "own f")
    assert TOKENIZERS["byte_level"].decode(done.token_ids).startswith("The quick brown f")
    done, _ = run("The quick brown fox", SamplingParams(stop="fox", include_stop_str_in_output=True), "length")
    assert (done.text, done.finish_reason, done.stop_reason) == ("The quick brown fox", "stop", "fox")


def test_what_was_held_back_comes_at_the_end() -> None:
    done, deltas = run("The quick brown fo", SamplingParams(stop="fox"), "length")
    assert (done.text, done.finish_reason, done.stop_reason) == ("The quick brown fo", "length", None)
    assert not any("f" in delta for delta in deltas[:-1])
    half = TOKENIZERS["byte_level"].encode("a👍", add_special_tokens=False)[:-1]
    sequence = SequenceOutput(0, SamplingParams(), TOKENIZERS["byte_level"], [])
    assert sequence.push(CoreOutput("r", half)).text == "a"
    assert sequence.push(CoreOutput("r", [], finish_reason="abort")).text == "a�"


def test_stop_strings_wait_for_min_tokens() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "ababab"]
    for min_tokens, text in ((0, ""), (1, ""), (2, "ab"), (3, "ab"), (4, "abab")):
        sequence = SequenceOutput(0, SamplingParams(stop="ab", min_tokens=min_tokens), tokenizer, [])
        assert sequence.push(CoreOutput("r", ids)).text == text


@pytest.mark.parametrize("include", [False, True])
def test_the_text_of_a_stop_token_is_left_out(include: bool) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("The fox", add_special_tokens=False)
    params = SamplingParams(stop_token_ids=[ids[-1]], include_stop_str_in_output=include)
    sequence = SequenceOutput(0, params, tokenizer, [])
    done = sequence.push(CoreOutput("r", ids, finish_reason="stop", stop_reason=ids[-1]))
    assert done.token_ids == ids
    assert done.text == tokenizer.decode(ids if include else ids[:-1])
    assert (done.finish_reason, done.stop_reason) == ("stop", ids[-1])


def test_tokens_after_a_stop_string_are_dropped_with_their_log_probabilities() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("The fox jumps", add_special_tokens=False)
    entries = [TokenLogprobs([i, 5, i], [-0.5, -0.5, -0.5], 1) for i in ids]
    sequence = SequenceOutput(3, SamplingParams(stop="fox", logprobs=2), tokenizer, [])
    done = sequence.push(CoreOutput("r", ids, logprobs=entries))
    count = len(done.token_ids)
    assert done.index == 3
    assert done.token_ids == ids[:count]
    assert tokenizer.decode(done.token_ids).endswith("fox")
    assert done.logprobs is not None
    assert len(done.logprobs) == count < len(ids)
    assert done.cumulative_logprob == -0.5 * count
    assert list(done.logprobs[0]) == [ids[0], 5]
    assert done.logprobs[0][ids[0]] == Logprob(-0.5, 1, tokenizer.token_text(ids[0]))
    assert done.logprobs[0][5] == Logprob(-0.5, 1, tokenizer.token_text(5))


def test_without_a_tokenizer_or_text_there_are_only_ids() -> None:
    for tokenizer, params in (
        (None, SamplingParams(logprobs=0)),
        (TOKENIZERS["demo"], SamplingParams(detokenize=False)),
    ):
        sequence = SequenceOutput(0, params, tokenizer, [1])
        entry = TokenLogprobs([4], [-math.inf], 9)
        done = sequence.push(CoreOutput("r", [4], finish_reason="length", logprobs=[entry]))
        assert (done.text, done.token_ids, done.finish_reason) == ("", [4], "length")
        assert done.logprobs == (None if params.logprobs is None else [{4: Logprob(-math.inf, 9, None)}])


# ------------------------------------------------------------------------------------------ loading, chat


def test_prompts_get_the_tokens_that_the_tokenizer_adds() -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer = HuggingFaceTokenizer(hugging(backend))
    assert tokenizer.encode("fox") == [0, *tokenizer.encode("fox", add_special_tokens=False)]


def test_a_saved_tokenizer_loads(tmp_path: Path) -> None:
    hugging(byte_level()).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), vocab_size=420)
    assert tokenizer.decode(tokenizer.encode("Größe 👍🏽")) == "Größe 👍🏽"
    with pytest.raises(CheckpointError, match=r"ids up to 419, and the model has 419 embeddings"):
        load_tokenizer(str(tmp_path), vocab_size=419)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_a_checkpoint_error(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        load_tokenizer(str(tmp_path / "missing"))


TEMPLATE = """
{%- for m in messages %}{% if m.role == 'wizard' %}{{ raise_exception('bad role ' + m.role) }}{% endif -%}
<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if tools %}{{ tools | length }} tools{% endif %}{{ extra }}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def test_chat_templates() -> None:
    tokenizer = HuggingFaceTokenizer(hugging(byte_level(), chat_template=TEMPLATE))
    user = {"role": "user", "content": "Hi"}
    assert tokenizer.render_chat([user]) == "<user>Hi</><assistant>"
    assert tokenizer.render_chat([user], add_generation_prompt=False) == "<user>Hi</>"
    assert tokenizer.render_chat([user], [{"type": "function"}], extra="!") == "<user>Hi</>1 tools!<assistant>"
    begun = [user, {"role": "assistant", "content": "Well"}]
    assert tokenizer.render_chat(begun, continue_final_message=True) == "<user>Hi</><assistant>Well"
    assert tokenizer.render_chat([user], chat_template="{{ messages[0].content }}?") == "Hi?"


def test_chats_that_cannot_be_rendered_say_why() -> None:
    tokenizer = HuggingFaceTokenizer(hugging(byte_level(), chat_template=TEMPLATE))
    user = {"role": "user", "content": "Hi"}
    bad: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "empty"),
        ([{"content": "Hi"}], {}, "a message is a dictionary"),
        (["Hi"], {}, "a message is a dictionary"),
        ([{"role": "wizard", "content": "Hi"}], {}, "bad role wizard"),
        ([user], {"chat_template": "{% if %}"}, "cannot render"),
        ([user], {"chat_template": "{{ 1 / 0 }}"}, "division by zero"),
    ]
    for messages, options, match in bad:
        with pytest.raises(RequestError, match=match):
            tokenizer.render_chat(messages, **options)
    with pytest.raises(RequestError, match="pass one as chat_template"):
        HuggingFaceTokenizer(hugging(byte_level())).render_chat([user])


def test_the_demo_model_chats() -> None:
    tokenizer = TOKENIZERS["demo"]
    assert "Hello" in tokenizer.render_chat([{"role": "user", "content": "Hello"}])


@settings(deadline=None, max_examples=60)
@given(TEXT, st.lists(st.text(min_size=1, max_size=3), max_size=3), st.integers(1, 4))
def test_completions_do_not_depend_on_how_many_tokens_a_step_brings(text: str, stops: list[str], size: int) -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode(text, add_special_tokens=False)

    def complete(size: int) -> CompletionOutput:
        sequence = SequenceOutput(0, SamplingParams(stop=stops), tokenizer, [])
        for begin in range(0, len(ids), size):
            if sequence.push(CoreOutput("r", ids[begin : begin + size])).finished():
                return sequence.completion
        return sequence.push(CoreOutput("r", [], finish_reason="length"))

    assert complete(1) == complete(size)
    hit = first_stop(tokenizer.decode(ids), stops)
    assert complete(size).text == (
        tokenizer.decode(ids) if hit is None else tokenizer.decode(ids)[: hit[0] - len(hit[1])]
    )
