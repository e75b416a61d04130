"""The offline API.

from engine import LLM, SamplingParams

llm = LLM("path/to/model")
for output in llm.generate(["def fibonacci(n):"], SamplingParams(temperature=0, max_tokens=64)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import partialmethod
from typing import Any, cast

from tqdm import tqdm

from engine.config import EngineArgs
from engine.discovery import RUNNERS, discover
from engine.engine import make_core
from engine.errors import EngineDeadError, RequestError
from engine.frontend import Frontend, Prompt
from engine.info import EngineInfo
from engine.request import RequestOutput, SamplingParams
from engine.text import Tokenizer, load_tokenizer

Message = dict[str, Any]
"""One message of a conversation: ``{"role": "user", "content": "..."}``."""


class LLM:
    """A model, ready to generate. The core runs in this process.

    Args:
        model: a folder with config.json and safetensors; None is the small model that ships with the engine.
        options: any option of `EngineArgs`, by name.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.args = EngineArgs.of(model=model, **options)
        self._progress = not self.args.disable_log_stats and sys.stderr.isatty()
        self._core = make_core(self.args, progress=self._progress)
        self.info: EngineInfo = self._core.info
        tokenizer, args = None, self.args
        if not args.skip_tokenizer_init:
            name, mode = args.tokenizer or self.info.model, args.tokenizer_mode
            tokenizer = load_tokenizer(name, mode, trust=args.trust_remote_code, vocab_size=self.info.vocab_size)
        self._frontend = Frontend(self.info, tokenizer, self.args.seed)
        self._ids = itertools.count()
        self._dead: Exception | None = None

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises `RequestError` with `skip_tokenizer_init`."""
        if self._frontend.tokenizer is None:
            raise RequestError("there is no tokenizer (skip_tokenizer_init)")
        return self._frontend.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return self._frontend.default_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; outputs come in the order of the prompts.

        Args:
            prompts: one or many; each is text, token ids, or a dictionary (see `Prompt`). A list of whole numbers is
                one prompt of token ids.
            sampling_params: one for all, or one each; None takes the model's defaults.
            use_tqdm: show a progress bar on a terminal.
            priority: one a prompt, lower first, under the priority policy.

        Raises:
            RequestError: a prompt or parameter is wrong; none of the prompts is run.
        """
        many = _as_list(prompts)
        params = self._params(sampling_params, len(many))
        if priority is not None and len(priority) != len(many):
            raise RequestError(f"{len(many)} prompts and {len(priority)} priorities; give one each")
        ids = self._admit(many, params, priority or [0] * len(many))
        finished: dict[str, RequestOutput] = {}
        tokens = 0
        with tqdm(total=len(ids), desc="prompts", unit="", disable=not (use_tqdm and self._progress)) as bar:
            for output in self._drain(only_finished=True):
                finished[output.request_id] = output
                tokens += sum(len(c.token_ids) for c in output.outputs)
                bar.update()
                if elapsed := bar.format_dict["elapsed"]:
                    bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s out")
        return [finished[i] for i in ids]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations with the model's chat template; arguments beyond it as in `generate`.

        Args:
            messages: one conversation, or many.
            sampling_params, use_tqdm: as in `generate`.
            chat_template: Jinja source that replaces the tokenizer's.
            add_generation_prompt: end with what opens the assistant's turn.
            continue_final_message: the last message is an answer to be continued.
            tools: descriptions of functions, for templates that take them.
            chat_template_kwargs: further variables of the template.
        """
        many = [messages] if messages and isinstance(messages[0], dict) else messages
        options = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        prompts = [self._render(cast("Sequence[Message]", conversation), **options) for conversation in many]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _pool(self, name: str, *args: Any, **options: Any) -> list[Any]:
        """A method that comes with the runner of models that do not generate: see `engine.extensions.pooling`."""
        (runner,) = (plugin.load() for plugin in discover(RUNNERS) if plugin.name == "pooling")
        return cast("list[Any]", getattr(runner, name)(self, *args, **options))

    embed, encode = partialmethod(_pool, "embed"), partialmethod(_pool, "encode")
    classify, reward = partialmethod(_pool, "classify"), partialmethod(_pool, "reward")
    score, rerank = partialmethod(_pool, "score"), partialmethod(_pool, "rerank")

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt and yield its output after each step; closing the iterator aborts the request."""
        self._admit([prompt], self._params(sampling_params, 1), [0])
        yield from self._drain(only_finished=False)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[RequestOutput]:
        """Answer one conversation as `stream` does; `options` are those of `chat` that shape the prompt."""
        return self.stream(self._render(messages, **options), sampling_params)

    def _render(self, messages: Sequence[Message], **options: Any) -> Prompt:
        """The prompt of a conversation; a template writes special tokens itself, so none are added."""
        tokenizer = self.get_tokenizer()
        text = tokenizer.render_chat(list(messages), **options)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def reset_prefix_cache(self) -> None:
        """Forget cached prompts, for measurements."""
        self._core.reset_prefix_cache()

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        given = self.get_default_sampling_params() if given is None else given
        params = [given] * count if isinstance(given, SamplingParams) else list(given)
        if len(params) != count:
            raise RequestError(f"{count} prompts and {len(params)} sampling_params; give one for all, or one each")
        return params

    def _admit(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], priorities: Sequence[int]
    ) -> list[str]:
        """Queue all prompts, or none when one of them is wrong; their request ids."""
        if self._dead is not None:
            raise EngineDeadError("an earlier step failed; make a new LLM") from self._dead
        if self._frontend.running():
            raise RequestError(
                "this LLM is streaming; finish or close the stream, or use engine.extensions.serving.AsyncLLM for many"
            )
        ids = [str(next(self._ids)) for _ in prompts]
        try:
            for i, prompt, param, priority in zip(ids, prompts, params, priorities, strict=True):
                for request in self._frontend.admit(i, prompt, param, priority=priority):
                    self._core.add(request)
        except BaseException:
            self._forget(ids)
            raise
        return ids

    def _drain(self, *, only_finished: bool) -> Iterator[RequestOutput]:
        """Step until nothing runs, yielding each output as it changes; what is left is aborted on the way out."""
        try:
            while self._core.has_work():
                try:
                    outputs = self._core.step()
                except Exception as error:
                    self._dead = error
                    raise
                changed, stopped = self._frontend.process(outputs, only_finished=only_finished)
                if stopped:
                    self._core.abort(stopped)
                yield from changed
        finally:
            self._forget(self._frontend.running())

    def _forget(self, request_ids: Sequence[str]) -> None:
        self._core.abort([core_id for i in request_ids for core_id in self._frontend.forget(i)])


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, dict)) or (prompts and all(isinstance(p, int) for p in prompts)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))
