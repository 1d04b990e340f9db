"""A step of drafting on a stub in the place of the draft model: no vLLM, no weights, milliseconds.

The stub knows a text. After any number of its tokens it favours the next one, and it checks what a real model relies
on: spans fit into a pass, the shortest first, and no row reads a position that it has no room for.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EMBEDDED, load_pair
from truncation import truncate

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft.batch import RequestSnapshot
from vllm_tokentiming.draft.kv_pool import KVPool
from vllm_tokentiming.draft.learned_file import LearnedWeightsFile
from vllm_tokentiming.draft.learned_weights import Lesson
from vllm_tokentiming.draft.length import FixedLength
from vllm_tokentiming.draft.protocol import DraftModel, Span
from vllm_tokentiming.draft.sampling import DraftSampling
from vllm_tokentiming.drafter import Drafter
from vllm_tokentiming.transfer.proposals import ProposalBuilder

PROPOSALS, BLOCK = 4, 8
TEXT = (
    "The ferry leaves at half past seven, and nobody has bought a ticket yet. The captain waits for the mail, "
    "for the baker's boy, and for the fog to lift."
)


class Stub:
    """Favours the next token of a text, whatever it has been told to read."""

    max_model_len = 256
    device = torch.device("cpu")

    def __init__(self, draft_ids: Sequence[int], vocab_size: int, num_blocks: int = 64, max_batch_tokens: int = 512):
        self.vocab_size, self.max_batch_tokens = vocab_size, max_batch_tokens
        self.pool = KVPool(num_blocks, BLOCK, num_rows=8, max_tokens=self.max_model_len)
        self.spans: list[list[Span]] = []
        self._draft_ids = draft_ids

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        assert sum(len(span.draft_ids) for span in spans) <= self.max_batch_tokens
        assert len({span.row for span in spans}) == len(spans)
        assert all(len(left.draft_ids) <= len(right.draft_ids) for left, right in pairwise(spans))
        self.spans.append(list(spans))
        self.pool.copies.clear()
        logits = torch.zeros(len(spans), self.vocab_size)
        for row, span in enumerate(spans):
            blocks = self.pool.tables[span.row, : -(-(span.start + len(span.draft_ids)) // BLOCK)]
            assert (blocks > 0).all(), "the row has no room for what it reads"
            position = span.start + len(span.draft_ids)
            logits[row, self._draft_ids[min(position, len(self._draft_ids) - 1)]] = 12.0
        return logits


class Engine:
    """Drafts for requests whose target writes `text`, with a draft that knows `knows`."""

    def __init__(
        self, strategy: str = "tokentiming", *, text: str = TEXT, knows: str = TEXT, copies: bool = False,
        learned_path: Path | None = None, **sizes: int,
    ) -> None:  # fmt: skip
        self.pair = load_pair(*EMBEDDED)
        self.target_ids = np.array(self.pair.target.encoder.encode(text.encode()), dtype=np.int32)
        prefix = self.pair.draft_prefix
        vocab_size, target_size = (side.token_bytes.size for side in (self.pair.draft, self.pair.target))
        self.model = Stub([*prefix, *self.pair.draft.encoder.encode(knows.encode())], vocab_size, **sizes)
        builder = ProposalBuilder(
            self.pair, Transducer(self.pair, one_to_one=strategy == "tli"), strategy, draft_size=vocab_size,
            target_size=target_size, num_proposals=PROPOSALS, max_draft_tokens=2 * PROPOSALS, device=self.model.device,
            max_q_bytes=1 << 30, length=FixedLength(), truncate=truncate, learns=True,
        )  # fmt: skip
        model: DraftModel = self.model
        file = None
        if learned_path is not None:
            file = LearnedWeightsFile(learned_path, builder.learned, pytest.fail)
            file.load()
        self.drafter = Drafter(
            self.pair, model, builder, FixedLength(), 2 * PROPOSALS, copy_repeats=copies, learned_file=file
        )

    def snapshot(self, request_id: str, num_target: int, **given: object) -> RequestSnapshot:
        return RequestSnapshot(request_id, self.target_ids, num_target, PROPOSALS, **given)

    def true(self, num_target: int) -> list[int]:
        return self.target_ids[num_target : num_target + PROPOSALS].tolist()


@pytest.mark.parametrize("strategy", ["tokentiming", "slem", "tli"])
def test_a_draft_that_knows_the_text_proposes_what_the_target_writes(strategy):
    engine = Engine(strategy)
    (proposed,) = engine.drafter.propose([engine.snapshot("a", 5, greedy=True)]).target_ids
    # The intersection of both vocabularies lacks later tokens of this text.
    length = 2 if strategy == "tli" else PROPOSALS
    assert proposed[:length] == engine.true(5)[:length]


def test_a_sampled_request_gets_the_distribution_that_its_proposals_were_drawn_from():
    engine = Engine()
    sampling = DraftSampling(seed=3, temperature=1.0)
    proposals = engine.drafter.propose([engine.snapshot("a", 5, sampling=sampling)])
    (proposed,) = proposals.target_ids
    assert proposals.q is not None and proposals.q_request_ids == ["a"]
    rows = proposals.q[0, : len(proposed)]
    torch.testing.assert_close(rows.sum(-1), torch.ones(len(proposed)), atol=1e-4, rtol=0)
    assert (rows[range(len(proposed)), proposed] > 0).all()


SAMPLED = DraftSampling(seed=3, temperature=1.0)


def test_a_sampled_request_teaches_what_the_draft_would_have_drawn():
    engine = Engine()
    proposals = engine.drafter.propose([engine.snapshot("a", 5, sampling=SAMPLED, cache_salt="")])
    assert list(proposals.lessons) == ["a"]
    first = torch.from_numpy(Transducer(engine.pair).first).clamp(min=0)
    for position, draft_probs in proposals.lessons["a"].items():
        q = torch.zeros(proposals.q.shape[-1]).index_add_(0, first, draft_probs)
        torch.testing.assert_close(q, proposals.q[0, position])


@pytest.mark.parametrize(
    "given",
    [
        {"sampling": SAMPLED, "cache_salt": "a secret"},
        {"sampling": SAMPLED, "cache_salt": None},  # Not known, so there may be one.
        {"sampling": SAMPLED, "cache_salt": "", "reproducible": True},
        {"greedy": True, "cache_salt": ""},
    ],
)
def test_requests_that_are_kept_apart_or_reproduce_themselves_teach_nothing(given):
    engine = Engine()
    proposals = engine.drafter.propose([engine.snapshot("a", 5, **given), engine.snapshot("b", 5, greedy=True)])
    assert all(proposals.target_ids) and not proposals.lessons


@pytest.mark.parametrize("reproducible", [False, True])
def test_what_was_learned_changes_no_request_that_reproduces_itself(reproducible):
    """The random numbers of other requests are new ones, too: those of the version of the weights."""
    found = []
    for change in (lambda learned: None, lambda learned: learned.log_weights.normal_(), lambda learned: None):
        engine = Engine()
        change(engine.drafter.learned)
        engine.drafter.learned.version = len(found)
        snapshot = engine.snapshot("a", 5, sampling=DraftSampling(3, 50.0), reproducible=reproducible)
        proposals = engine.drafter.propose([snapshot])
        found.append((proposals.target_ids, proposals.uniforms["a"]))
    assert (found[0] == found[1] == found[2]) == reproducible
    assert (found[0][1] == found[2][1]) == reproducible


def test_lessons_are_learned_from_the_rows_of_the_logits_that_they_name():
    engine, expected = Engine(), Engine()
    size = engine.pair.target.token_bytes.size
    logits = torch.randn(7, size, generator=torch.Generator().manual_seed(0)) * 3
    laws = torch.rand(2, engine.model.vocab_size, generator=torch.Generator().manual_seed(1)).pow(8)
    laws /= laws.sum(-1, keepdim=True)
    engine.drafter.learn(logits, [Lesson(5, laws[0]), Lesson(2, laws[1])])
    expected.drafter.learned.learn(laws, logits[[5, 2]].softmax(-1))
    assert engine.drafter.learned.log_weights.any()
    assert torch.equal(engine.drafter.learned.log_weights, expected.drafter.learned.log_weights)
    assert engine.drafter.numbers()["lessons"] == 2


# Between starts.


def serve(path, steps: int) -> tuple[Engine, list[tuple[int, tuple]]]:
    """Start an engine and teach it in some steps of the same request; its random numbers, with their versions."""
    engine, used = Engine(learned_path=path), []
    size = engine.pair.target.token_bytes.size
    for step in range(steps):
        version = engine.drafter.learned.version
        proposals = engine.drafter.propose([engine.snapshot("a", 5, sampling=SAMPLED, cache_salt="")])
        used.append((version, tuple(proposals.uniforms["a"])))
        logits = torch.randn(PROPOSALS, size, generator=torch.Generator().manual_seed(step))
        lessons = [Lesson(row, draft_probs) for row, draft_probs in proposals.lessons["a"].items()]
        engine.drafter.learn(logits, lessons)
        engine.drafter.release(["a"])
    return engine, used


def test_no_random_number_that_taught_an_engine_is_drawn_by_those_that_go_on_from_it(tmp_path):
    """Same seed, same request, same position in three engines: only the version tells their numbers apart."""
    found = []
    for _ in range(3):
        engine, used = serve(tmp_path / "pair.npz", 4)
        engine.drafter._learned_file.keep()
        found += used
    assert [version for version, _ in found] == list(range(12))
    assert len({numbers for _, numbers in found}) == 12
    # Without a file they repeat, and nothing is known of them.
    engine, used = serve(None, 4)
    assert used == found[:4]


def test_an_engine_that_died_left_nothing_that_its_numbers_taught(tmp_path):
    """What was learned since the last writing is lost with it, and with it the versions that are used again."""
    engine, _ = serve(tmp_path / "pair.npz", 3)
    engine.drafter._learned_file.keep()
    kept = engine.drafter.learned.state()
    died, used = serve(tmp_path / "pair.npz", 2)
    died.drafter._learned_file._kept_version = died.drafter.learned.version  # It never gets to write.
    again, used_again = serve(tmp_path / "pair.npz", 0)
    assert torch.equal(again.drafter.learned.state(), kept)
    assert not torch.equal(died.drafter.learned.state(), kept)
    assert again.drafter.learned.version == used[0][0] == 3 and used_again == []


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_file_changes_no_request_that_reproduces_itself(tmp_path, reproducible):
    before, _ = serve(tmp_path / "pair.npz", 4)
    before.drafter._learned_file.keep()
    found = []
    for path in (None, tmp_path / "pair.npz"):
        engine = Engine(learned_path=path)
        assert (engine.drafter.learned.version > 0) == (path is not None)
        sampling = DraftSampling(3, 50.0)
        proposals = engine.drafter.propose([engine.snapshot("a", 5, sampling=sampling, reproducible=reproducible)])
        found.append((proposals.target_ids, proposals.uniforms["a"], proposals.q.tolist()))
    assert (found[0] == found[1]) == reproducible


def test_what_was_learned_is_written_when_the_drafter_is_let_go(tmp_path):
    engine, _ = serve(tmp_path / "pair.npz", 2)
    assert not (tmp_path / "pair.npz").exists()
    del engine
    gc.collect()
    assert Engine(learned_path=tmp_path / "pair.npz").drafter.learned.version == 2


FORKS = """
import multiprocessing, pathlib, sys
import test_drafter

