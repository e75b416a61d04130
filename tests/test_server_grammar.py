"""Structured output as clients ask for it: `engine serve` with the small model, and the `openai` package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel

QUESTION: Any = [{"role": "user", "content": "Describe a colour."}]
MODEL = "demo_model"


class Colour(BaseModel):
    """As a user would write it."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["red", "green", "blue"]
    parts: list[int] = Field(min_length=3, max_length=3)
    dark: bool


class Part(RootModel[int]):
    root: int = Field(ge=0, le=255)


SCHEMA: Any = Colour.model_json_schema()
for items in [SCHEMA["properties"]["parts"]["items"]]:
    items.update(Part.model_json_schema())
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA, "strict": True}}


class Server:
    """A process that serves."""

    def __init__(self, *flags: str) -> None:
        code = "import sys; from engine.extensions.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "serve", "--port", "0", "--platform", "cpu", "--max-model-len", "512"]
        self.process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
        self.url = ""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        end = time.monotonic() + 120
        while not (self.url and httpx.get(self.url + "/health").status_code == 200):
            assert time.monotonic() < end, "it does not start"
            time.sleep(0.05)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"listening on (\S+)", line):
                self.url = found[1]

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self.thread.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose template knows tools."""
    path = tmp_path_factory.mktemp("template") / "template.jinja"
    path.write_text(
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        "{# <tool_call> #}"
    )
    server = Server("--chat-template", str(path), "--reasoning-parser", "think")
    yield server
    server.close()


def chat(server: Server, **options: Any) -> Any:
    fields: Any = {"model": MODEL, "messages": QUESTION, "temperature": 1, "seed": 1, "max_completion_tokens": 120}
    return server.client.chat.completions.create(**(fields | options))


def test_response_format(server: Server) -> None:
    for seed in range(4):
        (choice,) = chat(server, response_format=FORMAT, seed=seed).choices
        assert choice.finish_reason == "stop"
        assert all(0 <= p <= 255 for p in Colour.model_validate_json(choice.message.content).parts)
    (choice,) = chat(server, response_format={"type": "json_object"}, temperature=0).choices
    assert choice.message.content.startswith("{")
    (choice,) = chat(server, response_format={"type": "text"}, max_completion_tokens=5).choices
    assert choice.message.content


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    whole = chat(server, response_format=FORMAT, n=2).choices
    texts = ["", ""]
    for chunk in chat(server, response_format=FORMAT, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in whole]
    assert all(Colour.model_validate_json(text) for text in texts)


def test_parse_gives_pydantic_models(server: Server) -> None:
    done = server.client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Colour, seed=2, max_completion_tokens=200, temperature=0
    )
    assert isinstance(done.choices[0].message.parsed, Colour)
    response = server.client.responses.parse(
        model=MODEL, input="Describe a colour.", text_format=Colour, max_output_tokens=200, temperature=0
    )
    assert isinstance(response.output_parsed, Colour)
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{5}"}}, "[a-c]{5}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]{3}'}}, r"x\d{3}"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
        ({"structured_outputs": {"json": '{"enum": [1, 2]}', "disable_any_whitespace": True}}, "1|2"),
        ({"guided_json": {"type": "integer", "minimum": 3, "maximum": 5}}, "[345]"),
        ({"guided_regex": "[a-c]{5}"}, "[a-c]{5}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "x" /[0-9]{3}/'}, r"x\d{3}"),
        ({"structured_outputs": {"json": {"enum": [1, 2], "default": 10**30}}}, "1|2"),
        ({"structured_outputs": {"structural_tag": {"format": {"type": "const_string", "value": "ab"}}}}, "ab"),
    ],
)
def test_vllms_names(server: Server, fields: dict[str, Any], pattern: str) -> None:
    common: dict[str, Any] = {"temperature": 1, "seed": 1, **fields}
    done = server.post("/v1/completions", prompt=["def f(", "x = "], max_tokens=60, **common).json()
    assert all(re.fullmatch(pattern, c["text"]) for c in done["choices"]), done
    done = server.post("/v1/chat/completions", messages=QUESTION, **common).json()
    assert re.fullmatch(pattern, done["choices"][0]["message"]["content"]), done
    done = server.post("/v1/responses", input="hi", **common).json()
    assert re.fullmatch(pattern, done["output"][0]["content"][0]["text"]), done


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}}},
            "response_format",
            "Invalid type",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "stream": True},
            "response_format",
            "Unimplemented keys",
        ),
        ({"guided_regex": "(["}, "guided_regex", "unclosed"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_choice": [1]}, "guided_choice.0", "string"),
        ({"guided_choice": []}, "guided_choice", "list of texts"),
        ({"structured_outputs": {}}, "structured_outputs", "names no form"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs", "does not exist"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex", "is a str"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs", "a JSON schema is an object"),
        ({"structured_outputs": {"structural_tag": {"format": 3}}}, "structured_outputs", "cannot be read"),
        ({"structured_outputs": {"json": {}, "regex": "x"}}, "structured_outputs", "json and regex"),
        ({"guided_regex": "x", "response_format": {"type": "json_object"}}, "guided_regex", "one of them"),
    ],
)
def test_errors_name_the_field(server: Server, change: dict[str, Any], param: str, message: str) -> None:
    for path, fields in (
        ("/v1/chat/completions", {"messages": QUESTION}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        found = server.post(path, **fields, **change)
        assert found.status_code == 400, found.text
        assert found.json()["error"]["param"] == param, found.text
        assert message in found.json()["error"]["message"]


def test_errors_of_responses_name_the_field(server: Server) -> None:
    text = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "objct"}}}
    found = server.post("/v1/responses", input="x", text=text)
    assert (found.status_code, found.json()["error"]["param"]) == (400, "text.format"), found.text


def called(choice: Any) -> list[tuple[str, Any]]:
    calls = choice.message.tool_calls or []
    if choice.finish_reason == "length":
        calls = calls[:-1]  # which may be cut
    return [(c.function.name, json.loads(c.function.arguments)) for c in calls]


def test_forced_calls_keep_the_tools_schemas(calling: Server) -> None:
    names = set()
    for seed in range(6):
        options: dict[str, Any] = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "seed": seed}
        (choice,) = chat(calling, **options, max_completion_tokens=300).choices
        assert choice.finish_reason == "length" or choice.message.content is None, choice
        calls = called(choice)
        assert calls or choice.finish_reason == "length"
        (one,) = chat(calling, **options, parallel_tool_calls=False).choices
        assert one.finish_reason == "tool_calls"
        for name, arguments in calls + called(one):
            names.add(name)
            if name == "clock":
                assert arguments == {}
            else:
                assert arguments["city"] in ("Paris", "Oslo")
                assert 1 <= arguments["days"] <= 9
    assert names == {"weather", "clock"}


def test_a_named_call_keeps_its_schema(calling: Server) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    options: dict[str, Any] = {"tools": [WEATHER, CLOCK], "tool_choice": named}
    for seed in range(3):
        (choice,) = chat(calling, **options, seed=seed).choices
        ((name, arguments),) = called(choice)
        assert (name, set(arguments), choice.finish_reason) == ("weather", {"city", "days"}, "stop")
    pieces = [c.choices[0].delta for c in chat(calling, **options, seed=2, stream=True)]
    assert json.loads("".join(c.function.arguments for p in pieces for c in p.tool_calls or ())) == arguments
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    response = calling.client.responses.create(
        model=MODEL,
        input="hi",
        tools=[tool],
        tool_choice={"type": "function", "name": "weather"},
        temperature=1,
    )
    (call,) = response.output
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"city", "days"}


def test_reasoning_and_calls_beside_a_form(calling: Server) -> None:
    """The answer has the form, behind reasoning of none; calls that are free may stand in its place."""
    for seed in range(4):
        (choice,) = chat(calling, response_format=FORMAT, seed=seed, max_completion_tokens=300).choices
        if choice.finish_reason == "stop":
            Colour.model_validate_json(choice.message.content)
        opened = [*QUESTION, {"role": "assistant", "content": "<think>"}]
        extra = {"continue_final_message": True, "add_generation_prompt": False}
        (choice,) = chat(
            calling, messages=opened, response_format=FORMAT, extra_body=extra, seed=seed, stop="</think>"
        ).choices
        assert choice.message.content == "", "what the prompt has begun is reasoning, and free"
        (choice,) = chat(calling, response_format=FORMAT, tools=[WEATHER], seed=seed, max_completion_tokens=300).choices
        if choice.finish_reason == "tool_calls":
            assert called(choice)
        elif choice.finish_reason == "stop":
            Colour.model_validate_json(choice.message.content)


def test_examples_of_the_documentation_run(server: Server) -> None:
    page = (Path(__file__).parents[1] / "docs/structured_output.md").read_text()
    code = "".join(re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    code = code.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("name=") == 2, done.stdout


def test_errors_of_tools_name_them(calling: Server) -> None:
    wrong: Any = {"type": "function", "function": {"name": "x", "parameters": {"type": "objct"}}}
    found = calling.post("/v1/chat/completions", messages=QUESTION, tools=[wrong], tool_choice="required")
    assert (found.status_code, found.json()["error"]["param"]) == (400, "tools"), found.text
    found = calling.post(
        "/v1/chat/completions", messages=QUESTION, tools=[CLOCK], tool_choice="required", guided_regex="x"
    )
    assert (found.status_code, found.json()["error"]["param"]) == (400, "guided_regex"), found.text
