"""The law of two tokens over a whole vocabulary, in the cells that can be counted."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("vllm.version")  # The tests have a folder called `vllm`, too.

from benchmarks.exactness.published import Law
from benchmarks.exactness.toy import Sampling, load, make_pairs, next_token_laws, prompt_ids


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    pair = make_pairs(tmp_path_factory.mktemp("pairs"))["full"]
    model, prompt = load(pair.target), prompt_ids(pair)
    return model, prompt, Law(model, prompt, Sampling(temperature=0.7), 500)


def test_every_pair_of_tokens_has_a_cell_with_its_probability(known):
    model, prompt, law = known
    vocabulary = model.config.vocab_size
    (first,) = next_token_laws(model, prompt, np.zeros((1, 0), dtype=np.int64), Sampling(temperature=0.7))
    second = next_token_laws(model, prompt, np.arange(vocabulary)[:, None], Sampling(temperature=0.7))
    every = np.stack(np.divmod(np.arange(vocabulary**2), vocabulary), 1)
    found = np.zeros_like(law.table)
    np.add.at(found, tuple(law.cells(every).T), (first[:, None] * second).ravel())
    np.testing.assert_allclose(found, law.table, atol=1e-12)
    assert law.table.sum() == pytest.approx(1)


def test_what_is_expected_too_rarely_is_pooled(known):
    _, _, law = known
    assert ((law.table[:-1].sum(1) * 500) >= 5).all()
    assert ((law.table[:, :-1] * 500).max(0) >= 5).all()
    assert law.table.shape[0] > 3 and law.table.shape[1] > 3
    assert (law.table[-1, :-1] == 0).all()
