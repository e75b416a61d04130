"""Structured output: whatever the model, what comes out has the form that was asked for, and nothing else changes."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import LLM, RequestOutput, SamplingParams
from engine.config import DEMO_MODEL, EngineArgs
from engine.errors import RequestError
from engine.extensions.grammar import StructuredOutputsParams, masks
from engine.extensions.grammar.masks import Grammars, State, forbid
from engine.extensions.serving import core_process as wire
from engine.plugins import load_platform
from engine.request import CoreRequest
from engine.staging import Staging
from engine.text import load_tokenizer

Schema = dict[str, Any]
PROMPT = "def fibonacci(n):"
PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Schema] = {
    "person": PERSON,
    "nested": {
        "type": "object",
        "properties": {"person": PERSON, "more": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2}},
        "required": ["person", "more"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["a", 1, None, "ü", {"x": [1]}]},
    "number": {"type": "number", "minimum": -1.5, "maximum": 2.25, "multipleOf": 0.25},
    "any of": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}, {"type": "null"}]},
    "a tree": {
        "$defs": {
            "leaf": {"type": "integer", "minimum": 1, "maximum": 9},
            "node": {
                "type": "object",
                "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
                "required": ["left", "right"],
                "additionalProperties": False,
            },
        },
        "$ref": "#/$defs/node",
    },
    "unicode": {
        "type": "object",
        "properties": {"größe": {"enum": ["klein", "groß", "巨大", "😀"]}},
        "required": ["größe"],
        "additionalProperties": False,
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
}


KINDS: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def mistakes(value: Any, schema: Schema, root: Schema | None = None, path: str = "$") -> list[str]:
    """What is wrong with `value`; of each keyword that this file's schemas have."""
    root = schema if root is None else root
    if "$ref" in schema:
        target: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return mistakes(value, target, root, path)
    found: list[str] = []

    def need(ok: bool, what: str) -> None:
        if not ok:
            found.append(f"{path}: {what}, got {value!r}")

    if "anyOf" in schema:
        need(any(not mistakes(value, s, root) for s in schema["anyOf"]), "one of anyOf")
    if "enum" in schema:
        need(any(value == e and type(value) is type(e) for e in schema["enum"]), f"one of {schema['enum']}")
    if "const" in schema:
        need(value == schema["const"], f"{schema['const']!r}")
    if (kind := schema.get("type")) is not None:
        kinds = kind if isinstance(kind, list) else [kind]
        fits = any(isinstance(value, KINDS[k]) and (isinstance(value, bool) == (k == "boolean")) for k in kinds)
        need(fits, f"of type {kind}")
        if not fits:
            return found
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        need(set(schema.get("required", ())) <= set(value), f"with {schema.get('required')}")
        need(schema.get("additionalProperties", True) is not False or set(value) <= set(properties), "nothing more")
        for name, part in properties.items():
            if name in value:
                found += mistakes(value[name], part, root, f"{path}.{name}")
    elif isinstance(value, list):
        need(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1 << 30), "as many items")
        for i, item in enumerate(value):
            found += mistakes(item, schema.get("items", {}), root, f"{path}[{i}]")
    elif isinstance(value, str):
        need(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1 << 30), "as long")
        need(re.search(schema.get("pattern", ""), value) is not None, "matching")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        need(schema.get("minimum", value) <= value <= schema.get("maximum", value), "within the limits")
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "overlapped"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM(platform="cpu", max_model_len=512, async_scheduling=request.param)


def ask(llm: LLM, form: StructuredOutputsParams | None, prompt: str = PROMPT, **options: Any) -> RequestOutput:
    (output,) = llm.generate(prompt, params(form, **options))
    return output


def params(form: StructuredOutputsParams | None, **options: Any) -> SamplingParams:
    asked = None if form is None else dict(form)
    return SamplingParams(**{"temperature": 0, "max_tokens": 300, "structured_outputs": asked, **options})


def has_json(schema: Schema) -> Callable[[str], bool]:
    return lambda text: not mistakes(json.loads(text), schema)


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text, re.DOTALL) is not None


