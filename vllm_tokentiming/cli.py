"""The command ``vllm-tokentiming``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm_tokentiming.folders import check_tokenizer, tokenizer_fault
from vllm_tokentiming.inspection import SAMPLE, as_text, inspect
from vllm_tokentiming.vocab.chat_template import chat_template
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair
from vllm_tokentiming.vocab.tiktoken_format import fast_tokenizer


def load_vocabulary(name: str) -> Vocabulary:
    """Read a tokenizer without its model.

    Args:
        name: A folder (its ``tokenizer.json`` is enough) or a Hugging Face name.

    Raises:
        ValueError: It cannot be used, and why.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    name = os.path.expanduser(name)
    folder = Path(name)
    try:
        check_tokenizer(name)
        if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # The tokenizers library raises nothing more special.
        raise ValueError(f"cannot load the tokenizer of {name!r}: {tokenizer_fault(name, error)}") from None
    backend = fast_tokenizer(tokenizer)
    if backend is None:
        raise ValueError(
            f"{name!r} ({type(tokenizer).__name__}) has neither a tokenizer.json nor a list as tiktoken's or tekken's; "
            "convert it to a fast tokenizer"
        )
    try:
        head_size = int(getattr(AutoConfig.from_pretrained(name), "vocab_size", 0))
    except Exception:
        head_size = 0  # Without the model's configuration, padding rows of its head are not known.
    return Vocabulary.of(backend, head_size, tokenizer.bos_token_id, tokenizer.eos_token_id, chat_template(tokenizer))


def read_lines(file: Path) -> list[str]:
    """Read a text.

    Args:
        file: Of UTF-8.

    Raises:
        ValueError: There is none, and why.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {str(file)!r}: it is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"cannot read {str(file)!r}: {error.strerror}") from None
    if not lines:
        raise ValueError(f"cannot learn anything from {str(file)!r}: it is empty")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Instead of those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="vllm-tokentiming")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="what a pair of models will be like, from their tokenizers alone")
    command.add_argument("target", help="folder or Hugging Face name")
    command.add_argument("draft", help="folder or Hugging Face name")
    command.add_argument("--text", type=Path, help="a file with text of the kind that will be written")
    command.add_argument("--json", action="store_true", help="as JSON")
    commands.add_parser("doctor", help="whether this installation works, and what to change if it does not")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return _doctor()
    try:
        pair = VocabularyPair.of(load_vocabulary(options.target), load_vocabulary(options.draft))
        texts = read_lines(options.text) if options.text else SAMPLE
    except ValueError as error:
        print(f"vllm-tokentiming: {error}", file=sys.stderr)
        return 1
    found = inspect(pair, [text.encode() for text in texts])
    print(json.dumps(found, indent=1, ensure_ascii=False) if options.json else as_text(found))
    return 0


def _doctor() -> int:
    from vllm_tokentiming.vllm.doctor import diagnosis  # The other commands need no vLLM.

    status = 0
    for passed, sentence in diagnosis():
        print(f"{'ok     ' if passed else 'PROBLEM'}  {sentence}", flush=True)
        status |= not passed
    return status
