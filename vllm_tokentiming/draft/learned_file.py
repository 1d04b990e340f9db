"""Keeps what was learned between starts, in one file for each pair of models.

**No number twice.** Weights of a version were learned from the draft's numbers of smaller versions, and from the
target's numbers after starts from smaller versions, whichever engines drew them, and whichever wrote the file last. So
the version is part of the file, the next engine goes on from it, and the target's seed depends on it
(``docs/theory.md``).

**Never in the way.** A step copies the weights, on their device, and a thread waits for that and writes. A file that
cannot be read or written costs a warning.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft.learned_weights import LearnedWeights
from vllm_tokentiming.startup_cache import read_arrays, write_arrays
from vllm_tokentiming.vocab.pair import VocabularyPair

SECONDS_BETWEEN = 60.0  # Two times of writing. An engine that is killed loses what it has learned since.


class _Copy(NamedTuple):
    """What is to be written: its version, ``LearnedWeights.state``, and what tells that a device has made it."""

    version: int
    state: torch.Tensor
    made: torch.Event | None


class LearnedWeightsFile:
    """The file of one pair.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path, learned: LearnedWeights, warn: Callable[[str], None]) -> None:
        """Name a file. Nothing is read or written yet.

        Args:
            path: Where it is, or will be.
            learned: What is kept in it.
            warn: Told, in a sentence, about a file that cannot be read, or that cannot be written, the first time.
        """
        self.path = path
        self._learned, self._warn = learned, warn
        self._kept_version, self._kept_at = learned.version, time.monotonic()
        # Its thread stays: a new one would make the step wait for its beginning.
        self._executor = ThreadPoolExecutor(1, "tokentiming-learned")
        self._writing: Future[None] | None = None
        # Garbage may be collected, and a drafter with it, while a writer of its own has the lock.
        self._lock = threading.RLock()
        self._told = False

    def load(self) -> bool:
        """Go on from what the file has, if there is one that can be read.

        Returns:
            Whether there is.
        """
        try:
            arrays = read_arrays(self.path)
            self._learned.restore(int(arrays["version"]), torch.from_numpy(arrays["state"]))
        except FileNotFoundError:
            return False
        except Exception as error:  # Whatever a damaged archive makes its reader raise.
            self._warn(f"{self.path} holds nothing that this pair has learned ({error}); learning begins anew.")
            return False
        self._kept_version = self._learned.version
        return True

    def keep_in_time(self) -> None:
        """Have what was learned written, without waiting for it, unless that was done a short time ago."""
        now = time.monotonic()
        if now - self._kept_at < SECONDS_BETWEEN or (self._writing is not None and not self._writing.done()):
            return
        self._kept_at = now
        self._writing = self._executor.submit(self._keep, self._copy())

    def keep(self) -> None:
        """Write what was learned since the last time, and wait for it."""
        self._keep(None)

    def _copy(self) -> _Copy:
        state, made = self._learned.state(), None
        if state.device.type != "cpu":
            made = torch.Event(state.device.type)
            made.record()
        return _Copy(self._learned.version, state, made)

    def _keep(self, copy: _Copy | None) -> None:
        """Write a copy, by default of what is learned now."""
        try:
            with self._lock:
                copy = copy or self._copy()
                if copy.version <= self._kept_version:
                    return
                if copy.made is not None:
                    copy.made.synchronize()
                state = copy.state.cpu().numpy()
                write_arrays(self.path, {"version": np.array(copy.version, np.int64), "state": state})
                self._kept_version = copy.version
        except Exception as error:  # Nobody waits for a thread, nor for what is done at the end.
            if not self._told:
                self._told = True
                self._warn(f"what is learned cannot be kept in {self.path} ({error}); it may be lost at the end.")


def file_name(pair: VocabularyPair, transducer: Transducer, draft_size: int, models: Iterable[str | None]) -> str:
    """Return the name of a pair's file: a digest of what the weights depend on.

    Not of our code nor of the libraries, so that what was learned outlives an upgrade.

    Args:
        pair: The vocabularies.
        transducer: The pair's transducer.
        draft_size: Columns of the draft's logits.
        models: Names and revisions of target and draft.
    """
    # A number to raise when the weights come to mean something else.
    digest = hashlib.sha256(repr(("learned weights, 1", draft_size, *models)).encode())
    digest.update(transducer.first.tobytes())
    for side in (pair.target.token_bytes, pair.draft.token_bytes):
        digest.update(repr((side.size, sorted(side.special.items()))).encode())
        digest.update(side.lengths.tobytes())
        digest.update(b"".join(piece or b"" for piece in side.pieces))
    return f"{digest.hexdigest()}.npz"
