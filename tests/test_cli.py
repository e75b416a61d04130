"""The command line as a user meets it: text out, and for each thing that goes wrong a sentence and an exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import DEMO_MODEL
from engine.extensions.cli import main

ENGINE = [sys.executable, "-c", "import sys; from engine.extensions.cli import main; sys.exit(main())"]
SMALL = ["--platform", "cpu", "--max-model-len", "128", "--num-blocks", "64"]


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ENGINE, *words], capture_output=True, text=True, input=stdin, check=False, timeout=120)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_generate_streams_plausible_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "def fibonacci(n):", "--max-tokens", "64", *SMALL]) == 0
    text = capsys.readouterr().out
    assert text.startswith("def fibonacci(n):\n    ")
    assert "return" in text
    compile(text, "fibonacci", "exec")


def test_generate_json_and_streaming_agree(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "import os\n\ndef ", "--max-tokens", "16", "--temperature", "0.8", "--seed", "3", *SMALL]
    assert main(words) == 0
    streamed = capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["prompt"] + output["outputs"][0]["text"] + "\n" == streamed
    assert output["finished"]


def test_generate_reads_standard_input() -> None:
    done = run("generate", "-", "--max-tokens", "4", *SMALL, stdin="class Stack:\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("class Stack:\n")


def test_chat_keeps_the_conversation() -> None:
    lines = "Write a function that reverses a string.\n/undo\n/what\nSort a list.\n/reset\n/exit\n"
    done = run("chat", "--max-tokens", "24", *SMALL, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 6
    assert "def " in done.stdout
    assert "/reset starts over" in done.stderr


@pytest.mark.parametrize("kind", ["offline", "latency"])
def test_bench_prints_a_table_and_json(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--num-prompts", "3"] if kind == "offline" else ["--batch-size", "2", "--repeats", "1"]
    words = ["bench", kind, *size, "--input-len", "5-9", "--output-len", "4", *SMALL, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "output tokens per second" in table
    assert json.loads((tmp_path / "out").read_text())["benchmark"] == kind
    assert main([*words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["output_tokens_per_second"] > 0
    assert figures.get("output_tokens", 12) == 12


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5_000_000)


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def edit(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def mamba(folder: Path) -> None:
    size = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 4096, "state_size": 8}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"], **size})
    )


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def larger_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"id": 9000, "content": "<|far|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({**token, **flags})
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_config, "config.json"),
        (without_weights, "safetensors"),
        (truncated, "model.safetensors"),
        (no_header, "model.safetensors"),
        (edit(hidden_size=128), "shape"),
        (edit(num_hidden_layers=9, layer_types=["full_attention"] * 9), "layers.8"),
        (edit(model_type="madeup", architectures=["MadeUp"]), "madeup"),
        (mamba, "state"),
        (not_json, "config.json"),
        (no_tokenizer, "tokenizer"),
        (larger_tokenizer, "tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_model_is_named_in_a_sentence(
    damage: Callable[[Path], None], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    damage(folder)
    assert main(["generate", "x", "--model", str(folder), *SMALL]) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate"], "give a prompt"),
        (["generate", ""], "empty"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens"),
        (["generate", "x " * 400], "max_model_len is 128"),
        (["generate", "x", "--model", "/nowhere"], "/nowhere"),
        (["generate", "x", "--platform", "nope"], "nope"),
    ],
)
def test_a_wrong_request_is_named_in_a_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *SMALL[2 if "--platform" in words else 0 :]]) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bench", "offline", "--input-len", "9-3"], "9-3"),
        (["generate", "x", "--hf-overrides", "{"], "JSON"),
        (["generate", "x", "--dtype", "int3"], "bfloat16"),
    ],
)
def test_a_wrong_flag_is_named_in_a_sentence(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert says in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--model", "/nowhere", "--debug"]) != 0
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_an_error_not_a_traceback() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*ENGINE, "generate", "x", "--max-tokens", "2", *SMALL], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "No space left" in done.stderr


@pytest.mark.parametrize("after", ["load", "generate"])
def test_ctrl_c_ends_at_once_and_leaves_nothing_behind(after: str) -> None:
    words = ["generate", "def f():", "--max-tokens", "2000", "--max-model-len", "2048", "--ignore-eos"]
    with subprocess.Popen(
        [*ENGINE, *words, "--platform", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        if after == "generate":
            assert process.stdout.read(20).startswith("def f():")
        else:
            time.sleep(1.5)
        started = children(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
        error = process.stderr.read()
    assert process.returncode == 130, error
    assert error.strip().endswith("interrupted")
    assert "Traceback" not in error
    assert not [pid for pid in started if os.path.exists(f"/proc/{pid}")]
