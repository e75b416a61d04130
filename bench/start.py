"""From the start of a process to its first token, beside llama.cpp, and the memory that a model takes.

    python bench/start.py --llama LLAMA/bin/python --memory

Each run is a new process: ``engine generate --max-tokens 1``, once with the demo model and once with a checkpoint of
Qwen3-0.6B's shape, and llama.cpp with the same weights and a prompt as long. Runs take turns; files are in the system's
cache by then, since the first round does not count. The best counts; ``cpu`` is processor time, of all threads and of
the system, which says something on a busy machine too.

Memory is what a process has more than before it loads the model, after a prompt of 32 tokens and 32 tokens more, in
MiB: ``anonymous`` is its own, looked at every few milliseconds for the peak, ``resident`` counts pages of files too,
which the system shares and takes back.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cpu

COMMAND = "import sys; from engine.extensions.cli import main; sys.exit(main())"  # what `engine` is
PROMPT = 32
FORMATS = ({}, {"quantization": "int8"}, {"quantization": "int4"}, {"dtype": "float32"})


def with_tokenizer(model: Path, folder: Path) -> str:
    """The checkpoint beside a tokenizer that has a word for each number."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    for file in model.iterdir():
        if file.name in ("config.json", "generation_config.json") or file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file.resolve())
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(1000)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def first_token(command: list[str], threads: int) -> tuple[float, float]:
    """Seconds until the process writes what it generated, and its processor time by the end."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package comes with its bytecode
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as process:
        assert process.stdout is not None
        said = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
    if process.returncode or not said:
        sys.exit(f"this failed: {' '.join(command)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def generate(model: str | None) -> list[str]:
    words = ["generate", "--platform", "cpu", "--no-stream", "--max-tokens", "1", "--temperature", "0"]
    prompt = " ".join(map(str, range(1, PROMPT + 1)))
    return [sys.executable, "-c", COMMAND, *words, *(("--model", model) if model else ()), prompt]


def run_llama(model: str, threads: int) -> None:
    cpu.llama(model, threads)([(list(range(1, PROMPT + 1)), 1)])
    print("done", flush=True)


def kib(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def run_memory(model: str, options: dict[str, str]) -> None:
    """Load the model with `options`, use it, and print what it took."""
    from engine import LLM, SamplingParams

    LLM(platform="cpu")  # the demo model: whatever is imported and built once is there now
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, anonymous, ended = {f: kib(f) for f in ("VmRSS", "RssAnon")}, [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.003):
            anonymous[0] = max(anonymous[0], kib("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    llm = LLM(model, platform="cpu", skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 30, **options)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)
    llm.generate([list(range(1, PROMPT + 1))], params, use_tqdm=False)
    ended.set()
    watcher.join()
    figures = (anonymous[0] - before["RssAnon"], kib("RssAnon") - before["RssAnon"])
    figures += (kib("VmHWM") - before["VmRSS"], kib("VmRSS") - before["VmRSS"])
    print(*(figure >> 10 for figure in figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", metavar="PYTHON", help="of an environment with llama-cpp-python and gguf")
    parser.add_argument("--model", help="a checkpoint of Qwen3; random weights if left out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="what the model takes, in several formats")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        what, model, *options = args.run
        if what == "llama":
            run_llama(model, args.threads)
        else:
            run_memory(model, dict(option.split("=") for option in options))
        return
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as beside:
        model = args.model or cpu.checkpoint(Path(made))
        commands = {"engine, demo model": generate(None), "engine": generate(with_tokenizer(Path(model), Path(beside)))}
        if args.llama:
            commands["llama.cpp"] = [args.llama, __file__, "--threads", str(args.threads), "--run", "llama", model]
        best = dict.fromkeys(commands, (1e9, 1e9))
        for turn in range(args.rounds + 1):
            for name, command in commands.items():
                found = first_token(command, args.threads)
                if turn:
                    best[name] = min(best[name][0], found[0]), min(best[name][1], found[1])
        for name, (seconds, processor) in best.items():
            print(f"{name:<20}{seconds:8.2f} s   cpu {processor:6.2f} s", flush=True)
        for options in FORMATS if args.memory else ():
            words = [f"{name}={value}" for name, value in options.items()]
            command = [sys.executable, __file__, "--run", "memory", model, *words]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            peak, steady, most, resident = map(int, done.stdout.split())
            what = ", ".join(options.values()) or "as stored"
            print(f"{what:<12} anonymous {peak} at most, {steady} steady; resident {most} at most, {resident} steady")


if __name__ == "__main__":
    main()