TAG: Schema = {
    "format": {
        "type": "tag",
        "begin": "<think>",
        "content": {"type": "regex", "pattern": "[a-z ]{0,9}"},
        "end": "</think>",
    }
}
LINES: Schema = {
    "format": {
        "type": "sequence",
        "elements": [
            {"type": "tag", "begin": "# ", "content": {"type": "any_text"}, "end": "\n"},
            {"type": "regex", "pattern": "a/b\n<\\/x>"},
        ],
    }
}
FORMS: list[tuple[StructuredOutputsParams, Callable[[str], bool]]] = [
    *((StructuredOutputsParams(json=schema), has_json(schema)) for schema in SCHEMAS.values()),
    (StructuredOutputsParams(json=json.dumps(PERSON), disable_any_whitespace=True), matches(r'\{"name":".*",".*\]\}')),
    (StructuredOutputsParams(json=SCHEMAS["a tree"], whitespace_pattern="\t"), matches(r"[^ ]*")),
    (StructuredOutputsParams(regex=r"\d{3}-[a-z]{2,5}"), matches(r"\d{3}-[a-z]{2,5}")),
    (StructuredOutputsParams(choice=["yes", "no", "näh 😀", 'q"\n']), ["yes", "no", "näh 😀", 'q"\n'].__contains__),
    (StructuredOutputsParams(grammar='start: "x" pair{2}\npair: "(" /[0-9]{1,3}/ ")"'), matches(r"x(\(\d{1,3}\)){2}")),
    (StructuredOutputsParams(grammar='root ::= "a" [0-9]{2} | "b"'), matches(r"a\d\d|b")),
    (StructuredOutputsParams(structural_tag=TAG), matches("<think>[a-z ]{0,9}</think>")),
    (StructuredOutputsParams(structural_tag=LINES), matches(r"# [^\n]*\na/b\n</x>")),
]


@pytest.mark.parametrize("temperature", [0, 1])
def test_every_form_holds(llm: LLM, temperature: float) -> None:
    """All at once, with one between them that has no form."""
    asked = [params(form, temperature=temperature, seed=i) for i, (form, _) in enumerate(FORMS)]
    *outputs, free = llm.generate([PROMPT] * (len(FORMS) + 1), [*asked, params(None, max_tokens=20)])
    for (form, holds), output in zip(FORMS, outputs, strict=True):
        (completion,) = output.outputs
        assert completion.finish_reason == "stop", (form, completion)
        assert holds(completion.text), (form, completion.text)
    assert free.outputs[0].token_ids == ask(llm, None, max_tokens=20).outputs[0].token_ids


def test_any_object(llm: LLM) -> None:
    output = ask(llm, StructuredOutputsParams(json_object=True), max_tokens=60, temperature=1, seed=3)
    assert output.outputs[0].text.startswith("{")
    if output.outputs[0].finish_reason == "stop":
        assert isinstance(json.loads(output.outputs[0].text), dict)


def test_neighbours_are_not_changed(llm: LLM) -> None:
    """Neither those without a form, nor those with one; samples included."""
    mixed = [
        params(form, temperature=t, seed=i, max_tokens=40)
        for i, (form, t) in enumerate([(None, 0), (FORMS[0][0], 1), (None, 1), (FORMS[1][0], 0), (None, 0.5)])
    ]
    together = llm.generate([PROMPT, "class A:", "import ", "x = ", "if "], mixed)
    for prompt, asked, output in zip([PROMPT, "class A:", "import ", "x = ", "if "], mixed, together, strict=True):
        (alone,) = llm.generate(prompt, asked)
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids


def test_preempted_sequences_go_on_where_they_were(caplog: pytest.LogCaptureFixture) -> None:
    asked = [params(FORMS[1][0], temperature=1, seed=i, max_tokens=120) for i in range(6)]
    roomy = LLM(platform="cpu", max_model_len=256, block_size=16)
    tight = LLM(platform="cpu", max_model_len=256, num_blocks=24, block_size=16, async_scheduling=True)
    expected = [o.outputs[0].token_ids for o in roomy.generate([PROMPT] * 6, asked)]
    outputs = tight.generate([PROMPT] * 6, asked)
    assert [o.outputs[0].token_ids for o in outputs] == expected
    assert sum(o.metrics.num_preemptions for o in outputs if o.metrics) > 0
    assert "cannot go on" not in caplog.text, "a token after the end is no mistake"


def test_long_prompts_in_chunks() -> None:
    small = LLM(platform="cpu", max_model_len=512, max_num_batched_tokens=16, async_scheduling=True)
    asked = params(FORMS[0][0], temperature=1, seed=4)
    prompts = ["x = 1\n" * 30, PROMPT, "y = 2\n" * 20]
    expected = [o.outputs[0].token_ids for o in LLM(platform="cpu", max_model_len=512).generate(prompts, asked)]
    assert [o.outputs[0].token_ids for o in small.generate(prompts, asked)] == expected


