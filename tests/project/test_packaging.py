"""What users get: the archive of the sources can be built and installed, and the command runs from it, without vLLM.

Everything is built in a copy of the tree, offline, with the tools of the environment that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import MODELS

ROOT = Path(__file__).resolve().parents[2]
# What is built, and what is large and belongs to no package.
_LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "*.so", "*.c", "__pycache__", "benchmarks", "examples"
)
SOURCES = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.p[yx]*")}
TYPES = {str(path.relative_to(ROOT)) for path in ROOT.glob("vllm_tokentiming/**/*.pyi")}
# Each compiled module has a file of types beside it.
KERNELS = sorted(name.removesuffix(".pyi") for name in TYPES)
# What `pip` and `build` call, once instead of several times.
_BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """What a command prints; the environment has no ``PYTHONPATH``, which would lead to this tree."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=_LEFT_OUT)
    name = run(sys.executable, "-c", _BUILD, "build_sdist", folder, folder=folder / "tree").splitlines()[-1]
    return folder / name


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (sources,) = (path for path in folder.iterdir() if path.is_dir())
    name = run(sys.executable, "-c", _BUILD, "build_wheel", folder, folder=sources).splitlines()[-1]
    return folder / name


def test_the_archive_of_the_sources_has_what_a_build_needs_and_nothing_that_was_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "vllm_tokentiming/py.typed"}
    assert KERNELS and needed | SOURCES | TYPES <= names
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("vllm_tokentiming/**/*.py")} <= names
    assert not [name for name in names if name.endswith((".c", ".so")) or name.startswith("tests")]


def test_the_wheel_has_the_package_its_types_and_its_licence_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("vllm_tokentiming/**/*.py")}
    kernels = {name for name in names if name.endswith(".so")}
    assert sorted(name.partition(".")[0] for name in kernels) == KERNELS
    of_package = {name for name in names if ".dist-info/" not in name and not name.endswith(".so")}
    assert of_package == modules | TYPES | {"vllm_tokentiming/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_command_runs_from_the_wheel_without_a_compiler_and_without_vllm(wheel, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, folder=tmp_path)
    python = venv / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip())
    # What the package needs, of the environment that runs the tests; its own `.pth` files are not read, so that the
    # package itself is not found through them.
    site.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    site.joinpath("vllm").mkdir()
    site.joinpath("vllm", "__init__.py").write_text('raise ImportError("there is no vLLM")\n')
    bare = {"PATH": str(venv / "bin"), "CC": "/nonexistent/cc", "HF_HUB_OFFLINE": "1"}
    install = ("install", "--no-deps", "--no-index", "--no-cache-dir", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, folder=tmp_path, **bare)

    for kernel in KERNELS:
        code = f"import importlib; print(importlib.import_module({kernel.replace('/', '.')!r}).__file__)"
        assert Path(run(python, "-c", code, folder=tmp_path, **bare)).is_relative_to(venv)
    command = venv / "bin" / "vllm-tokentiming"
    told = run(command, "inspect", MODELS / "target", MODELS / "draft", folder=tmp_path, **bare)
    assert "byte-exact" in told and "<|endoftext|> = </s>" in told
