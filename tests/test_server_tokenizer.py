"""The tokenizer that the core sends to its front is Transformers' own: same ids, texts and conversations."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import DEMO_MODEL
from engine.errors import RequestError
from engine.extensions.serving.tokenizer import TokenizerData, pack, unpack
from engine.text import Tokenizer, load_tokenizer

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {"a": '<&"é'}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, None, True]}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x", "reasoning": "because", "name": None}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
]
TEMPLATES = [
    None,
    "{%- for m in messages %}\n  {{- '<|' + m.role + '|>' }}{{ m.content }}{{ eos_token }}\n{%- endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}"
    "{{ m.tool_calls | tojson }}{% endfor %}",
    "{% for t in tools or [] %}{{ t | tojson(indent=2) }}{% endfor %}"
    "{{ messages | tojson }}{{ add_generation_prompt }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ m.reasoning_content or m.thinking or '' }}{{ m.content }}{% endfor %}{{ ns.n }}",
    "{{ dict(a=1).items() | list }}{{ strftime_now('%Y') }}{{ flavour | default('none') }}{{ messages[-1].content }}",
    "{{ raise_exception('no ' + messages[0].role) }}",
    "{{ messages[0].__class__ }}",
    "{% if %}",
]


@pytest.fixture(scope="module")
def both() -> tuple[Tokenizer, Tokenizer]:
    """Transformers' own, and the one that was sent."""
    own = load_tokenizer(str(DEMO_MODEL))
    data = pack(own)
    assert data is not None
    return own, unpack(msgspec.msgpack.decode(msgspec.msgpack.encode(data), type=TokenizerData))


@given(text=st.text() | st.sampled_from(["<|im_start|>user\n", " a  b", "\U0001f600", "def f():\n\treturn"]))
def test_texts(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    own, sent = both
    ids = own.encode(text)
    assert sent.encode(text) == ids
    assert sent.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False)
    assert sent.decode(ids) == own.decode(ids)
    assert [sent.token_text(i) for i in ids] == [own.token_text(i) for i in ids]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("options", [{}, {"continue_final_message": True}, {"tools": TOOLS, "flavour": "sweet"}])
def test_conversations(
    both: tuple[Tokenizer, Tokenizer], template: str | None, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    def render(tokenizer: Tokenizer) -> str | None:
        try:
            return tokenizer.render_chat(json.loads(json.dumps(messages)), chat_template=template, **options)
        except RequestError:
            return None

    own, sent = both
    want = render(own)
    # Transformers goes by the template's source whether a message can be continued, and errs on the safe side.
    assert render(sent) == want or (want is None and "continue_final_message" in options)


def test_templates_by_name(both: tuple[Tokenizer, Tokenizer]) -> None:
    data = pack(both[0])
    assert data is not None
    data.chat_template = {"default": "D", "tool_use": "T", "other": "O"}
    sent = unpack(data)
    messages = CONVERSATIONS[0]
    assert sent.render_chat(messages) == "D"
    assert sent.render_chat(messages, TOOLS) == "T"
    assert sent.render_chat(messages, chat_template="other") == "O"
