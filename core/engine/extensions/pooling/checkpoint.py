"""What a checkpoint says of its pooling: its architecture, sentence-transformers' files, and the user's own words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.config import EngineArgs
from engine.errors import CheckpointError, ConfigError, UnsupportedModelError

Kind = Literal["embed", "classify", "token_classify", "token_score"]
"""What a model is: of vectors, of classes, of classes a token, or of two tokens whose odds are a score."""

_KINDS: tuple[tuple[str, Kind], ...] = (
    ("ForSequenceClassification", "classify"),
    ("ForTokenClassification", "token_classify"),
    ("ForRewardModel", "token_classify"),
    ("ForProcessRewardModel", "token_classify"),
    ("ForMaskedLM", "embed"),
    ("Model", "embed"),
)
"""Ends of names of architectures that do not generate."""

POOLINGS = {
    "cls": "cls",
    "last": "lasttoken",
    "lasttoken": "lasttoken",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "mean_sqrt_len",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
}
"""Words for ways to pool, in lower case, and sentence-transformers' names of them."""

_OPTIONS = ("pooling_type", "normalize", "use_activation", "score_template", "classifier_from_token")

TEMPLATES = {
    "qwen3-reranker": (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ("no", "yes"),
        "Given a web search query, retrieve relevant passages that answer the query",
    )
}
"""Prompts of models that answer whether a document fits, by name: the text, the two answers, the usual instruction."""


