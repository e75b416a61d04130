"""Does an architecture come out right? A tiny model of it runs through the engine and is compared with Transformers.

The engine's run is as hostile as a small one can be: prompts prefilled in chunks beside others that decode, prompts
that share a prefix, and a pool so small that sequences are preempted and recomputed. The reference is the eager forward
pass of Transformers over prompt and output together: greedy decoding is right exactly if each output token is the
likeliest one there.
"""

from __future__ import annotations

import copy
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engine import LLM, RequestOutput, SamplingParams
from engine.errors import UnsupportedCapability, UnsupportedModelError
from engine.plugins import load_platform
from engine_conformance.cases import members
from engine_conformance.tiny_models import UNRUNNABLE, tiny_config, tiny_model
from engine_sdk import Capabilities

TOLERANCE = 1e-4
"""Largest difference of log probabilities in fp32. A token within it of the likeliest one counts as a tie.

Where it is not enough, and in lower precision, the bound is twice the error of eager Transformers in the same
precision; both errors are against the same weights in fp64, or in fp32. It means little for experts, where rounding can
send a token elsewhere.
"""

_NEW_TOKENS = 12
_TOKENS = list(range(3, 128))
"""All but padding, begin and end, which some models treat apart when they stand in a prompt."""

_MAX_MODEL_LEN = 64


@dataclass(frozen=True)
class Outcome:
    """What came of one architecture.

    Attributes:
        name: as Transformers calls it.
        status: ``"right"``; ``"refused"`` at load with a reason; ``"undeclared"``: the platform lacks what it needs
            and says so; ``"wrong"`` or ``"failed"``, which must not happen.
        detail: the reason, or what was wrong.
        error: largest difference of log probabilities from the reference.
        preemptions, cached_tokens: how hostile the run was.
    """

    name: str
    status: Literal["right", "refused", "undeclared", "wrong", "failed"]
    detail: str = ""
    error: float = 0.0
    preemptions: int = 0
    cached_tokens: int = 0


def check_architecture(name: str, platform: str, dtype: torch.dtype = torch.float32, **options: Any) -> Outcome:
    """Build a tiny model of architecture `name`, run it on `platform`, compare; the engine's faults are outcomes."""
    if name in UNRUNNABLE:
        return Outcome(name, "refused", f"no reference: {UNRUNNABLE[name]}")
    declared = load_platform(platform).capabilities()
    model: Any = tiny_model(name, dtype=dtype, **head_size(name, declared))
    block_size = small_block(declared)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            runs = _run(name, Path(folder), platform, dtype, {"block_size": block_size, **options})
        except UnsupportedModelError as error:
            return Outcome(name, "refused", str(error))
        except UnsupportedCapability as error:
            return Outcome(name, "undeclared", str(error))
        except Exception as error:
            return Outcome(name, "failed", f"{type(error).__name__}: {error}")
    preemptions = sum(o.metrics.num_preemptions for run in runs for o in run if o.metrics)
    cached = sum(o.num_cached_tokens for run in runs for o in run)
    outputs = [o for run in runs for o in run]
    detail, worst = _compare_all(model, outputs, TOLERANCE)
    if detail:
        exact = copy.deepcopy(model).to(torch.float64 if dtype is torch.float32 else torch.float32)
        detail, worst = _compare_all(exact, outputs, _rounding(model, exact, outputs))
    if detail:
        return Outcome(name, "wrong", detail, worst, preemptions, cached)
    if not (preemptions and cached) and block_size <= 4:  # larger blocks leave these sequences nothing to fight for
        return Outcome(name, "wrong", "the run had no preemption, or no prefix hit", worst, preemptions, cached)
    return Outcome(name, "right", "", worst, preemptions, cached)


@torch.no_grad()
def looks_ahead(name: str) -> bool:
    """Whether the installed Transformers' own model lets what follows a token change its logits: it is no reference."""
    ids, model = torch.tensor([_TOKENS[:24]]), tiny_model(name)
    whole, part = (model(input_ids=ids[:, :n], use_cache=False).logits[:, :8] for n in (24, 8))
    return not torch.allclose(whole, part, rtol=0, atol=0.1 * float(whole.std()))


