"""What the host does beside the model in a decode step: scheduling, building the batch, sampling, text.

    python bench/host.py [--platform cpu] [--batch-size 16] [--steps 64] [--temperature 0.7]

Qwen3-0.6B's shape with weights and a vocabulary of words that mean nothing, all requests of one length, in this
process. Each part is timed where it is called, without what it calls of the others; the median over steps counts. What
is left is the loop around them. On an asynchronous device the forward pass is only its launch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine import LLM, SamplingParams

SHAPE = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072,
         "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
         "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 4096, "dtype": "bfloat16",
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


class Clock:
    """Seconds by part of the step, the time of parts within parts taken off."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._within = [0.0]

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time the method `name` of `owner` as `part`."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            self._within.append(0.0)
            try:
                return method(*args, **kwargs)
            finally:
                took = time.perf_counter() - begin
                self.seconds[part] += took - self._within.pop()
                self._within[-1] += took

        setattr(owner, name, timed)


def folder_of(place: Path) -> str:
    """A model's folder without weights, its tokenizer of as many words as the model has."""
    (place / "config.json").write_text(json.dumps(SHAPE))
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(151936)}, unk_token="word0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return str(place)


def watch(llm: LLM, clock: Clock) -> None:
    """Time every part of a step."""
    core, runner = llm._core, llm._core.runner
    for name in ("schedule", "update"):
        clock.watch(core.scheduler, name, "scheduling")
    for name in ("nbytes", "apply", "build", "stage_tables", "update_tables", "attention"):
        clock.watch(runner.builder, name, "batch")
    for name in ("begin", "upload"):
        clock.watch(runner._staging, name, "batch")
    for _, backend in runner._plans:
        clock.watch(backend, "plan", "attention plans")
    for name in ("plan", "sample"):
        clock.watch(runner.sampler, name, "sampling")
    clock.watch(runner.model, "forward", "model")
    clock.watch(llm._frontend, "process", "text and outputs")
    clock.watch(core, "_stats", "statistics")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        options = {"load_format": "dummy", "max_model_len": 2048, "async_scheduling": False}
        llm = LLM(folder_of(Path(place)), platform=args.platform, **options)
    params = SamplingParams(temperature=args.temperature, max_tokens=args.steps + 1, ignore_eos=True)
    prompts = [[3 + (7 * i + 31 * r) % 150000 for i in range(args.input_len)] for r in range(args.batch_size)]
    llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    llm.reset_prefix_cache()
    clock = Clock()
    watch(llm, clock)
    step, laps = llm._core.step, []

    def lap() -> Any:
        """Begin a step; what was done until now was the one before."""
        laps.append((time.perf_counter(), dict(clock.seconds)))
        clock.seconds.clear()
        return step()

    llm._core.step = lap
    llm.generate(prompts, params, use_tqdm=False)
    decodes = range(len(laps) - args.steps + 4, len(laps))  # the first steps read prompts
    whole = statistics.median(laps[i][0] - laps[i - 1][0] for i in decodes)
    found = {part: statistics.median(laps[i][1][part] for i in decodes) for part in laps[-1][1]}
    found["the loop"] = whole - sum(found.values())
    for part, seconds in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{part:<18}{seconds * 1e3:9.3f} ms{seconds / whole:8.1%}")
    print(f"{'step':<18}{whole * 1e3:9.3f} ms    beside the model {1 - found['model'] / whole:.1%}")


if __name__ == "__main__":
    main()
