"""What is learned is kept between starts, as it was or not at all, and no random number meets weights that know it."""

import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EMBEDDED, load_pair

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft import learned_file
from vllm_tokentiming.draft.learned_file import LearnedWeightsFile, file_name
from vllm_tokentiming.draft.learned_weights import FIRST_SQUARES, LARGEST, LearnedWeights
from vllm_tokentiming.startup_cache import write_arrays

DRAFT, TARGET = 24, 15
FIRST = np.arange(DRAFT) % TARGET


class Kept:
    """The weights of an engine and their file."""

    def __init__(self, path: Path) -> None:
        self.learned = LearnedWeights(SimpleNamespace(first=FIRST), DRAFT, torch.device("cpu"))
        self.warnings: list[str] = []
        self.file = LearnedWeightsFile(path, self.learned, self.warnings.append)

    def learn(self, seed: int, lessons: int = 5) -> "Kept":
        rng = np.random.default_rng(seed)
        for _ in range(lessons):
            draft_probs, p = (rng.dirichlet(np.full(size, 0.3), 2) for size in (DRAFT, TARGET))
            self.learned.learn(*(torch.tensor(probs, dtype=torch.float32) for probs in (draft_probs, p)))
        return self


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "pair.npz"


@pytest.fixture
def clock(monkeypatch):
    """The time that the module sees."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(learned_file, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def wait_for_writer(file: LearnedWeightsFile) -> None:
    file._writing.result(timeout=60)


def test_an_engine_that_goes_on_learns_what_one_that_never_stopped_learns(path):
    before, after = Kept(path).learn(1), Kept(path)
    before.file.keep()
    assert path.stat().st_mode & 0o077 == 0, "it tells what requests were about"
    assert after.file.load()
    assert after.learned.version == before.learned.version == 5
    assert torch.equal(after.learned.state(), before.learned.state()) and after.learned.log_weights.any()
    assert torch.equal(after.learn(2).learned.state(), before.learn(2).learned.state())
    assert after.learned.version == 10 and after.learned.num_lessons == 10
    assert before.warnings == after.warnings == []


def test_nothing_is_read_where_nothing_was_kept_and_nothing_written_where_nothing_was_learned(path):
    kept = Kept(path)
    assert not kept.file.load()
    kept.file.keep()
    assert not path.parent.exists() and kept.warnings == []


def test_what_was_read_is_not_written_again(path):
    Kept(path).learn(1).file.keep()
    kept = Kept(path)
    assert kept.file.load()
    path.unlink()
    kept.file.keep()
    assert not path.exists()


def assert_begins_anew(path):
    kept = Kept(path)
    assert not kept.file.load()
    assert len(kept.warnings) == 1 and str(path) in kept.warnings[0] and "learning begins anew" in kept.warnings[0]
    assert not kept.learned.log_weights.any() and kept.learned.version == 0
    assert torch.equal(kept.learn(1).learned.state(), Kept(path).learn(1).learned.state())
    return kept


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(file.read_bytes()[:400] + b"?" * 50 + file.read_bytes()[450:]),
        lambda file: np.savez(file, version=np.array(3)),
        lambda file: np.savez(file, version=np.array([{}], dtype=object), state=np.zeros((2, DRAFT), np.float32)),
    ],
)
def test_a_damaged_file_costs_a_warning_and_is_replaced(path, damage):
    Kept(path).learn(1).file.keep()
    damage(path)
    assert_begins_anew(path).file.keep()
    assert Kept(path).file.load()


def test_a_folder_in_the_place_of_the_file_costs_two_warnings(path):
    path.mkdir(parents=True)
    kept = assert_begins_anew(path)
    for _ in range(3):
        kept.file.keep()
    assert len(kept.warnings) == 2 and "cannot be kept" in kept.warnings[1]
    assert not list(path.parent.glob("writing-*"))


def state(log_weight=0.5, square=FIRST_SQUARES, size=DRAFT, dtype=np.float32):
    found = np.zeros((2, size), dtype)
    found[1] = FIRST_SQUARES
    found[:, 3] = log_weight, square
    return found


def test_the_state_that_the_next_test_spoils_is_read(path):
    write_arrays(path, {"version": np.array(7), "state": state()})
    kept = Kept(path)
    assert kept.file.load() and kept.learned.version == 7 and kept.learned.log_weights[3] == 0.5


@pytest.mark.parametrize(
    "arrays",
    [
        *({"state": state(log_weight=bad)} for bad in (np.nan, np.inf, -np.inf, LARGEST + 0.01, -LARGEST - 0.01)),
        *({"state": state(square=bad)} for bad in (np.nan, np.inf, 0, -1, 1e9)),
        *({"state": state(size=size)} for size in (4, DRAFT - 1, DRAFT + 1)),
        {"state": state(dtype=np.float64)},
        {"state": state()[0]},
        *({"version": np.array(bad)} for bad in (0, -1, 2**62, 2**63, np.nan)),
        {"version": np.array([1, 2])},
    ],
)
def test_what_nothing_has_ever_learned_is_not_taken(path, arrays):
    write_arrays(path, {"version": np.array(7), "state": state(), **arrays})
    assert_begins_anew(path)


# Writing.


def test_it_is_written_once_a_minute_and_only_after_a_lesson(path, clock):
    kept = Kept(path)
    versions = []
    for _ in range(10):
        kept.learn(1, lessons=1)
        kept.file.keep_in_time()
        if kept.file._writing is not None:
            wait_for_writer(kept.file)
            again = Kept(path)
            assert again.file.load()
            versions.append(again.learned.version)
        clock.seconds += learned_file.SECONDS_BETWEEN / 3
    assert versions == [4, 4, 4, 7, 7, 7, 10]


def test_a_step_does_not_wait_for_the_disk_nor_start_a_second_writer(path, clock, monkeypatch):
    goes_on, written = threading.Event(), []

    def slow(path, arrays):
        assert goes_on.wait(60)
        written.append((int(arrays["version"]), arrays["state"]))

    monkeypatch.setattr(learned_file, "write_arrays", slow)
    kept = Kept(path).learn(1)
    expected = kept.learned.state()
    for _ in range(3):
        clock.seconds += learned_file.SECONDS_BETWEEN
        kept.file.keep_in_time()
        kept.learn(2)
    goes_on.set()
    wait_for_writer(kept.file)
    ((version, found),) = written
    assert version == 5 and np.array_equal(found, expected.numpy()), "it is what there was when the copy was made"


def test_what_is_older_is_not_written_over_what_is_newer(path):
    kept = Kept(path).learn(1)
    older = kept.file._copy()
    kept.learn(2).file.keep()
    kept.file._keep(older)
    again = Kept(path)
    assert again.file.load() and again.learned.version == 10


@pytest.mark.parametrize("remove", [shutil.rmtree, lambda folder: (shutil.rmtree(folder), folder.write_text("x"))])
def test_a_folder_that_is_removed_costs_one_warning_at_most(path, clock, remove):
    kept = Kept(path)
    kept.learn(1).file.keep()
    remove(path.parent)
    for _ in range(4):
        clock.seconds += learned_file.SECONDS_BETWEEN
        kept.learn(2).file.keep_in_time()
        wait_for_writer(kept.file)
    lost = path.parent.is_file()
    assert [str(path) in warning for warning in kept.warnings] == [True] * lost
    if lost:
        path.parent.unlink()
        kept.learn(3).file.keep()
    again = Kept(path)
    assert again.file.load() and again.learned.version == kept.learned.version


def test_engines_that_write_at_once_disturb_nobody(path):
    engines, states = [Kept(path).learn(seed, lessons=seed) for seed in (1, 2, 3)], {}
    for engine in engines:
        states[engine.learned.version] = engine.learned.state()
    engines[0].file.keep()
    stop = threading.Event()

    def write(engine):
        while not stop.is_set():
            engine.file._kept_version = 0
            engine.file.keep()

    writers = [threading.Thread(target=write, args=(engine,)) for engine in engines]
    for writer in writers:
        writer.start()
    found = set()
    end = time.monotonic() + 60
    while len(found) < 3 and time.monotonic() < end:
        reader = Kept(path)
        assert reader.file.load(), reader.warnings
        assert torch.equal(reader.learned.state(), states[reader.learned.version])
        found.add(reader.learned.version)
    stop.set()
    for writer in writers:
        writer.join()
    assert found == set(states)
    assert not any(engine.warnings for engine in engines) and not list(path.parent.glob("writing-*"))


# Names.


def test_each_pair_has_a_name_of_its_own():
    pair, swapped = load_pair(*EMBEDDED), load_pair(*EMBEDDED[::-1])
    transducer = Transducer(pair)
    size = pair.draft.token_bytes.size
    models = ("target", None, "draft", None)
    first = transducer.first.copy()
    first[np.flatnonzero(first >= 0)[0]] += 1
    names = [
        file_name(pair, transducer, size, models),
        file_name(pair, transducer, size, ("target", None, "other draft", None)),
        file_name(pair, transducer, size, ("target", None, "draft", "a revision")),
        file_name(pair, transducer, size + 1, models),
        file_name(pair, SimpleNamespace(first=first), size, models),
        file_name(swapped, transducer, size, models),
    ]
    assert len(set(names)) == len(names)
    assert file_name(load_pair(*EMBEDDED), Transducer(pair), size, models) == names[0]