def test_several_completions(llm: LLM) -> None:
    output = ask(llm, StructuredOutputsParams(regex="[a-z]{4}"), n=5, temperature=1, seed=1, top_k=0)
    assert len({c.text for c in output.outputs}) > 1
    assert all(re.fullmatch("[a-z]{4}", c.text) for c in output.outputs)


def test_the_end_comes_only_where_the_form_is_whole(llm: LLM) -> None:
    end = llm.info.eos_token_ids[0]
    three = StructuredOutputsParams(regex="[0-9]{3}")
    assert len(ask(llm, three, logit_bias={end: 100}).outputs[0].text) == 3
    many = StructuredOutputsParams(regex="[0-9]+")
    (eager,) = ask(llm, many, logit_bias={end: 100}).outputs
    assert (len(eager.text) >= 1, eager.finish_reason, eager.token_ids[1:]) == (True, "stop", [end])
    (long,) = ask(llm, many, logit_bias={end: 100}, min_tokens=5).outputs
    assert (len(long.token_ids), long.finish_reason, long.text.isdigit()) == (6, "stop", True)
    (short,) = ask(llm, three, min_tokens=50).outputs  # nothing may follow, so nothing does
    assert (len(short.text), short.finish_reason) == (3, "stop")
    (cut,) = ask(llm, many, logit_bias={end: -100}, max_tokens=7).outputs
    assert (len(cut.token_ids), cut.finish_reason, cut.text.isdigit()) == (7, "length", True)
    (beyond,) = ask(llm, three, ignore_eos=True, max_tokens=9).outputs
    assert (beyond.text[:3].isdigit(), len(beyond.text), beyond.finish_reason) == (True, 3, "length")


def test_stop_tokens_end_a_form_that_is_whole(llm: LLM) -> None:
    (stop,) = llm.get_tokenizer().encode("\n", add_special_tokens=False)
    form = StructuredOutputsParams(regex="[0-9]{2,}")
    (output,) = ask(llm, form, stop_token_ids=[stop], logit_bias={stop: 100}).outputs
    assert (output.text.isdigit(), output.stop_reason, len(output.text) >= 2) == (True, stop, True)


def test_stop_strings_and_logprobs(llm: LLM) -> None:
    output = ask(llm, StructuredOutputsParams(regex="[a-z]{3}:[a-z]{90}"), stop=":", logprobs=3).outputs[0]
    assert (len(output.text), output.stop_reason) == (3, ":")
    free = ask(llm, None, logprobs=3, max_tokens=1).outputs[0]
    assert output.logprobs is not None
    assert free.logprobs is not None
    # they are the model's own: the same likeliest tokens, whatever was allowed
    assert list(free.logprobs[0])[:1][0] in output.logprobs[0]
    assert len(output.logprobs) == len(output.token_ids)


