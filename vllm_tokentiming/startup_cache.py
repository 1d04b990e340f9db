"""Keeps between starts what depends on tokenizers alone: vocabularies, and what each draft token makes of the target's.

Reading a vocabulary of 262,144 entries takes seconds, in the front end and in every worker, and writing each of its
entries in the other vocabulary takes seconds more. Both are the same at every start.

**Never stale.** The name of an entry is a digest of all that the entry comes from: the content of the tokenizer's
files, the code of this package, and the versions of the libraries that read tokenizers. What changes has another name.

**Never half.** An entry is written under a passing name and then renamed, so that engines that start at the same time
disturb nobody. The archive has a checksum for each of its parts. An entry that cannot be read counts as absent, and is
written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.folders import local_folder
from vllm_tokentiming.vocab.encoder import Encoder, LossyEncoder
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair
from vllm_tokentiming.vocab.special_tokens import SpecialTokens
from vllm_tokentiming.vocab.token_bytes import TokenBytes, VocabularyKind

Arrays = dict[str, npt.NDArray[Any]]
Made = TypeVar("Made")

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack"})
# A repository on the hub has one of these where transformers has downloaded a tokenizer from it.
_ON_HUB = ("tokenizer.json", "tokenizer_config.json", "tekken.json", "tokenizer.model")


class StartupCache:
    """Entries in a folder, each a few arrays under the name of what they come from.

    Attributes:
        folder: Where they are.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        """Use a folder.

        Args:
            folder: Made when the first entry is kept; may be removed at any time.
            warn: Told, in a sentence, about an entry that cannot be read or kept. The work is then done without it.
        """
        self.folder = folder
        self._warn = warn

    def load(self, digest: str) -> Arrays | None:
        """Read an entry.

        Args:
            digest: Its name.

        Returns:
            Its arrays; ``None`` where there is none, or none that can be read.
        """
        file = self._file(digest)
        try:
            return read_arrays(file)
        except FileNotFoundError:
            return None
        except Exception as error:  # Whatever a damaged archive makes its reader raise.
            self._warn(f"{file} cannot be read ({error}); it is made anew.")
            return None

    def keep(self, digest: str, arrays: Arrays) -> None:
        """Write an entry.

        Args:
            digest: Its name.
            arrays: Its content.
        """
        try:
            write_arrays(self._file(digest), arrays)
        except OSError as error:
            self._warn(f"nothing can be kept in {self.folder} ({error}); the next start takes as long as this one.")

    def _made(self, digest: str, what: str, make: Callable[[Arrays], Made]) -> Made | None:
        """Make something from an entry; ``None`` where there is no entry, or none that it can be made from."""
        arrays = self.load(digest)
        if arrays is None:
            return None
        try:
            return make(arrays)
        except Exception as error:  # As in ``load``.
            self._warn(f"{self._file(digest)} holds no {what} ({error}); it is made anew.")
            return None

    def _file(self, digest: str) -> Path:
        return self.folder / f"{digest}.npz"

    # Vocabularies.

    def vocabulary(self, digest: str, head_size: int) -> Vocabulary | None:
        """Read a vocabulary. Its tokenizer is not made before something is encoded.

        Args:
            digest: See ``tokenizer_digest``.
            head_size: Rows of the model's head; 0 if unknown.
        """
        return self._made(digest, "vocabulary", lambda arrays: _vocabulary(arrays, digest, head_size))

    def keep_vocabulary(
        self, digest: str, tokenizer: Any, vocabulary: Vocabulary, bos_id: int | None, eos_id: int | None
    ) -> None:
        """Write a vocabulary.

        Args:
            digest: See ``tokenizer_digest``.
            tokenizer: The ``tokenizers.Tokenizer`` that it was read from.
            vocabulary: What was read.
            bos_id: What it was read with (``Vocabulary.of``).
            eos_id: So.
        """
        try:
            described = tokenizer.to_str()
        except Exception:  # A part of it is written in Python, and cannot be described.
            return
        pieces = vocabulary.token_bytes.pieces
        facts = {
            "kind": vocabulary.token_bytes.kind.value,
            "special": list(vocabulary.token_bytes.special.items()),
            "roles": [bos_id, eos_id],
            "turns": dict(vocabulary.turns),
            "added": vocabulary.added,
            "exact": vocabulary.exact,
            "side_by_side": "".join(sorted(vocabulary.encoder.side_by_side or ())),
        }
        arrays: Arrays = {
            "facts": _as_array(json.dumps(facts).encode()),
            "tokenizer": _as_array(described.encode()),
            "pieces": _as_array(b"".join(piece or b"" for piece in pieces)),
            "lengths": np.array([-1 if piece is None else len(piece) for piece in pieces], np.int32),
        }
        self.keep(digest, arrays)

    # Transducers.

    def transducer(self, pair: VocabularyPair, *, one_to_one: bool = False) -> Transducer:
        """Read a transducer, or make it and keep it.

        Args:
            pair: The vocabularies; nothing is kept unless both have digests.
            one_to_one: See ``Transducer``.
        """
        if not (pair.target.digest and pair.draft.digest):
            return Transducer(pair, one_to_one=one_to_one)
        sizes = pair.target.token_bytes.size, pair.draft.token_bytes.size
        crossing = repr((sizes, sorted(pair.special.to_target.items()), one_to_one))
        digest = _digest_of("transducer", pair.target.digest, pair.draft.digest, crossing)
        kept = self._made(digest, "transducer", lambda arrays: Transducer(pair, one_to_one=one_to_one, stored=arrays))
        if kept is not None:
            return kept
        transducer = Transducer(pair, one_to_one=one_to_one)
        self.keep(digest, transducer.to_arrays())
        return transducer


