"""Options of the server, apart from those of the engine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.errors import ConfigError, RequestError
from engine.request import SamplingParams

ENV_API_KEY = "ENGINE_API_KEY"
"""The environment variable with an API key, for those who keep secrets off the command line."""

_OVERRIDABLE = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty"),
)


@dataclass(frozen=True)
class ServerArgs:
    """Every option of the server.

    Args:
        host: address to listen on; 0.0.0.0 for all.
        port: port to listen on; 0 takes a free one, which the log names.
        uds: path of a Unix socket to listen on instead; the process's umask decides who may connect.
        served_model_name: names under which requests may ask for the model; the first is told in answers. None takes
            the folder's name.
        api_key: keys of which clients must bring one, as ``Authorization: Bearer KEY``. ENGINE_API_KEY adds one.
        ssl_certfile: file with the TLS certificate chain.
        ssl_keyfile: file with the certificate's private key.
        ssl_ca_certs: file with the authorities whose client certificates are asked for and accepted.
        cors_origins: origins whose pages may call the server from a browser; none by default.
        root_path: path under which a proxy shows the server.
        keep_alive_timeout: seconds that a connection may be idle; longer than a proxy in front keeps it, or the proxy
            finds it closed.
        sse_keep_alive_interval: seconds without an event after which a stream sends a comment, for proxies that end
            what is silent; 0 sends none. The first one sends the stream's status, 200, before its first token.
        max_waiting: sequences that may wait for a place in a step; a request beyond them is answered with 429.
        request_timeout: seconds after which a request ends with 408; a request's own timeout may only be shorter.
        max_request_bytes: largest request body; a larger one is answered with 413.
        max_logprobs: most alternatives a token that a request may ask for; -1 allows the whole vocabulary.
        drain_timeout: seconds that running requests have to finish after SIGTERM.
        on_engine_death: when the engine's process ends, ``"exit"`` or ``"restart"`` it.
        generation_config: ``"auto"`` completes requests with what the model's generation_config.json recommends,
            ``"none"`` with the engine's own defaults.
        override_generation_config: sampling parameters of requests that leave them open, before those of the model.
        chat_template: Jinja file that replaces the tokenizer's chat template.
        default_chat_template_kwargs: variables of the chat template, such as enable_thinking; a request's own win.
        trust_request_chat_template: let requests bring a chat template of their own.
        tool_call_parser: format of the model's tool calls; None takes what the chat template shows, ``"none"`` nothing.
        reasoning_parser: format of the model's reasoning; None takes what the chat template shows, ``"none"`` nothing.
        allow_unknown_fields: ignore, with a line in the log, request fields that the server does not know, in place of
            answering with 400.
        enable_force_include_usage: end every stream with its usage, asked for or not.
        response_store_size: responses that are kept for previous_response_id, the latest ones; 0 keeps none.
        log_format: ``"text"``, or ``"json"`` with an object a line.
        log_level: least level that is logged.
        otlp_traces_endpoint: URL of an OpenTelemetry collector that gets a span a prompt, by OTLP over HTTP:
            ``http://localhost:4318/v1/traces``. None traces nothing. Needs the extra ``engine[otel]``.
        access_log: log each request's method, path, status and time.
        disable_access_log_for_endpoints: paths whose requests are not logged, such as /health and /metrics.
        log_prompts: log what users send and get, too.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    served_model_name: list[str] = field(default_factory=list)
    api_key: list[str] = field(default_factory=list)
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    cors_origins: list[str] = field(default_factory=list)
    root_path: str = ""
    keep_alive_timeout: int = 75
    sse_keep_alive_interval: float = 0.0
    max_waiting: int = 256
    request_timeout: float | None = None
    max_request_bytes: int = 16 << 20
    max_logprobs: int = 20
    drain_timeout: float = 30.0
    on_engine_death: Literal["exit", "restart"] = "exit"
    generation_config: Literal["auto", "none"] = "auto"
    override_generation_config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    default_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    trust_request_chat_template: bool = False
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    allow_unknown_fields: bool = False
    enable_force_include_usage: bool = False
    response_store_size: int = 256
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_traces_endpoint: str | None = None
    access_log: bool = True
    disable_access_log_for_endpoints: list[str] = field(default_factory=list)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        """Check ranges and files; raises `ConfigError` that names the option."""
        for name in (
            *("max_waiting", "port", "response_store_size", "drain_timeout"),
            *("keep_alive_timeout", "sse_keep_alive_interval"),
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.max_request_bytes < 1:
            raise ConfigError(f"max_request_bytes must be at least 1, got {self.max_request_bytes}")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ConfigError(f"request_timeout must be above 0, got {self.request_timeout}")
        if self.max_logprobs < -1:
            raise ConfigError(f"max_logprobs must be at least -1, got {self.max_logprobs}")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ConfigError("ssl_keyfile needs ssl_certfile, the certificate that the key belongs to")
        if self.ssl_ca_certs and not self.ssl_certfile:
            raise ConfigError("ssl_ca_certs needs ssl_certfile: client certificates exist in TLS only")
        if self.otlp_traces_endpoint is not None and not re.match("https?://.", self.otlp_traces_endpoint):
            raise ConfigError(
                f"otlp_traces_endpoint must be a URL like http://localhost:4318/v1/traces, "
                f"got {self.otlp_traces_endpoint!r}"
            )
        self._check_generation_config()
        if any(not key for key in self.api_key):
            raise ConfigError("api_key has an empty key, which every client would bring")
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "chat_template"):
            if (path := getattr(self, name)) and not Path(path).is_file():
                raise ConfigError(f"{name} names {path!r}, and there is no such file")

    def _check_generation_config(self) -> None:
        if wrong := set(self.override_generation_config) - set(_OVERRIDABLE):
            raise ConfigError(
                f"override_generation_config has {', '.join(sorted(wrong))}; it may have {', '.join(_OVERRIDABLE)}"
            )
        try:
            SamplingParams(**self.override_generation_config)
        except RequestError as error:
            raise ConfigError(f"override_generation_config: {error}") from error

    def api_keys(self) -> list[str]:
        """The keys given as options and in the environment; none means that clients need none."""
        return [*self.api_key, *filter(None, [os.environ.get(ENV_API_KEY)])]
