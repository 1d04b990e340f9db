"""The draft model on vLLM's paged attention writes what it writes in transformers."""

from __future__ import annotations

import random

import engine
import pytest
from engine_prompts import texts

pytestmark = pytest.mark.engine

NUM_WRITTEN = 24


def _greedy_with_transformers(prompts: list[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(engine.DRAFT, dtype=torch.float32).eval()
    written = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(NUM_WRITTEN):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            written.append(ids[len(prompt) :])
    return written


class Sequences:
    """Sequences of the draft side by side, each with a row of the KV pool."""

    def __init__(self, model, prompts: list[list[int]]) -> None:
        self.model, self.ids = model, [list(prompt) for prompt in prompts]
        self.cached = [0] * len(prompts)
        self.rows = [model.pool.open_row() for _ in prompts]
        for row, prompt in zip(self.rows, prompts, strict=True):
            assert model.pool.grow(row, len(prompt) + 2 * NUM_WRITTEN)

    def read(self, chunk: int = 10**6) -> dict[int, int]:
        """One pass over what is not in the cache, at most ``chunk`` tokens of each sequence.

        Returns:
            The next id of each sequence that has been read to its end.
        """
        from vllm_tokentiming.draft.protocol import Span

        spans = [
            (index, Span(self.rows[index], self.cached[index], ids[self.cached[index] :][:chunk]))
            for index, ids in enumerate(self.ids)
            if self.cached[index] < len(ids)
        ]
        spans.sort(key=lambda pair: len(pair[1].draft_ids))
        next_ids = self.model.forward([span for _, span in spans]).argmax(-1).tolist()
        for index, span in spans:
            self.cached[index] += len(span.draft_ids)
        return {
            index: next_id
            for (index, _), next_id in zip(spans, next_ids, strict=True)
            if self.cached[index] == len(self.ids[index])
        }

    def close(self) -> None:
        for row in self.rows:
            self.model.pool.close_row(row)


def _write_sharing(model, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """The greedy continuations where nothing is read that the cache has, or gets in the same pass.

    Returns:
        They, and how many tokens were read.
    """
    from vllm_tokentiming.draft.protocol import Span

    pool, num_read = model.pool, 0
    sequences = [list(prompt) for prompt in prompts]
    rows = [pool.open_row() for _ in prompts]
    cached = [pool.share(row, ids, 0, len(ids)) for row, ids in zip(rows, sequences, strict=True)]
    assert all(pool.grow(row, len(ids) + NUM_WRITTEN) for row, ids in zip(rows, sequences, strict=True))
    cached = [pool.copy_beginning(*each) for each in zip(rows, sequences, cached, strict=True)]
    for _ in range(NUM_WRITTEN):
        spans = []
        for index, (row, ids) in enumerate(zip(rows, sequences, strict=True)):
            start = pool.share(row, ids, cached[index], len(ids))
            spans.append((index, Span(row, start, ids[start:])))
            cached[index] = pool.share(row, ids, len(ids), len(ids))
            num_read += len(ids) - start
        spans.sort(key=lambda pair: len(pair[1].draft_ids))
        next_ids = model.forward([span for _, span in spans]).argmax(-1).tolist()
        for (index, _), next_id in zip(spans, next_ids, strict=True):
            sequences[index].append(next_id)
    for row in rows:
        pool.close_row(row)
    return [ids[len(prompt) :] for ids, prompt in zip(sequences, prompts, strict=True)], num_read


def write_in_all_ways() -> dict:
    """In a fresh process: the greedy continuation of ragged prompts, several ways."""
    llm = engine.start_exact(block_size=32, speculative_config=engine.speculation(enable_prefix_caching=True))
    model = engine.drafter(llm)._model
    tokenizer = engine.drafter(llm).sequences._pair.draft.encoder
    prompts = [[1, *tokenizer.encode(text.encode())] for text in texts(None)[::17]]
    prompts += [[7], [1] + [i for prompt in prompts[:6] for i in prompt]]
    prompts += [prompts[-1] + prompt for prompt in prompts[:5]]
    num_prompts = [len(prompt) for prompt in prompts]
    free = model.pool.num_free_blocks

    def written(sequences: Sequences) -> list[list[int]]:
        sequences.close()
        return [ids[length:][:NUM_WRITTEN] for ids, length in zip(sequences.ids, num_prompts, strict=True)]

    def together(chunk: int) -> list[list[int]]:
        sequences = Sequences(model, prompts)
        while any(len(ids) < length + NUM_WRITTEN for ids, length in zip(sequences.ids, num_prompts, strict=True)):
            for index, next_id in sequences.read(chunk).items():
                sequences.ids[index].append(next_id)
        return written(sequences)

    def with_wrong_tokens() -> list[list[int]]:
        rng = random.Random(0)
        sequences = Sequences(model, prompts)
        for _ in range(NUM_WRITTEN):
            for index, next_id in sequences.read().items():
                sequences.ids[index].append(next_id)
            right = [len(ids) for ids in sequences.ids]
            for ids in sequences.ids:
                ids += [rng.randrange(3, model.vocab_size) for _ in range(rng.randrange(1, 7))]
            sequences.read()
            for index, length in enumerate(right):
                del sequences.ids[index][length:]
                # The last right token is read again, for its logits.
                sequences.cached[index] = length - 1
        return written(sequences)

    result = {
        "transformers": _greedy_with_transformers(prompts),
        "prompts at once": together(10**6),
        "prompts in chunks": together(5),
        "wrong tokens taken back": with_wrong_tokens(),
    }
    for way in ("shared in one pass", "shared with what is over"):
        result[way], result[f"{way}, read"] = _write_sharing(model, prompts[-6:])
    result["shared tokens"] = num_prompts[-6]
    result["own tokens"] = sum(num_prompts[:5]) + 6 * (NUM_WRITTEN - 1)
    result["blocks held"] = free - model.pool.num_free_blocks
    return result


@pytest.fixture(scope="module")
def written():
    return engine.in_fresh_process(write_in_all_ways)


@pytest.mark.parametrize("way", ["prompts at once", "prompts in chunks", "wrong tokens taken back"])
def test_ragged_batches_continue_as_in_transformers(written, way):
    assert len(written["transformers"]) > 12
    assert written[way] == written["transformers"]


@pytest.mark.parametrize("way", ["shared in one pass", "shared with what is over"])
def test_what_is_taken_over_continues_as_in_transformers(written, way):
    assert written[way] == written["transformers"][-len(written[way]) :]


def test_what_is_taken_over_is_not_read(written):
    shared, own = written["shared tokens"], written["own tokens"]
    assert shared > 3 * 32
    assert written["shared in one pass, read"] <= shared + own + 5 * 32
    # Also the beginnings of the blocks in which they part.
    assert written["shared with what is over, read"] <= own + 6


def test_closed_rows_give_all_their_blocks_back(written):
    assert written["blocks held"] == 0
