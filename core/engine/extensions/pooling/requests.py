"""From texts to requests for pooling, and from outputs to scores: what `LLM` and the server share. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from engine.errors import RequestError
from engine.extensions.pooling.outputs import Numbers
from engine.extensions.pooling.params import PoolingParams, Task
from engine.frontend import Prompt
from engine.info import EngineInfo
from engine.request import SamplingParams
from engine.text import Tokenizer

Request = tuple[Prompt, SamplingParams]
"""What `LLM.generate` and its kin take."""

_SERVES: dict[str, str] = {
    "embed": "an embedding model",
    "token_embed": "an embedding model",
    "classify": "a model for sequence classification",
    "token_classify": "a model for token classification, or a reward model",
    "score": "an embedding model, a cross-encoder, or a reranker",
}


class Requests:
    """Makes requests for one model.

    Args:
        info: of the engine that runs it.
        tokenizer: of the model; None where prompts are token ids.
    """

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None) -> None:
        self._info, self._tokenizer = info, tokenizer

    @property
    def model(self) -> dict[str, Any]:
        """What the model serves; raises `RequestError` for one that generates."""
        if not self._info.pooling:
            raise RequestError(
                "the model generates; to embed or score with it, load it with runner='pooling' (--runner pooling)"
            )
        return self._info.pooling

    @property
    def scores_pairs(self) -> bool:
        """Whether the model reads both texts of a pair together; if not, embeddings are compared."""
        return "score" in self.model["tasks"]

    def task(self, wanted: Task | None) -> Task:
        """The task, or the model's first; raises `RequestError` for one that the model does not serve."""
        tasks: list[Task] = self.model["tasks"]
        if wanted is not None and wanted not in tasks:
            raise RequestError(f"the model serves {', '.join(tasks)}, not {wanted}, which takes {_SERVES[wanted]}")
        return wanted or tasks[0]

    def single(self, prompt: Prompt, params: PoolingParams, prompt_name: str | None = None) -> Request:
        """A request of one text.

        Args:
            prompt: text, token ids, or a dictionary with one of them.
            params: what is made of it.
            prompt_name: which of the checkpoint's named prompts comes before a text; None takes its default.

        Raises:
            RequestError: the model, or its limits, do not allow it.
        """
        task, model = self.task(params.task), self.model
        asked = self._asked(task, params)
        given = dict(prompt) if isinstance(prompt, Mapping) else {}
        text = prompt if isinstance(prompt, str) else given.get("prompt")
        ids: Sequence[int] | None = given.get("prompt_token_ids", None if isinstance(prompt, str | Mapping) else prompt)
        name = model["default_prompt"] if prompt_name is None else prompt_name
        if name is not None and name not in model["prompts"]:
            there = ", ".join(sorted(model["prompts"])) or "none"
            raise RequestError(f"prompt_name {name!r} is none of the model's prompts; there are: {there}")
        if ids is None and isinstance(text, str):
            before = model["prompts"][name] if name is not None else ""
            if before and not model["include_prompt"]:
                asked["skip"] = self._length_before(before)
            ids, _ = self._encode(before + text, None, params)
        elif prompt_name is not None:
            raise RequestError("prompt_name goes before a text, and the prompt is token ids; leave it out")
        else:
            limit = self._limit(params)
            ids = ids if limit is None or ids is None else list(ids)[:limit]
        return self._request(given | {"prompt_token_ids": ids}, text, asked, task)

    def pair(
        self,
        first: str,
        second: str,
        params: PoolingParams,
        instruction: str | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """A request of a query and a document for a model that `scores_pairs`; raises as `single` does."""
        self.task("score")
        asked, template = self._asked("score", params), self.model["template"]
        given: dict[str, Any] = {} if cache_salt is None else {"cache_salt": cache_salt}
        if template is None:
            self.no_instruction(instruction)
            ids, start = self._encode(first, second, params)
            if self.model["token_types"]:
                asked["second"] = start
            return self._request(given | {"prompt_token_ids": ids}, None, asked, "score")
        parts = {"instruction": self.model["instruction"] if instruction is None else instruction, "query": first}
        ids = self._render(template, parts, second, self._limit(params))
        return self._request(given | {"prompt_token_ids": ids}, None, asked, "score")

    def no_instruction(self, given: str | None) -> None:
        """Raise `RequestError` for an instruction where there is no template that takes it."""
        if given is not None and self.model["template"] is None:
            raise RequestError("instruction belongs into a score_template, and the model has none; leave it out")

    def cut(self, text: str, most: int) -> str:
        """The beginning of a text, of at most so many tokens."""
        offsets = self._backend().encode(text, add_special_tokens=False).offsets
        return text if len(offsets) <= most else text[: offsets[most - 1][1]]

    def similarity(self, first: Numbers, second: Numbers) -> float:
        """Of two embeddings, as the checkpoint measures it."""
        match self.model["similarity"]:
            case "dot":
                return float(first @ second)
            case "euclidean":
                return -float(np.linalg.norm(first - second))
            case "manhattan":
                return -float(np.abs(first - second).sum())
        return float(first @ second / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-12))

    def _request(self, given: dict[str, Any], text: Any, asked: dict[str, Any], task: Task) -> Request:
        if text is not None:
            given["prompt"] = text
        whole = task.startswith("token_") or self.model["whole_states"]
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0 if whole else None)
        return given | {"pooling": asked}, params

    def _asked(self, task: Task, params: PoolingParams) -> dict[str, Any]:
        asked: dict[str, Any] = {"task": task}
        embeds = task in ("embed", "token_embed")
        if embeds:
            asked["normalize"] = params.use_activation if params.normalize is None else params.normalize
        elif params.normalize is not None:
            raise RequestError(f"normalize is for embeddings, and the task is {task}; use_activation is for these")
        else:
            asked["activation"] = params.use_activation
        if (wanted := params.dimensions) is not None:
            size, allowed = (self.model["dimensions"], self.model["matryoshka"]) if embeds else (0, False)
            if not allowed and wanted != size:
                raise RequestError(
                    "dimensions is for models that were trained to have their embeddings cut (Matryoshka); leave it "
                    "out, or load this one with hf_overrides={'is_matryoshka': True} if it was"
                )
            if wanted > size or (isinstance(allowed, list) and wanted not in (*allowed, size)):
                may = f"one of {allowed}" if isinstance(allowed, list) else f"at most {size}"
                raise RequestError(f"dimensions must be {may}, got {wanted}")
            asked["dimensions"] = wanted
        return asked

    def _limit(self, params: PoolingParams) -> int | None:
        most, wanted = self._info.max_model_len, params.truncate_prompt_tokens
        if wanted is not None and wanted > most:
            raise RequestError(f"truncate_prompt_tokens is {wanted} and max_model_len is {most}; lower it, or set -1")
        return most if wanted == -1 else wanted

    def _encode(self, text: str, pair: str | None, params: PoolingParams) -> tuple[list[int], int]:
        """Token ids of one text or two, cut to the limit, and where the second begins."""
        backend, limit = self._backend(), self._limit(params)
        both = [backend.encode(self._case(t), add_special_tokens=False) for t in (text, pair) if t is not None]
        if limit is not None:
            room = limit - backend.num_special_tokens_to_add(pair is not None)
            if room < len(both):
                raise RequestError(f"truncate_prompt_tokens {limit} leaves no room for the text; raise it")
            short, *rest = sorted(both, key=len)
            if len(short) + sum(map(len, rest)) > room:  # the longer one gives way, as in the tokenizers library
                sizes = [room]
                if rest:
                    sizes = [len(short), max(len(short), room - len(short))]
                    sizes = sizes if sum(sizes) <= room else [room // 2, room - room // 2]
                for part, size in zip((short, *rest), sizes, strict=True):
                    part.truncate(size)
        whole = backend.post_process(*both, add_special_tokens=True)
        start = next((i for i, kind in enumerate(whole.type_ids) if kind), len(whole.ids))
        return list(whole.ids), start

    def _render(self, template: str, parts: dict[str, str], document: str, limit: int | None) -> list[int]:
        """Token ids of a template; what is too long gives way at the end of the document."""
        backend = self._backend()

        def encode(document: str) -> list[int]:
            text = template
            for name, part in {**parts, "document": document}.items():
                # what users write must not be taken for another place of the template
                text = text.replace("{" + name + "}", part.replace("{", "{\0"))
            ids: list[int] = backend.encode(self._case(text.replace("{\0", "{")), add_special_tokens=False).ids
            return ids

        ids = encode(document)
        while limit is not None and len(ids) > limit:
            offsets = backend.encode(document, add_special_tokens=False).offsets
            keep = len(offsets) - (len(ids) - limit)
            if keep < 1:
                raise RequestError(f"truncate_prompt_tokens {limit} leaves no room for the document; raise it")
            document = document[: offsets[keep - 1][1]]
            ids = encode(document)
        return ids

    def _length_before(self, prompt: str) -> int:
        """Tokens of a text that are its named prompt's, those that come before all included."""
        ids, _ = self._encode(prompt, None, PoolingParams())
        behind = self._backend().post_process(self._backend().encode("", add_special_tokens=False))
        return len(ids) - (1 if len(behind.ids) and ids[-1:] == behind.ids[-1:] else 0)

    def _case(self, text: str) -> str:
        return text.lower() if self.model["lower_case"] else text

    def _backend(self) -> Any:
        if self._tokenizer is None:
            raise RequestError("there is no tokenizer (skip_tokenizer_init); give prompt_token_ids instead of text")
        if not self._tokenizer.hf.is_fast:
            raise RequestError("pooling texts needs a fast tokenizer (tokenizer.json); give prompt_token_ids instead")
        backend = self._tokenizer.hf.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return backend


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list of many; whole numbers are one prompt of token ids."""
    if isinstance(prompts, str | Mapping) or (prompts and all(isinstance(p, int) for p in prompts)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def pairs(first: str | Sequence[str], second: str | Sequence[str]) -> list[tuple[int, int]]:
    """Which of the texts of `first` and `second` meet: one with all, or each with its own."""
    num_first = 1 if isinstance(first, str) else len(first)
    num_second = 1 if isinstance(second, str) else len(second)
    if not (num_first and num_second):
        raise RequestError("give at least one text on either side")
    if num_first != 1 and num_first != num_second:
        raise RequestError(f"{num_first} and {num_second} texts do not pair; give one first text, or as many as second")
    return [(0 if num_first == 1 else i, i) for i in range(num_second)]