def head_size(name: str, declared: Capabilities) -> dict[str, Any]:
    """A head size that the platform declares, for `tiny_model`; none where the usual one will do, or cannot be set."""
    fields = vars(tiny_config(name))
    usual, each_layer_its_own = fields.get("head_dim"), fields.get("_heterogeneity_spec") is not None
    if usual is None or usual in declared.head_dims or each_layer_its_own or "kv_lora_rank" in fields:
        return {}
    return {"head_dim": members(declared.head_dims, (32, 64, 128))[0]}


def small_block(declared: Capabilities) -> int:
    """The smallest declared block size from 4 on."""
    return next((size for size in range(4, 1025) if size in declared.block_sizes), 16)


def _prompts(name: str) -> list[list[int]]:
    draw = random.Random(name)
    long, short, medium = ([draw.choice(_TOKENS) for _ in range(n)] for n in (37, 5, 21))
    return [long, short, long[:28] + short, medium, medium[:9] + short]


def _run(
    name: str, folder: Path, platform: str, dtype: torch.dtype, options: dict[str, Any]
) -> list[list[RequestOutput]]:
    """The same prompts twice with room to spare, for prefix hits, then with as little as one sequence needs."""
    common: dict[str, Any] = {
        "platform": platform,
        "dtype": str(dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        "max_model_len": _MAX_MODEL_LEN,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 8,
        **options,
    }
    prompts = _prompts(name)
    greedy = SamplingParams(
        temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True, logprobs=-1, allowed_token_ids=_TOKENS
    )
    roomy = LLM(str(folder), **{"num_blocks": 512, **common})
    runs = [roomy.generate(prompts, greedy), roomy.generate(prompts[2:4], greedy)]
    crowd = [*prompts, *(p[i : i + 4] for p in prompts for i in (0, 1))]  # short ones all begin, then grow
    # How much is too little for all and enough to let several begin depends on the windows.
    for spare in range(6 if common["block_size"] <= 4 else 1):
        tight = LLM(str(folder), **{**common, "num_blocks": roomy.info.min_blocks + spare})
        runs.append(tight.generate(crowd, greedy))
        if any(o.metrics.num_preemptions for o in runs[-1] if o.metrics):
            break
    return runs


def _rounding(model: torch.nn.Module, exact: torch.nn.Module, outputs: list[RequestOutput]) -> float:
    """Twice the error of `model`'s log probabilities, beside the same weights in a higher precision."""
    return 2 * max((reference(model, o) - reference(exact, o)).abs().max().item() for o in outputs)


def _compare_all(model: torch.nn.Module, outputs: list[RequestOutput], tolerance: float) -> tuple[str, float]:
    """What is wrong with the first output that is wrong, and the largest difference up to there."""
    worst = 0.0
    for output in outputs:
        detail, difference = compare(model, output, tolerance)
        worst = max(worst, difference)
        if detail:
            return detail, worst
    return "", worst


@torch.no_grad()
def reference(model: torch.nn.Module, output: RequestOutput) -> torch.Tensor:
    """Log probabilities [tokens, V], at least fp32, that `model` has where `output` has its tokens."""
    ids = torch.tensor([output.prompt_token_ids + output.outputs[0].token_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(output.prompt_token_ids) - 1 : -1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # type: ignore[no-any-return]


def compare(model: torch.nn.Module, output: RequestOutput, tolerance: float) -> tuple[str, float]:
    """What is wrong with a greedy output, if anything, and the largest difference of log probabilities."""
    tokens, logprobs = output.outputs[0].token_ids, output.outputs[0].logprobs
    assert logprobs is not None
    expected, worst = reference(model, output), 0.0
    for i, (token, given) in enumerate(zip(tokens, logprobs, strict=True)):
        ours = torch.tensor([given[j].logprob for j in range(expected.shape[1])])
        difference = (ours - expected[i]).abs().max().item()
        worst = max(worst, difference if difference == difference else float("inf"))
        if worst > tolerance:
            return f"log probabilities of output token {i} differ by {worst:.2e}", worst
        behind = expected[i, _TOKENS].max() - expected[i, token]
        if behind > tolerance:
            return f"output token {i} is {token}, and the reference has a likelier one by {behind:.2e}", worst
    return "", worst
