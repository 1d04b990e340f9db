"""Vocabularies and texts for the tests; what is not in the repository is found through `TOKENTIMING_DATA`.

That variable names a folder with `tokenizers/NAME/tokenizer.json`, `multilingual/`, `prompts/` and
`corpus/`. A test that needs something from there is skipped where it is absent; the embedded pair of
`examples/models` always runs.

Property tests try the same examples every time, so that what fails is the change at hand; `TOKENTIMING_SEARCH=20`
lets them search: others each time, and 20 times as many.
"""

import fcntl
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from front_end import front_end  # noqa: F401
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair
from vllm_tokentiming.vocab.token_bytes import TokenBytes

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "examples" / "models"
# For `benchmarks`. Last, since the package itself may be tested from another folder (`make test-kernels`).
sys.path.append(str(ROOT))
EMBEDDED = ("embedded_target", "embedded_draft")
EXACT = (*EMBEDDED, "gpt2", "gpt_neox_20b", "llama2", "llama3", "qwen2.5", "mistral_tekken")
LOSSY = ("t5_small", "bert")

# For tests that take minutes and whose parts others test, too.
longer = pytest.mark.skipif(not os.environ.get("TOKENTIMING_ALL"), reason="make test ALL=1 runs it, for minutes more")

_SEARCH = int(os.environ.get("TOKENTIMING_SEARCH", 0))

# Without this, a failed assert of these modules would not say what differed.
pytest.register_assert_rewrite("context_follower", "encoders")


# Files that compile real models take longest; with several workers, they have to begin first.
_LONGEST = tuple(
    f"test_engine_{name}"
    for name in (
        "exactness",
        "v2_output",
        "v2_lifecycle",
        "v2_proposals",
        "defaults",
        "published",  # Not the first: its models may still be made.
        "targets",
        "patches",
        "lifecycle",
        "parallel",
        "sampling",
        "greedy",
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that take longest first."""
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(_LONGEST)))


def examples(number: int) -> settings:
    """Settings of a property test: so many examples, the same every time; many times more to search."""
    return settings(max_examples=number * (_SEARCH or 1), derandomize=not _SEARCH, deadline=None)


settings.register_profile("tests", examples(100))
settings.load_profile("tests")


def shared_data() -> Path | None:
    """The folder of shared data, or `None` where there is none."""
    folder = Path(os.environ.get("TOKENTIMING_DATA") or "/nonexistent")
    return folder if folder.is_dir() else None


def need(*parts: str) -> Path:
    """A path in the shared data; skips the test where it is absent."""
    folder = shared_data()
    if folder is None:
        pytest.skip("TOKENTIMING_DATA names no folder with shared data")
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the shared data has no {'/'.join(parts)}")
    return path


def published(*names: str) -> list[Path]:
    """The folders of published models (`examples/published_models.py`); skips the test where one is absent.

    Waits for them if they are being made.
    """
    folder = Path(os.environ.get("TOKENTIMING_PUBLISHED") or "/nonexistent")
    if (folder / ".lock").exists():
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
    if absent := [name for name in names if not (folder / name).is_dir()]:
        pytest.skip(f"TOKENTIMING_PUBLISHED names no folder with the published model {absent[0]}")
    return [folder / name for name in names]


def cases(names):
    """Parameters of a test, each a tokenizer's name or several; skipped where the shared data is absent."""
    absent = pytest.mark.skip(reason="TOKENTIMING_DATA names no folder with shared data")
    needed = {case: {case} if isinstance(case, str) else set(case) for case in names}
    present = {case for case in names if shared_data() or needed[case] <= set(EMBEDDED)}
    return [pytest.param(case, marks=() if case in present else absent) for case in names]


@cache
def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by its name in `EXACT` or `LOSSY`; do not change it."""
    if name in EMBEDDED:
        path = MODELS / name.removeprefix("embedded_") / "tokenizer.json"
    else:
        path = need("tokenizers", name, "tokenizer.json")
    return Tokenizer.from_file(str(path))


@cache
def _without_special_text(name: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(load_tokenizer(name).to_str())
    tokenizer.encode_special_tokens = True
    return tokenizer


def own_ids(name: str, text: str) -> list[int]:
    """What a tokenizer itself makes of a text from its beginning, in which nothing is special."""
    return _without_special_text(name).encode(text, add_special_tokens=False).ids


@cache
def load_vocabulary(name: str) -> Vocabulary:
    """The vocabulary of `load_tokenizer(name)`."""
    return Vocabulary.of(load_tokenizer(name))


@cache
def load_pair(target: str, draft: str) -> VocabularyPair:
    """Two vocabularies by their names."""
    return VocabularyPair.of(load_vocabulary(target), load_vocabulary(draft))


@dataclass(frozen=True)
class Embedded:
    """The pair of small models in the repository: the folder of each, and the pair of their vocabularies."""

    target: Path
    draft: Path
    pair: VocabularyPair


@pytest.fixture(scope="session")
def embedded() -> Embedded:
    return Embedded(MODELS / "target", MODELS / "draft", load_pair(*EMBEDDED))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of shared data; skips where it is absent."""
    return need()


@pytest.fixture(scope="session")
def languages() -> dict[str, str]:
    """A text in each of the files of the shared data, by the file's name; skips where they are absent."""
    files = sorted(need("multilingual").rglob("*.txt"))
    return {path.stem + " of " + path.parent.name: path.read_text(encoding="utf-8") for path in files}


# Text that has broken tokenizers before: combining marks, right to left, joined emoji, the mark that
# SentencePiece writes for a space, what looks like special tokens, and long runs of one thing.
fragments = st.sampled_from(
    [
        *(
            "a",
            "B",
            " ",
            "  ",
            "\n",
            "\r\n",
            "\t",
            "1",
            "2024",
            "'ll",
            ".",
            "don't ",
            " the",
            "def f(x):\n  ",
        ),
        *("e\u0301", "é", "\u0308", "ﬁ", "Ａ", "İ", "שָׁלוֹם ", "مرحبا ", "\u202eabc", "हिन्दी", "ไทย", "한국어"),
        *("日本語", "。", "🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "\U0001d518", "\x00", "\x7f", "\ufeff", "\u200b"),
        *("\u00a0", "\uffff", "▁", "▁▁", "Ġ", "<s>", "</s>", "<unk>", "[UNK]", "<0x41>"),
        *("<|endoftext|>", "<|im_start|>", "<|eot_id|>", "<tool_call>", "<tool_ca"),
        *(" " * 30, "\n" * 9, "x" * 40, "=" * 33),
    ]
)
texts = st.lists(fragments | st.text(max_size=4), max_size=12).map("".join)
data_bytes = st.lists(st.binary(max_size=6) | texts.map(str.encode), max_size=4).map(b"".join)


def spellable(token_bytes: TokenBytes, data: bytes) -> bytes:
    """What is left of some bytes in a vocabulary that has not all 256."""
    missing = bytes(byte for byte, token_id in enumerate(token_bytes.byte_ids()) if token_id < 0)
    return data.translate(None, missing)