@dataclass(frozen=True)
class Layer:
    """A module of sentence-transformers behind the pooling: ``"Dense"`` or ``"LayerNorm"``, its folder and options."""

    kind: str
    folder: Path
    options: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint pools.

    Attributes:
        kind: what it is.
        pooling: ways to pool, whose vectors are joined; empty leaves it to what attention sees.
        layers: what comes behind.
        normalize: embeddings have length 1.
        activation: whether classes and scores go through softmax or sigmoid; None leaves it to the configuration.
        max_len: most tokens, where sentence-transformers limits them.
        lower_case: texts are lower-cased first.
        include_prompt: whether tokens of a named prompt are pooled, too.
        prompts: texts put before others, by name; `default_prompt` names the one that is used unless another is asked.
        similarity: of two embeddings.
        template: of a query and a document, for models that score by two tokens or need a prompt.
        instruction: the template's, where none is given.
        tokens: the answers for "no" and "yes" of models that score by two tokens.
    """

    kind: Kind
    pooling: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()
    normalize: bool = True
    activation: bool | None = None
    max_len: int | None = None
    lower_case: bool = False
    include_prompt: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"
    template: str | None = None
    instruction: str = ""
    tokens: tuple[str, str] | None = None


def claims(args: EngineArgs) -> bool:
    """Whether the model that `args` name pools: by the option `runner`, or by what the checkpoint is."""
    if args.runner == "auto":
        config = {**(_read(args.folder / "config.json") or {}), **args.hf_overrides}
        return _kind(config) is not None or (args.folder / "modules.json").is_file()
    return args.runner == "pooling"


def _kind(config: Mapping[str, Any]) -> Kind | None:
    name = str((config.get("architectures") or [""])[0])
    if "LMHead" in name:
        return None
    return next((kind for end, kind in _KINDS if name.endswith(end)), None)


def read_recipe(args: EngineArgs, config: Mapping[str, Any]) -> Recipe:
    """The recipe of the model in the folder of `args`, whose configuration is `config`.

    Raises:
        CheckpointError: a file is wrong.
        ConfigError: an option is.
        UnsupportedModelError: sentence-transformers' modules have one that is not built yet.
    """
    given = dict(args.pooler_config)
    if unknown := [name for name in given if name not in _OPTIONS]:
        raise ConfigError(f"pooler_config has no {unknown[0]!r}; it may have {', '.join(_OPTIONS)}")
    tokens = given.get("classifier_from_token") or config.get("classifier_from_token")
    template = given.get("score_template")
    instruction = ""
    if template in TEMPLATES:
        template, answers, instruction = TEMPLATES[template]
        tokens = tokens or answers
    elif template is not None and not ("{query}" in template and "{document}" in template):
        raise ConfigError(f"score_template has {{query}} and {{document}}, or is one of {', '.join(TEMPLATES)}")
    if tokens is not None and (len(tokens) != 2 or not all(isinstance(t, str) for t in tokens)):
        raise ConfigError(f"classifier_from_token is the words for no and yes, in this order; got {tokens!r}")
    kind: Kind = "token_score" if tokens else _kind(config) or "embed"
    found: dict[str, Any] = {"kind": kind, "template": template, "instruction": instruction}
    if tokens:
        found["tokens"] = (tokens[0], tokens[1])
    found |= _sentence_transformers(args.folder)
    if (word := given.get("pooling_type")) is not None:
        if str(word).lower() not in POOLINGS:
            raise ConfigError(f"pooling_type {word!r} is none of {', '.join(POOLINGS)}")
        found["pooling"] = (POOLINGS[str(word).lower()],)
    for option, name in (("use_activation", "normalize"), ("normalize", "normalize"), ("use_activation", "activation")):
        if (value := given.get(option)) is not None:
            if not isinstance(value, bool):
                raise ConfigError(f"pooler_config's {option} is true or false, got {value!r}")
            found[name] = value
    return Recipe(**found)


def _sentence_transformers(folder: Path) -> dict[str, Any]:
    """What the files of sentence-transformers say, in the names of `Recipe`."""
    modules = _read(folder / "modules.json")
    if modules is None:
        return {}
    found: dict[str, Any] = {"normalize": False, "layers": ()}
    for module in modules:
        kind, path = str(module["type"]).rpartition(".")[2], folder / module.get("path", "")
        options = _read(path / "config.json") or {}
        match kind:
            case "Transformer":
                if path != folder:
                    raise CheckpointError(
                        f"{folder} keeps its model in {path.name}; move those files beside modules.json"
                    )
                options = _read(folder / "sentence_bert_config.json") or {}
                found["max_len"] = options.get("max_seq_length")
                found["lower_case"] = bool(options.get("do_lower_case"))
            case "Pooling":
                found["pooling"] = _poolings(path, options)
                found["include_prompt"] = options.get("include_prompt", True)
            case "Dense" | "LayerNorm":
                found["layers"] += (Layer(kind, path, options),)
            case "Normalize":
                found["normalize"] = True
            case "Dropout":
                pass
            case _:
                raise UnsupportedModelError(
                    f"{folder} has sentence-transformers' module {kind}, which is not built yet"
                )
        if found["normalize"] and kind != "Normalize":
            raise UnsupportedModelError(f"{folder} has a module behind Normalize, {kind}, which is not built yet")
    said = _read(folder / "config_sentence_transformers.json") or {}
    found["prompts"] = {name: text for name, text in (said.get("prompts") or {}).items() if isinstance(text, str)}
    found["default_prompt"] = said.get("default_prompt_name")
    found["similarity"] = said.get("similarity_fn_name") or "cosine"
    return found


def _poolings(path: Path, options: Mapping[str, Any]) -> tuple[str, ...]:
    if (word := options.get("pooling_mode")) is not None:
        words = [word] if isinstance(word, str) else list(word)
    else:
        prefix = "pooling_mode_"
        words = [n[len(prefix) :].removesuffix("_tokens").removesuffix("_token") for n, on in options.items()
                 if n.startswith(prefix) and on is True]  # fmt: skip
    for word in words:
        if word not in POOLINGS:
            raise UnsupportedModelError(f"{path} pools by {word!r}, which is not built yet")
    if not words:
        raise CheckpointError(f"{path / 'config.json'} names no way to pool; download it again")
    # joined in this order, whatever the order of the file
    order = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")
    return tuple(sorted((POOLINGS[w] for w in words), key=order.index))


def _read(path: Path) -> Any:
    """A JSON file; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
