"""The command line itself, `engine platforms` and `engine doctor`."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.extensions import cli
from engine.extensions.cli import COMMANDS, Command, doctor, main
from engine.extensions.cli.text import fields, paragraph, size, table
from engine.version import __version__

Install = Callable[..., None]

NPU = """
from dummy_base import Base, Probe
class Npu(Base):
    name = "npu"
"""
BUSY = NPU + '    _probe = Probe(False, "the device is used by another process; wait for it to end")\n'
WAY = "choose another platform with --platform NAME, ENGINE_PLATFORM=NAME or LLM(platform=NAME)"


def engine(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`engine WORDS` in a process of its own."""
    code = "import sys; from engine.extensions.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def platforms(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["platforms", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.mark.usefixtures("install")
def test_platforms_lists_what_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    report = platforms(capsys)
    (host,) = report["platforms"]
    assert (report["selected"], report["problem"]) == ("host", "")
    assert {k: v for k, v in host.items() if k != "capabilities"} == {
        "name": "host",
        "status": "available",
        "reason": "",
        "distribution": "engine",
        "version": "1.0",
        "target": "dummy_host:Host",
        "contract": "1.0",
        "accelerator": False,
        "devices": [],
    }
    assert host["capabilities"]["dtypes"] == ["bfloat16", "float16", "float32"]


def test_platforms_lists_what_cannot_run(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("dummy-npu", {"npu": "dummy_npu:Npu"}, {"dummy_npu": BUSY})
    report = platforms(capsys)
    _, npu = report["platforms"]
    assert report["selected"] == "host"
    assert (npu["status"], npu["contract"], npu["capabilities"]) == ("unavailable", "1.0", None)
    assert npu["reason"].startswith("the device is used by another process")


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("raise OSError('no firmware')", "cannot be imported: OSError: no firmware"),
        (NPU + "    contract = '3.0'", "contract 3.0"),
        (
            NPU + "    def capabilities(self): raise OSError('no firmware')",
            "capabilities() raised OSError: no firmware",
        ),
        (
            NPU + "    def __init__(self, index): raise OSError('no firmware')",
            "constructor raised OSError: no firmware",
        ),
    ],
    ids=["import", "contract", "capabilities", "constructor"],
)
def test_platforms_lists_what_is_broken(
    install: Install, capsys: pytest.CaptureFixture[str], body: str, cause: str
) -> None:
    install("dummy-npu", {"npu": "dummy_npu:Npu"}, {"dummy_npu": body})
    host, npu = platforms(capsys)["platforms"]
    assert (host["status"], npu["status"], npu["distribution"]) == ("available", "broken", "dummy-npu")
    for word in ("platform plugin 'npu' (dummy-npu 1.0): ", cause, "remedy: ", WAY):
        assert word in npu["reason"]


