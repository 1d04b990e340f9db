"""Lays the Python code of another vLLM over the compiled parts of the installed CPU build.

    python scripts/overlay_vllm.py 0.33.0 DIR --also orjson    # or `newest`, which is what the package index has
    PYTHONPATH=DIR python -m pytest

For versions that have no CPU build (yet): the tests then run on their code, as far as it can do with those compiled
parts. DIR comes before the installed packages; nothing that is installed changes. With 0.33.0, all pass but the one
with two data-parallel engines, which vLLM itself does not start there.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    """Download, unpack, and put the compiled parts beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of vllm on the package index, or `newest`")
    parser.add_argument("folder", type=Path, help="to write to; must not exist")
    parser.add_argument("--also", nargs="*", default=[], help="packages that it needs and the installed one does not")
    options = parser.parse_args()
    installed = Path(str(distribution("vllm").locate_file("vllm")))
    options.folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloads:
        download = ["download", "--no-deps", "--only-binary", ":all:", "--dest", downloads]
        wanted = "vllm" if options.version == "newest" else f"vllm=={options.version}"
        subprocess.run([sys.executable, "-m", "pip", *download, wanted], check=True)
        (file,) = Path(downloads).glob("*.whl")
        version = file.name.split("-")[1]
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(options.folder, [name for name in wheel.namelist() if not name.endswith(".so")])
    if options.also:
        target = ["--quiet", "--no-deps", "--target", str(options.folder)]
        subprocess.run([sys.executable, "-m", "pip", "install", *target, *options.also], check=True)
    for compiled in installed.glob("*.so"):
        shutil.copy2(compiled, options.folder / "vllm")
    # By this name vLLM knows that it is a CPU build.
    about = options.folder / f"vllm-{version}.dist-info"
    line = f"Version: {version}"
    (about / "METADATA").write_text((about / "METADATA").read_text().replace(line, f"{line}+cpu", 1))
    about.rename(options.folder / f"vllm-{version}+cpu.dist-info")


if __name__ == "__main__":
    main()
