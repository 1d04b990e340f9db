"""Checks of a model's folder, made before anything is loaded from it.

transformers and vLLM take what is no folder for a name on the Hugging Face hub, and then say what is wrong with the
name. The checks here say what is wrong with the folder. Names on the hub are left to vLLM.

Every ``ValueError`` from here is the second half of a sentence, without its full stop.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vllm_tokentiming.config import reason

# vLLM reads a model's configuration from one of these; the second is Mistral's own.
_CONFIGS = ("config.json", "params.json")
_ONLY_SETTINGS = frozenset({"tokenizer_config.json", "special_tokens_map.json"})
_LFS_POINTER = b"version https://git-lfs"


def local_folder(name: str) -> Path | None:
    """Return the folder that a model's name stands for.

    Args:
        name: A folder, a name on the Hugging Face hub, or a URL.

    Returns:
        The folder; ``None`` if the name is for vLLM to resolve.

    Raises:
        ValueError: It can only be a folder, and there is none.
    """
    if name != name.strip():
        raise ValueError("the name begins or ends with a blank")
    if not name:
        raise ValueError("the name is empty")
    if "://" in name:
        return None
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"this is a file; name the folder that it is in, {str(path.parent)!r}")
    # A name on the hub is one word, or two with a slash between them.
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ValueError("there is no such folder")
    return None


def check_writable(folder: Path) -> None:
    """Make a folder if there is none, and write into it.

    Args:
        folder: A folder.

    Raises:
        ValueError: One of the two fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from None


def check_config(folder: Path) -> None:
    """Look for the configuration of a model.

    Args:
        folder: The model's.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    config = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    if config is None:
        raise ValueError("there is no config.json in that folder")
    if not isinstance(_read_json(config), dict):
        raise ValueError(f"its {config.name} is not a JSON object")


def check_tokenizer(name: str) -> None:
    """Look for a tokenizer, without reading it.

    Args:
        name: See ``local_folder``.

    Raises:
        ValueError: There is none.
    """
    folder = local_folder(name)
    if folder is not None and not any(_may_be_tokenizer(path.name) for path in folder.iterdir()):
        raise ValueError("the folder has none; put a tokenizer.json into that folder")


def tokenizer_fault(name: str, error: Exception) -> str:
    """Say why a tokenizer could not be loaded.

    Args:
        name: See ``local_folder``.
        error: What was raised; its folder may tell more.

    Returns:
        The second half of a sentence, without its full stop.
    """
    try:
        check_tokenizer(name)
        folder = local_folder(name)
        if folder is None:
            return f"this is no folder here, and as a Hugging Face name it failed{offline()}: {reason(error)}"
        file = folder / "tokenizer.json"
        if file.is_file():
            _read_json(file)
            try:
                Tokenizer.from_file(str(file))
            except Exception as of_file:  # The library raises nothing more special.
                return f"its tokenizer.json does not describe a tokenizer ({of_file})"
    except ValueError as of_folder:
        return str(of_folder)
    return reason(error)


def offline() -> str:
    """Return what to add to an error about a name on the hub; nothing, unless the hub is not asked."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("0", "", "false", "no", "off"):
        return ""
    return " (HF_HUB_OFFLINE is set, so that only what has been downloaded before is found)"


def is_pointer(beginning: bytes) -> bool:
    """Return whether a file that begins so is a pointer of Git LFS, which stands for the file itself."""
    return beginning.startswith(_LFS_POINTER)


def _may_be_tokenizer(file_name: str) -> bool:
    name = file_name.lower()
    if name in _ONLY_SETTINGS:
        return False
    # Code of the model's own may find its tokenizer anywhere.
    return "tok" in name or "vocab" in name or name.endswith((".model", ".tiktoken", ".py")) or name == "tekken.json"


def _read_json(file: Path) -> Any:
    content = file.read_bytes()
    if is_pointer(content):
        raise ValueError(f"its {file.name} is a pointer of Git LFS, not the file itself; run `git lfs pull` there")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        why = f"{error.msg}: line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError:
        why = "it is not UTF-8 text"
    raise ValueError(f"its {file.name} is not valid JSON ({why}); perhaps it was not copied whole")