def test_a_broken_plugin_leaves_nothing_selected(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("dummy-npu", {"npu": "dummy_npu:Npu"}, {"dummy_npu": "raise OSError('no firmware')"})
    report = platforms(capsys)
    assert report["selected"] is None
    assert "OSError: no firmware" in report["problem"]


def test_platforms_as_a_table(
    install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    install("dummy-npu", {"npu": "dummy_npu:Npu"}, {"dummy_npu": NPU}, version="3.2.1")
    install("dummy-tpu", {"tpu": "dummy_tpu:Npu"}, {"dummy_tpu": BUSY.replace("npu", "tpu")})
    install("other", {"worse": "missing_module:P"})
    assert main(["platforms"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "NAME   STATUS       CONTRACT  DEVICES                  DISTRIBUTION\n"
        "host   available    1.0       -                        engine 1.0\n"
        "npu    available    1.0       2 x Dummy One (3.0 GiB)  dummy-npu 3.2.1\n"
        "tpu    unavailable  1.0       -                        dummy-tpu 1.0\n"
        "worse  broken       -         -                        other 1.0\n"
        "\n"
        "tpu: the device is used by another process; wait for it to end\n"
        "\n"
        "worse: platform plugin 'worse' (other 1.0): cannot be imported:\n"
        "       ModuleNotFoundError: No module named 'missing_module'\n"
    )
    assert "\nnpu can\n  dtypes           bfloat16, float16, float32\n" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_help_is_at_once_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from engine.extensions.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print('heavy:', {'torch', 'transformers', 'numpy', 'pluggy'} & set(sys.modules))"
    )
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - begin)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "heavy: set()" in ran.stdout
    assert all(f"\n  {c.name} " in ran.stdout and c.help in ran.stdout for c in COMMANDS)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command.name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: engine {command.name} ")


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "commands:\n  generate" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"engine {__version__}\n"


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["platform"])
    assert "invalid choice: 'platform' (choose from" in capsys.readouterr().err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Adds the command `fail`, of the extra `sky`, that raises what it is given."""

    def add(error: BaseException) -> None:
        def run(args: object) -> int:
            raise error

        module = ModuleType("failing_command")
        vars(module).update(add_arguments=lambda parser: None, run=run)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "COMMANDS", (*COMMANDS, Command("fail", "fail", module.__name__, "sky")))

    return add


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("block_size must be at least 1"), 2, "error: block_size must be at least 1\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ModuleNotFoundError("No module named 'fastapi'", name="fastapi"),
            1,
            "error: engine fail needs fastapi\nremedy: pip install 'engine[sky]'\n",
        ),
    ],
    ids=["engine error", "interrupt", "missing extra"],
)
@pytest.mark.parametrize("words", [["fail"], ["--debug", "fail"], ["fail", "--debug"]], ids=" ".join)
def test_errors_for_users(
    command: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    told: str,
    words: list[str],
) -> None:
    command(error)
    assert main(words) == code
    err = capsys.readouterr().err
    assert err.endswith(told)
    assert ("Traceback" in err) == ("--debug" in words)
    assert ("Traceback" in err) or err == told


def test_other_errors_keep_their_traceback(command: Callable[[BaseException], None]) -> None:
    command(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["fail"])


@pytest.mark.usefixtures("install")
def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys; from engine.extensions.cli import main; sys.exit(main(['platforms']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate()
    assert (process.returncode, err) == (141, b"")


def test_the_environment_names_the_platform(install: Install) -> None:
    install("dummy-npu", {"npu": "dummy_npu:Npu"}, {"dummy_npu": NPU})
    ran = engine("platforms", ENGINE_PLATFORM="host")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.endswith("Unless another is chosen, host runs.\n")


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert main(["doctor", "--json"]) == 0
    sections: dict[str, dict[str, Any]] = json.loads(capsys.readouterr().out)
    return sections


@pytest.mark.usefixtures("install")
def test_doctor_describes_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    sections = report(capsys)
    assert list(sections) == ["system", "python", "packages", "torch", "environment", "plugins", "caches"]
    assert not any("error" in values for values in sections.values())
    assert sections["packages"]["torch"].startswith("2.")
    assert sections["python"]["Python"].startswith(f"3.{sys.version_info[1]}.")
    assert sections["plugins"] == {"by default": "host", "platform host": "engine 1.0, available\n"}


def test_doctor_names_broken_plugins(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("dummy-npu", {"npu": "dummy_npu:Npu"}, {"dummy_npu": "raise OSError('no firmware')"})
    install("dummy-sink", {"sink": "dummy_sink"}, {"dummy_sink": ""}, group="engine.plugins")
    found = report(capsys)["plugins"]
    assert "broken\nplatform plugin 'npu' (dummy-npu 1.0): cannot be imported: OSError" in found["platform npu"]
    assert "broken\nhook plugin 'sink' (dummy-sink 1.0): it has no function" in found["hooks sink"]


@pytest.mark.usefixtures("install")
def test_doctor_tells_no_secrets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_12345")
    monkeypatch.setenv("HF_ENDPOINT", "https://someone:hunter2@hub.example/models")
    monkeypatch.setenv("ENGINE_API_KEY", "sk-12345")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("HF_HOME", f"{Path.home()}/hub")
    monkeypatch.setenv("UNRELATED", "12345")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for secret in ("12345", "hunter2", "UNRELATED", f"{Path.home()}/hub"):
        assert secret not in out
    for line in ("https://hub.example/models", "TOKENIZERS_PARALLELISM +false", "~/hub"):
        assert re.search(line, out)


@pytest.mark.usefixtures("install")
def test_doctor_survives_what_is_sick(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "ModuleNotFoundError" in report(capsys)["torch"]["error"]


def test_doctor_reads_limits_of_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "outer" / "memory.max").write_text("1073741824\n")
    (tmp_path / "outer" / "cpu.max").write_text("150000 100000\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "cpu.max").write_text("max 100000\n")
    monkeypatch.setattr(doctor, "_CGROUPS", tmp_path)
    monkeypatch.setattr(doctor, "_own_cgroup", lambda: "outer/inner")
    assert (doctor._memory_limit(), doctor._cpu_limit()) == ("1.0 GiB", "1.5 CPUs")
    monkeypatch.setattr(doctor, "_own_cgroup", lambda: "")
    assert (doctor._memory_limit(), doctor._cpu_limit()) == ("none", "none")


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    assert table(("A", "LONG"), [("1", ""), ("three", "2")]) == "A      LONG\n1      -\nthree  2"
    assert fields({"a": True, "long": [1, 2], "none": []}) == "  a     yes\n  long  1, 2\n  none  none"
    assert paragraph("one two three four five\nsix", "to: ") == "to: one two three four\n    five\n    six"
    assert [size(n) for n in (None, 0, 1023, 1024, 3 << 29, 5 << 40, 1 << 60)] == [
        *("", "0 B", "1023 B", "1.0 KiB", "1.5 GiB", "5.0 TiB", "1048576.0 TiB")
    ]