def read_arrays(file: Path) -> Arrays:
    """Read a file of arrays. One that was damaged makes numpy raise any kind of error."""
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def write_arrays(file: Path, arrays: Arrays) -> None:
    """Write a file of arrays under a passing name, then rename it: there never is half a file.

    Args:
        file: Its folder is made if there is none.
        arrays: Its content.

    Raises:
        OSError: It cannot be written. What was there before stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    passing = tempfile.NamedTemporaryFile(dir=file.parent, prefix="writing-", delete=False)  # noqa: SIM115
    try:
        with passing:
            np.savez(passing, allow_pickle=False, **arrays)
        os.replace(passing.name, file)
    except BaseException:
        Path(passing.name).unlink(missing_ok=True)
        raise


def tokenizer_digest(name: str, revision: str | None, loaded_by: str) -> str | None:
    """Return the name of a vocabulary's entry.

    Args:
        name: A folder, or a name on the Hugging Face hub.
        revision: Of the latter.
        loaded_by: What else decides how a tokenizer is loaded from its files: the loader, its version, its settings.

    Returns:
        The digest; ``None`` where the files are not here, or cannot be read.
    """
    try:
        folder = local_folder(name) or _on_hub(name, revision)
        if folder is None:
            return None
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix not in _WEIGHTS)
        contents = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    except (OSError, ValueError):  # The tokenizer's loader says it better.
        return None
    return _digest_of("vocabulary", loaded_by, *contents)


def _on_hub(name: str, revision: str | None) -> Path | None:
    """Return the folder that the hub's client keeps a downloaded repository in."""
    for file in _ON_HUB:
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _digest_of(*parts: str) -> str:
    return hashlib.sha256("\n".join((_code_digest(), *parts)).encode()).hexdigest()


@cache
def _code_digest() -> str:
    """Return a digest of all that reads tokenizers: this package's code, and the libraries."""
    code = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(f"{version('tokenizers')} {version('transformers')}".encode())
    for file in code:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _vocabulary(arrays: Arrays, digest: str, head_size: int) -> Vocabulary:
    facts = json.loads(arrays["facts"].tobytes())
    data, lengths = arrays["pieces"].tobytes(), arrays["lengths"]
    ends = np.cumsum(np.maximum(lengths, 0)).tolist()
    pieces = {
        token_id: data[end - length : end]
        for token_id, (end, length) in enumerate(zip(ends, lengths.tolist(), strict=True))
        if length >= 0
    }
    if len(data) != (ends[-1] if ends else 0):
        raise ValueError("lengths and bytes do not fit")
    special = {int(token_id): text for token_id, text in facts["special"]}
    token_bytes = TokenBytes(pieces, special, VocabularyKind(facts["kind"]), head_size)
    pairs = facts["side_by_side"]
    side_by_side = {pairs[start : start + 2] for start in range(0, len(pairs), 2)}
    described = arrays["tokenizer"]

    def encoder() -> Encoder:
        made = Encoder if facts["exact"] else LossyEncoder
        return made(Tokenizer.from_str(described.tobytes().decode()), token_bytes, side_by_side)

    return Vocabulary(
        token_bytes,
        encoder,
        facts["exact"],
        SpecialTokens.of(token_bytes, *facts["roles"]),
        facts["turns"],
        tuple(facts["added"]),
        digest,
    )


def _as_array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