def test_a_form_that_nothing_allowed_can_keep_ends_the_request(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """Rather than give what does not have the form."""
    letter = llm.get_tokenizer().encode("x", add_special_tokens=False)
    outputs = llm.generate(
        [PROMPT, PROMPT],
        [params(StructuredOutputsParams(regex="[0-9]+"), allowed_token_ids=letter), params(None, max_tokens=20)],
    )
    assert outputs[0].outputs[0].finish_reason == "abort"
    assert "cannot go on" in caplog.text
    assert outputs[1].outputs[0].token_ids == ask(llm, None, max_tokens=20).outputs[0].token_ids


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": {"type": "objct"}}, "Invalid type"),
        ({"json": "{"}, "json is not JSON"),
        ({"json": [1]}, "a JSON schema is an object"),
        ({"json": {"type": "object", "not": {}}}, "Unimplemented keys"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "Unsatisfiable"),
        ({"json": {"$ref": "#/$defs/x"}}, "does not exist"),
        ({"json": {"$ref": "#"}}, "no text has this form"),
        ({"json": PERSON, "whitespace_pattern": 3}, "whitespace_pattern is"),
        ({"regex": "(["}, "unclosed character class"),
        ({"regex": 3}, "regex is a text"),
        ({"choice": []}, "a list of texts"),
        ({"choice": "yes"}, "a list of texts"),
        ({"grammar": "start: other"}, "unknown name"),
        ({"grammar": "what"}, "no GBNF"),
        ({"structural_tag": {}}, "needs 'format'"),
        ({"structural_tag": {"format": {"type": "tagg"}}}, "there is no type 'tagg'"),
        ({"structural_tag": {"format": {"type": "tag", "begin": ""}}}, "'content' is missing"),
        ({"structural_tag": {"format": {"type": "or", "elements": []}}}, "elements is a list"),
        ({"jsn": {}}, "did you mean 'json'"),
        ({"json": {}, "regex": "x"}, "has json and regex"),
        ({"disable_any_whitespace": True}, "has none"),
    ],
)
def test_what_is_wrong_is_told(llm: LLM, form: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate(PROMPT, SamplingParams(structured_outputs=form))
    assert str(caught.value).startswith("structured_outputs: ")
    assert ask(llm, None, max_tokens=2).outputs[0].text


@pytest.mark.parametrize("form", [{}, [], "json"])
def test_forms_are_dictionaries(form: Any) -> None:
    with pytest.raises(RequestError, match="structured_outputs must be"):
        SamplingParams(structured_outputs=form)


def test_a_tokenizer_is_needed() -> None:
    llm = LLM(platform="cpu", max_model_len=64, skip_tokenizer_init=True)
    with pytest.raises(RequestError, match="there is no tokenizer"):
        llm.generate([[1, 2]], params({"regex": "x"}))


def test_a_constrained_sequence_takes_part_in_every_step() -> None:
    """Where steps overlap, it does not wait for every other one."""
    llm = LLM(platform="cpu", max_model_len=512, async_scheduling=True)
    step, steps = llm._core.step, 0

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return step()

    llm._core.step = counted  # type: ignore[method-assign]
    forms = [StructuredOutputsParams(regex="([0-9] ){40}"), None]
    outputs = llm.generate([PROMPT, PROMPT], [params(f, max_tokens=40, ignore_eos=True) for f in forms])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [40, 40]
    assert steps <= 45


# -- without a model: any token that is allowed, at random


_texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
_names = st.sampled_from(["a", "b", "name", "größe", "日本", 'q"uote', "with space", "x\\y"])


def _object(parts: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def build(properties: dict[str, Schema], optional: set[str]) -> Schema:
        required = [name for name in properties if name not in optional]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(build, st.dictionaries(_names, parts, max_size=3), st.sets(_names, max_size=2))


def _array(parts: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def build(items: Schema, low: int, more: int) -> Schema:
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + more}

    return st.builds(build, parts, st.integers(0, 2), st.integers(0, 2))


def _whole(low: int, more: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": low + more}


_leaves: st.SearchStrategy[Schema] = st.one_of(
    st.builds(_whole, st.integers(-1200, 1200), st.integers(0, 500)),
    st.builds(lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n}, *[st.integers(0, 3)] * 2),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(_texts, st.integers(), st.none()), min_size=1)),
    st.builds(
        lambda value: {"const": value}, st.one_of(_texts, st.booleans(), st.lists(st.integers(0, 9), max_size=2))
    ),
    st.sampled_from([{"type": "string", "pattern": p} for p in ("^[a-f]{2,4}$", r"^\d{3}-\d{2}$", "^(é|ü){1,2}$")]),
)

schemas: st.SearchStrategy[Schema] = st.recursive(
    _leaves,
    lambda parts: st.one_of(
        _object(parts), _array(parts), st.builds(lambda of: {"anyOf": of}, st.lists(parts, min_size=1, max_size=3))
    ),
    max_leaves=6,
)
"""Schemas whose values are finite, so that any walk through them comes to an end."""


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(asdict(EngineArgs()), 4096)


@pytest.fixture(scope="module")
def decode() -> Callable[[list[int]], str]:
    tokenizer = load_tokenizer(str(DEMO_MODEL))
    return lambda ids: tokenizer.decode(ids)


def request(form: Any, request_id: str = "r", **options: Any) -> CoreRequest:
    return CoreRequest(request_id, [5], SamplingParams(structured_outputs=form, **options), eos_token_ids=(0, 2))


def begin(grammars: Grammars, form: Any) -> State:
    asked = request(form)
    if (coming := grammars.prepare(asked)) is not None:
        coming.result(30)
    return grammars.start(asked, [])


def allowed(grammars: Grammars, *states: State) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """As `plan` puts it on the device."""
    staging = Staging(load_platform("cpu").device())
    staging.begin(len(states) * 1024)
    apply = grammars.plan({2 * i: state for i, state in enumerate(states)}, staging)
    staging.upload()
    logits = torch.zeros(2 * len(states), 4096)
    apply(logits)
    assert (logits[1::2] == 0).all(), "other rows are left alone"
    return torch.isfinite(logits[::2]).numpy()


