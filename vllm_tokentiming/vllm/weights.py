"""Checks that the weight files of a model are there and whole, and adds up the memory that they need.

Only headers are read. A name on the Hugging Face hub is left to vLLM, which downloads what is missing.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_tokentiming.folders import is_pointer

# What vLLM looks for, by load format, in its order: only files of the first kind that is there are loaded
# (`DefaultModelLoader._prepare_weights`, 0.32 and 0.33).
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "auto": ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.pt"),
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
}
# Which of these files are loaded, if the folder has such a list.
_INDEXES = {
    "consolidated*.safetensors": "consolidated.safetensors.index.json",
    "*.safetensors": "model.safetensors.index.json",
    "*.bin": "pytorch_model.bin.index.json",
}
_HEADER_LENGTH = 8  # Bytes of the number that a safetensors file begins with.
_LONGEST_HEADER = 100_000_000  # Bytes; the format's own limit.
# Data types that are loaded in the model's own.
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def check_weights(folder: Path, load_format: str = "auto") -> list[Path]:
    """Look for the weights of a model.

    Args:
        folder: The model's.
        load_format: vLLM's, a key of ``PATTERNS``.

    Returns:
        The files that vLLM would load.

    Raises:
        ValueError: Some are missing or not whole; the second half of a sentence.
    """
    patterns = PATTERNS[load_format]
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        index = folder / _INDEXES.get(pattern, "")
        shards = _shards(index) if index.is_file() else []
        if files and shards:
            if missing := [name for name in shards if not (folder / name).is_file()]:
                some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
                raise ValueError(f"of the {len(shards)} files in its {index.name}, {len(missing)} are missing: {some}")
            files = [folder / name for name in shards]
        if files:
            for file in files:
                _check_file(file)
            return files
    raise ValueError(f"there are no weights in that folder ({', '.join(patterns)})")


def weight_bytes(files: Iterable[Path], itemsize: float, skip: frozenset[str] = frozenset()) -> int:
    """Memory that weights take at least, once they are loaded.

    Args:
        files: From ``check_weights``; only safetensors files count.
        itemsize: Bytes of a number in the model's data type. What is smaller in the file stays so.
        skip: Names of tensors that are not loaded.
    """
    total = 0.0
    for file in files:
        if file.suffix != ".safetensors":
            continue
        for name, tensor in _header(file).items():
            if name == "__metadata__" or name in skip:
                continue
            begin, end = tensor["data_offsets"]
            numbers = math.prod(tensor["shape"]) * itemsize
            total += min(numbers, end - begin) if tensor["dtype"] not in _FLOATS else numbers
    return int(total)


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"its {index.name} cannot be read; perhaps it was not copied whole") from None


def _check_file(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        beginning = opened.read(32)
    if is_pointer(beginning):
        raise ValueError(f"its {file.name} is a pointer of Git LFS, not the file itself; run `git lfs pull` there")
    if file.suffix == ".safetensors":
        header = _header(file)
        length = int.from_bytes(beginning[:_HEADER_LENGTH], "little")
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        expected = _HEADER_LENGTH + length + max(ends, default=0)
        if size != expected:
            raise ValueError(f"its {file.name} has {size:,} bytes and should have {expected:,}; copy it again")
    elif size == 0 or (beginning.startswith(b"PK") and not zipfile.is_zipfile(file)):  # PyTorch writes ZIP files.
        raise ValueError(f"its {file.name} is cut short; copy it again")


def _header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: ``dtype``, ``shape`` and ``data_offsets`` of each tensor."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_HEADER_LENGTH), "little")
        content = opened.read(length) if length <= _LONGEST_HEADER else b""
    try:
        header: dict[str, Any] = json.loads(content)
        for name, tensor in header.items():
            if name != "__metadata__":
                _ = tensor["dtype"], tensor["shape"], tensor["data_offsets"][1]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"its {file.name} is cut short or no safetensors file; copy it again") from None
    return header
