"""The wheel and the sdist hold all that they must, and nothing that would pollute an environment."""

import ast
import configparser
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from engine.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [ROOT / path for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
DIST_INFO = f"engine-{__version__}.dist-info"

Contents = dict[str, bytes]


def build(target: str, source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (made,) = folder.iterdir()
    return made


def read_wheel(path: Path) -> Contents:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return read_wheel(build("wheel", ROOT, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"engine-{__version__}"


def test_wheel_has_the_packages_and_nothing_beside_them(wheel: Contents) -> None:
    assert {name.split("/")[0] for name in wheel} == {package.name for package in PACKAGES} | {DIST_INFO}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_wheel_has_every_file_of_a_package(wheel: Contents, package: Path) -> None:
    files = {f"{path.relative_to(package.parent)}" for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {f"{package.name}/__init__.py", f"{package.name}/py.typed"} <= files
    assert files <= set(wheel)


def test_wheel_has_the_demo_model(wheel: Contents) -> None:
    files = {name.removeprefix("engine/demo_model/") for name in wheel if name.startswith("engine/demo_model/")}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= files
    assert any(name.endswith(".safetensors") for name in files)


def test_wheel_has_the_licences_and_the_version(wheel: Contents) -> None:
    metadata = Parser().parsestr(wheel[f"{DIST_INFO}/METADATA"].decode())
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    for path in PROJECT["project"]["license-files"]:
        assert wheel[f"{DIST_INFO}/licenses/{path}"] == (ROOT / path).read_bytes()


def test_entry_points_name_what_is_there(wheel: Contents) -> None:
    declared = configparser.ConfigParser(delimiters="=")
    declared.read_string(wheel[f"{DIST_INFO}/entry_points.txt"].decode())
    assert {"console_scripts", "engine.platforms", "pytest11"} <= set(declared.sections())
    for group in declared.sections():
        for name, target in declared[group].items():
            module, _, attribute = target.partition(":")
            path = module.replace(".", "/")
            source = wheel.get(f"{path}.py") or wheel.get(f"{path}/__init__.py")
            assert source is not None, f"{group} {name}: no module {module}"
            assert not attribute or attribute in names_bound_by(source), f"{group} {name}: no {attribute} in {module}"


def names_bound_by(source: bytes) -> set[str]:
    """Names that a module's top level defines or imports."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Contents, tmp_path: Path) -> None:
    again = read_wheel(build("wheel", sdist, tmp_path))
    assert again == wheel


def test_sdist_has_what_a_packager_needs(sdist: Path) -> None:
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "tests/test_packaging.py", "scripts/test", "docs/index.md"):
        assert (sdist / name).is_file()


def test_changelog_has_the_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_installed_metadata_is_of_this_checkout() -> None:
    for group, declared in PROJECT["project"]["entry-points"].items():
        installed = {point.name: point.value for point in entry_points(group=group)}
        assert declared.items() <= installed.items(), f"run scripts/setup again: what is installed of {group} is older"