@settings(max_examples=80, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_any_walk_through_a_schema_keeps_it(
    grammars: Grammars, decode: Callable[[list[int]], str], schema: Schema, seed: int
) -> None:
    state, ids, draw = begin(grammars, {"json": schema, "disable_any_whitespace": True}), [], random.Random(seed)
    while True:
        (row,) = allowed(grammars, state)
        token = int(draw.choice(np.flatnonzero(row).tolist()))
        assert state.accept(token)
        if token in (0, 2):
            break
        ids.append(token)
        assert len(ids) < 2000
    assert mistakes(json.loads(decode(ids)), schema) == []


def test_states_are_their_own(grammars: Grammars) -> None:
    first, second = (begin(grammars, {"choice": ["ab", "cd"]}) for _ in range(2))
    a, c = (load_tokenizer(str(DEMO_MODEL)).encode(x)[0] for x in "ac")
    assert first.accept(a)
    assert not first.accept(c)
    assert second.accept(c)
    again = grammars.start(request({"choice": ["ab", "cd"]}), [c])
    assert (allowed(grammars, second) == allowed(grammars, again)).all()


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 4000])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [0, 2]])
def test_bits_become_bans(vocab_size: int, rows: list[int]) -> None:
    draw = torch.Generator().manual_seed(vocab_size)
    size = len(rows), -(-vocab_size // 32)
    words = torch.randint(-(1 << 31), 1 << 31, size, dtype=torch.int32, generator=draw)
    logits = torch.randn(3, vocab_size, generator=draw)
    expected = logits.clone()
    for row, bits in zip(rows, words.tolist(), strict=True):
        for token in range(vocab_size):
            if not (bits[token // 32] >> (token % 32)) & 1:
                expected[row, token] = -torch.inf
    forbid(logits, torch.tensor(rows), words)
    assert torch.equal(logits, expected)


# -- compiling


def test_equal_forms_are_compiled_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    real = masks._compile

    def slowly(*args: Any) -> Any:
        compiled.append(args)
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(masks, "_compile", slowly)
    form = {"regex": "only here"}
    coming = [grammars.prepare(request(form, str(i))) for i in range(3)]
    assert coming[0] is not None
    assert coming == [coming[0]] * 3
    coming[0].result(30)
    assert grammars.prepare(request(form)) is None
    assert len(compiled) == 1


def test_compiled_forms_are_dropped_in_order(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "KEPT", 2)
    for text in ("first", "second", "third"):
        begin(grammars, {"choice": [text]})
    assert grammars.prepare(request({"choice": ["third"]})) is None
    assert grammars.prepare(request({"choice": ["first"]})) is not None
    assert grammars.start(request({"choice": ["second"]}), []), "one that was dropped is compiled again"


def test_what_takes_too_long_is_refused(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """And there for a later request, when it is done."""
    go, real = threading.Event(), masks._compile
    monkeypatch.setattr(masks, "COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(masks, "_compile", lambda *args: (go.wait(30), real(*args))[1])
    coming = grammars.prepare(request({"regex": "slow"}))
    assert coming is not None
    with pytest.raises(RequestError, match="to compile; make it simpler"):
        coming.result(30)
    go.set()
    end = time.monotonic() + 30
    while grammars.prepare(request({"regex": "slow"})) is not None:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_core_goes_on_while_a_form_is_compiled() -> None:
    """Requests wait at the entrance; those that are given up meanwhile never come in."""
    ours, theirs = socket.socketpair()
    futures: dict[str, Future[None]] = {name: Future() for name in ("good", "bad", "gone")}
    added: list[str] = []

    def prepare(request: CoreRequest) -> Future[None] | None:
        future = futures.get(request.request_id)
        return None if future is None or future.done() else future

    core: Any = SimpleNamespace(
        prepare=prepare, add=lambda request: added.append(request.request_id), abort=lambda ids: None
    )
    inbox: Any = SimpleNamespace()
    with ours, theirs:
        entrance = wire._Entrance(core, inbox, theirs)
        inbox.put = entrance.prepared
        for name in ("good", "plain", "bad", "gone"):
            entrance.admit(request({"regex": "x"}, name))
        assert added == ["plain"]
        entrance.abort(["gone"])
        futures["gone"].set_result(None)
        futures["good"].set_result(None)
        futures["bad"].set_exception(RequestError("structured_outputs: no"))
        assert added == ["plain", "good"]
        (size,) = wire.LENGTH.unpack(ours.recv(4))
        refused = msgspec.msgpack.decode(ours.recv(size), type=wire.FromCore)
        assert refused == wire.Refused("bad", "structured_outputs: no")