held = []

def serve(path):
    held.append(test_drafter.serve(path, 2))
    sys.exit()  # As a worker of vLLM's does that is told to end.

child = multiprocessing.get_context("fork").Process(target=serve, args=(pathlib.Path(sys.argv[1]),))
child.start()
child.join()
sys.exit(child.exitcode)
"""


def test_what_was_learned_is_written_when_a_forked_process_ends(tmp_path):
    # From a process that has computed nothing yet: torch's threads are not forked.
    subprocess.run(
        [sys.executable, "-c", FORKS, str(tmp_path / "pair.npz")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True, timeout=120,
    )  # fmt: skip
    assert Engine(learned_path=tmp_path / "pair.npz").drafter.learned.version == 2


def test_accepted_draft_tokens_are_not_read_again():
    engine = Engine()
    (proposed,) = engine.drafter.propose([engine.snapshot("a", 5, greedy=True)]).target_ids
    before, passes = engine.drafter.counts.read, len(engine.model.spans)
    engine.drafter.propose([engine.snapshot("a", 5 + len(proposed) + 1, greedy=True)])
    assert engine.drafter.counts.kept > 0
    (span,) = engine.model.spans[passes]
    assert span.start >= before, "reading goes on behind what was drafted and accepted"


def test_a_rejected_draft_leaves_nothing_behind():
    engine, fresh = Engine(), Engine()
    engine.drafter.propose([engine.snapshot("a", 5, greedy=True)])
    # The target wrote something else than was proposed.
    other = engine.target_ids.copy()
    other[5:7] = engine.pair.target.encoder.encode(b"zebra")[:2]
    given = {"target_ids": other, "num_target": 7, "max_proposals": PROPOSALS, "greedy": True}
    written = [e.drafter.propose([RequestSnapshot("a", **given)]).target_ids for e in (engine, fresh)]
    assert written[0] == written[1]
    ids = [e.drafter.sequences.by_request["a"].context.draft_ids for e in (engine, fresh)]
    assert ids[0] == ids[1]


def test_requests_draft_together_one_token_each_in_a_pass():
    engine = Engine()
    engine.drafter.propose([engine.snapshot(name, 5 + i, greedy=True) for i, name in enumerate("abc")])
    reading, *drafting = engine.model.spans
    assert len(reading) == 3
    assert drafting and all(len(span.draft_ids) == 1 for spans in drafting for span in spans)
    assert len(drafting[0]) == 3


def test_requests_that_begin_alike_are_read_once():
    engine = Engine()
    salt = {"cache_salt": "", "greedy": True}
    engine.drafter.propose([engine.snapshot(name, 24, **salt) for name in "ab"])
    second, first = (len(span.draft_ids) for span in engine.model.spans[0])
    assert engine.drafter.counts.reused == first - second >= 2 * BLOCK


def test_a_prompt_that_is_longer_than_a_pass_is_read_in_chunks():
    engine = Engine(max_batch_tokens=16)
    written = [engine.drafter.propose([engine.snapshot("a", 30, greedy=True)]).target_ids[0] for _ in range(4)]
    assert written[0] == [] and written[-1] == engine.true(30)
    assert engine.drafter.counts.not_drafted["reading"] > 0


def test_a_request_without_room_loses_its_proposals_and_no_other_request_does():
    engine = Engine(num_blocks=1 + 6)  # Enough for one of these requests, not for two.
    first, second = engine.drafter.propose([engine.snapshot(name, 24, greedy=True) for name in "ab"]).target_ids
    assert sorted([first, second]) == sorted([engine.true(24), []])
    assert engine.drafter.counts.not_drafted["blocks"] == 1


def test_blocks_of_requests_that_wait_are_taken_for_those_that_run():
    engine = Engine(num_blocks=1 + 6)
    for name in "abab":  # Never both in a batch.
        assert engine.drafter.propose([engine.snapshot(name, 24, greedy=True)]).target_ids == [engine.true(24)]


def test_all_blocks_come_back_when_requests_are_released():
    engine = Engine()
    free = engine.model.pool.num_free_blocks
    engine.drafter.propose([engine.snapshot(name, 12, greedy=True) for name in "abc"])
    assert engine.model.pool.num_free_blocks < free
    engine.drafter.release("abc")
    assert engine.model.pool.num_free_blocks == free
    assert not engine.drafter.sequences.by_request


def test_an_id_that_is_given_to_another_request_begins_anew():
    engine = Engine()
    engine.drafter.propose([engine.snapshot("a", 20, greedy=True)])
    assert engine.drafter.propose([engine.snapshot("a", 5, greedy=True)]).target_ids == [engine.true(5)]


def test_a_context_that_is_too_long_for_the_draft_goes_without_proposals():
    engine = Engine()
    engine.model.max_model_len = 20
    assert engine.drafter.propose([engine.snapshot("a", 30, greedy=True)]).target_ids == [[]]
    assert engine.drafter.counts.not_drafted["positions"] == 1


def test_a_target_id_outside_the_vocabulary_is_not_read():
    engine = Engine()
    engine.target_ids[3] = engine.pair.target.token_bytes.size
    with pytest.raises(IndexError):
        engine.drafter.propose([engine.snapshot("a", 5, greedy=True)])


def test_every_second_is_counted_in_the_phase_that_took_it():
    engine = Engine()
    engine.drafter.propose([engine.snapshot("a", 12, greedy=True)])
    seconds = engine.drafter.clock.seconds
    assert set(seconds) == {"context", "read", "write", "draft"} and min(seconds.values()) > 0
    kinds = [kind for kind, _, _ in engine.drafter.costs]
    assert kinds == ["first", *["later"] * (len(engine.model.spans) - 1)]


# Text that repeats itself.

TWICE = TEXT + " " + TEXT
CHANGED = " ".join(
    f"The {word} ferry leaves at {word}." for word in ("red", "old", "new", "big", "hot", "wet", "dry", "odd")
)


def again(engine: Engine, num_more: int = 6) -> int:
    """Target tokens of a text up to some in its second half."""
    return len(engine.target_ids) // 2 + num_more


def follow(engine: Engine, name: str, start: int, end: int, **given: object) -> list[list[int]]:
    """Propose in each step up to an end, accept what is right, and return what was proposed."""
    proposed, num_target = [], start
    while num_target < end:
        (target_ids,) = engine.drafter.propose([engine.snapshot(name, num_target, **given)]).target_ids
        proposed.append(target_ids)
        true = engine.target_ids[num_target:].tolist()
        accepted = next((i for i, target_id in enumerate(target_ids) if target_id != true[i]), len(target_ids))
        num_target += accepted + 1
    return proposed


def test_what_followed_the_same_text_before_is_proposed_without_a_pass():
    engine = Engine(text=TWICE, copies=True)
    number = again(engine)
    assert engine.drafter.propose([engine.snapshot("a", number, greedy=True)]).target_ids == [engine.true(number)]
    assert not engine.model.spans
    engine.drafter.propose([engine.snapshot("a", number + PROPOSALS, greedy=True)])
    assert engine.drafter.numbers()["copied_tokens"] == {"proposed": 2 * PROPOSALS, "accepted": PROPOSALS}
    assert engine.drafter.counts.proposed == 2 * PROPOSALS


def test_text_that_does_not_repeat_itself_is_drafted():
    engine, plain = Engine(copies=True), Engine()
    written = [e.drafter.propose([e.snapshot("a", 12, greedy=True)]).target_ids for e in (engine, plain)]
    assert written[0] == written[1] != [[]]
    assert engine.drafter.counts.copied == 0


@pytest.mark.parametrize("order", ["copied first", "drawn first"])
def test_a_copy_is_one_hot_beside_proposals_that_are_drawn(order):
    engine = Engine(text=TWICE, copies=True)
    sampling = DraftSampling(seed=3, temperature=1.0)
    batch = [
        engine.snapshot("copied", again(engine), sampling=sampling),
        engine.snapshot("drawn", 12, sampling=sampling),
    ]
    batch = batch if order == "copied first" else batch[::-1]
    proposals = engine.drafter.propose(batch)
    copied, drawn = (
        proposals.target_ids[[snapshot.request_id for snapshot in batch].index(name)] for name in ("copied", "drawn")
    )
    assert proposals.q is not None and set(proposals.q_request_ids) == {"copied", "drawn"}
    rows = dict(zip(proposals.q_request_ids, proposals.q, strict=True))
    assert copied == engine.true(again(engine))
    torch.testing.assert_close(rows["copied"], torch.eye(rows["copied"].shape[1])[copied])
    assert drawn and (rows["drawn"][range(len(drawn)), drawn] > 0).all()
    assert rows["drawn"].count_nonzero() > len(drawn), "a distribution of more than one token"
    assert set(proposals.uniforms) == {"drawn"} and not any(name == "copied" for name, _ in proposals.stages)


def test_a_draft_goes_on_after_copies_as_if_it_had_read_all_along():
    engine, plain = Engine(text=TWICE + " It is late.", knows=TWICE + " It is late.", copies=True), Engine(
        text=TWICE + " It is late.", knows=TWICE + " It is late."
    )  # fmt: skip
    number = len(engine.target_ids) - 3
    follow(engine, "a", again(engine), number - 1, greedy=True)
    assert engine.drafter.counts.copied > 0
    written = [e.drafter.propose([e.snapshot("a", number, greedy=True)]).target_ids for e in (engine, plain)]
    assert written[0] == written[1]
    ids = [e.drafter.sequences.by_request["a"].context.draft_ids for e in (engine, plain)]
    assert ids[0] == ids[1]


def test_copies_are_given_up_where_they_are_refused_and_made_again_where_they_are_not():
    text = " ".join([CHANGED, *[TEXT] * 4])
    engine = Engine(text=text, knows=CHANGED, copies=True)
    repeated = len(engine.pair.target.encoder.encode(" ".join([CHANGED, TEXT]).encode()))
    follow(engine, "a", 12, repeated, greedy=True)
    refused = engine.drafter.counts.copied
    follow(engine, "a", repeated, len(engine.target_ids) - PROPOSALS, greedy=True)
    numbers = engine.drafter.numbers()["copied_tokens"]
    assert numbers["proposed"] > refused, "it begins again"
    assert numbers["accepted"] > 0.8 * (numbers["proposed"] - refused)


@pytest.mark.parametrize("reason", ["positions", "blocks"])
def test_what_cannot_be_drafted_for_is_copied_if_it_can_be(reason):
    engine = Engine(text=TWICE, copies=True, num_blocks=64 if reason == "positions" else 2)
    if reason == "positions":
        engine.model.max_model_len = 20
    number = again(engine, num_more=3)
    outcomes = engine.drafter.sequences.find(engine.snapshot("a", number)).open_repeats._outcomes
    outcomes.drafted.add(4000.0, 1000.0)  # The draft is to be preferred.
    assert engine.drafter.propose([engine.snapshot("a", number, greedy=True)]).target_ids == [engine.true(number)]
    assert engine.drafter.counts.not_drafted[reason] == 1


def test_what_a_seeded_request_copies_depends_on_no_other_request():
    given = {"sampling": DraftSampling(seed=3, temperature=1.0), "reproducible": True}
    alone = Engine(text=TWICE, copies=True)
    start, end = again(alone, 2), len(alone.target_ids) - PROPOSALS
    expected = follow(alone, "a", start, end, **given)
    engine = Engine(text=TWICE, copies=True)
    follow(engine, "other", 12, end)
    follow(engine, "sampled", start, end, sampling=DraftSampling(seed=4, temperature=1.0))
    assert follow(engine, "a", start, end, **given) == expected
    assert engine.drafter.counts.copied > 0


def test_an_id_that_is_given_to_another_request_copies_nothing_of_the_first_one():
    engine = Engine(text=TWICE, copies=True)
    engine.drafter.propose([engine.snapshot("a", again(engine), greedy=True)])
    other = engine.target_ids[again(engine) - 4 : again(engine)]
    engine.drafter.propose([RequestSnapshot("a", other, 4, PROPOSALS, greedy=True)])
    assert engine.drafter.counts.copied == PROPOSALS, "the first one's alone"


def test_an_id_outside_the_vocabulary_is_not_copied():
    engine = Engine(text=TWICE, copies=True)
    number = again(engine)
    true = engine.true(number)
    source = next(i for i in range(number) if engine.target_ids[i : i + PROPOSALS].tolist() == true)
    engine.target_ids[source + 1] = engine.pair.target.token_bytes.size
    engine.model.max_model_len = 20  # Or one token alone would be drafted.
    given = {"greedy": True, "unread": ((source + 1, source + 2),)}
    assert engine.drafter.propose([engine.snapshot("a", number, **given)]).target_ids == [true[:1]]
