"""`engine plugin new`: what it writes is a plugin that is found, runs, and passes, with nothing added."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from engine.contract import check_platform
from engine.extensions.cli import main
from engine_sdk.scaffold import TEMPLATE, write_plugin
from engine_sdk.triton.platform import TritonPlatform


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin of the host, as the command writes it."""
    folder = tmp_path_factory.mktemp("vendor")
    assert main(["plugin", "new", "mychip", "--device-type", "cpu", "--directory", str(folder)]) == 0
    return folder / "engine-plugin-mychip"


@pytest.fixture(scope="module")
def environment(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """This environment, with the plugin installed in a folder of its own."""
    site = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(repository)], check=True)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))}


def run(environment: dict[str, str], folder: Path, *words: str) -> str:
    """A module of Python's, run in a folder; its output."""
    done = subprocess.run(
        [sys.executable, "-m", *words], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_a_whole_repository(repository: Path) -> None:
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert {f for f in files if "build" not in f} == {
        ".engine-plugin.toml",
        ".github/workflows/conformance.yml",
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "engine_mychip/__init__.py",
        "engine_mychip/platform.py",
        "engine_mychip/py.typed",
        "tests/test_conformance.py",
    }
    noted = tomllib.loads((repository / ".engine-plugin.toml").read_text())
    assert noted == {"template": TEMPLATE, "name": "mychip", "device_type": "cpu", "triton": False}
    assert "${{ matrix.python }}" in (repository / ".github/workflows/conformance.yml").read_text()


def test_it_is_found(repository: Path, environment: dict[str, str]) -> None:
    command = "import sys; from engine.extensions.cli import main; sys.exit(main(['platforms', '--json']))"
    shown = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, check=True)
    (found,) = [p for p in json.loads(shown.stdout)["platforms"] if p["name"] == "mychip"]
    assert (found["status"], found["distribution"]) == ("available", "engine-plugin-mychip")


def test_it_passes_conformance_at_once(repository: Path, environment: dict[str, str]) -> None:
    """The part of the suite that takes seconds, from the vendor's folder."""
    suite = ["--pyargs", "engine_conformance", "--platform=mychip", "-k", "(device or kv_cache) and mychip"]
    shown = run(environment, repository, "pytest", "-q", "-p", "no:cacheprovider", *suite)
    assert int(shown.rpartition(" passed")[0].split()[-1]) >= 15


def test_its_own_test_is_the_suite(repository: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """A platform that cannot be loaded fails it, and the suite's message is there to read."""
    broken = shutil.copytree(repository, tmp_path / "broken")
    (broken / "engine_mychip/platform.py").write_text("raise OSError('no firmware')\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, cwd=broken, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "platform plugin 'mychip' (engine-plugin-mychip 0.1.0): cannot be imported: OSError" in done.stdout


def test_a_later_template_can_be_written_beside_it(environment: dict[str, str], tmp_path: Path) -> None:
    """The name is taken by the plugin itself, which is no reason to refuse it."""
    code = "import sys; from engine.extensions.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["plugin", "new", "mychip", "--directory", str(tmp_path)]
    subprocess.run([sys.executable, "-c", code, *words], env=environment, check=True, capture_output=True)
    assert (tmp_path / "engine-plugin-mychip/README.md").is_file()


def test_triton_is_needed_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_plugin("chip_two", "xpu", triton=True, directory=tmp_path)
    assert tomllib.loads((made / ".engine-plugin.toml").read_text())["triton"] is True
    monkeypatch.syspath_prepend(made)
    monkeypatch.setitem(sys.modules, "triton", None)
    from engine_chip_two import ChipTwoPlatform  # type: ignore[import-not-found]

    assert issubclass(ChipTwoPlatform, TritonPlatform)
    assert check_platform(ChipTwoPlatform, "chip_two") is None
    monkeypatch.delitem(sys.modules, "triton")
    for place, reason in ((None, "Triton is not installed"), (object(), "xpu")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, place=place: place)
        assert reason in ChipTwoPlatform.probe().reason


def test_a_later_template_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing differs at first; then the patch brings back a file that is gone, and undoes a change."""
    made = write_plugin("chip", directory=tmp_path)
    assert main(["plugin", "diff", str(made)]) == 0
    assert capsys.readouterr().out == ""
    before = {path: path.read_text() for path in made.rglob("*") if path.is_file()}
    (made / "tests/test_conformance.py").unlink()
    (made / ".engine-plugin.toml").write_text(before[made / ".engine-plugin.toml"].replace(f"= {TEMPLATE}", "= 0"))
    (made / "engine_chip/platform.py").write_text("# no newline at the end")
    (made / "engine_chip/kernels.py").write_text("mine = 1\n")
    assert main(["plugin", "diff", str(made)]) == 0
    patch = capsys.readouterr().out
    assert f"-template = 0\n+template = {TEMPLATE}\n" in patch
    assert "mine" not in patch
    subprocess.run(["git", "apply", "-"], cwd=made, input=patch, text=True, check=True)
    assert {path: path.read_text() for path in before} == before


def test_a_folder_of_another_origin_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (None, "name = 3", "]"):
        if text is not None:
            (tmp_path / ".engine-plugin.toml").write_text(text)
        assert main(["plugin", "diff", str(tmp_path)]) == 2
        assert "remedy: name a folder that engine plugin new wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "cause", "remedy"),
    [
        (["Chip"], "'Chip' cannot name a plugin", "lower-case letter"),
        (["class"], "'class' cannot name a plugin", "no word of Python's"),
        (["sdk"], "'sdk' cannot name a plugin", "sdk or conformance"),
        (["../chip"], "'../chip' cannot name a plugin", "lower-case letter"),
        (["cpu"], "engine has a platform 'cpu' already", "choose another name"),
        (["torch"], "engine has a platform 'torch' already", "choose another name"),
        (["chip", "--device-type", "xpu:1"], "device type 'xpu:1' is not torch's", "no index"),
        (["chip", "--device-type", "cpu", "--triton"], "no kernels for the host", "leave out --triton"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(
    words: list[str], cause: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugin", "new", *words, "--directory", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert cause in told
    assert remedy in told
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "engine-plugin-chip"
    mine.mkdir()
    assert main(["plugin", "new", "chip", "--directory", str(tmp_path)]) == 2
    assert f"{mine} exists already\nremedy: " in capsys.readouterr().err
    assert list(mine.iterdir()) == []
