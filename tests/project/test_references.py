"""The references of `examples/references/`: what a draft learns from a target's law, and how heads are unrolled."""

import itertools
import json
import sys
from collections.abc import Iterator

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(ROOT / "examples" / "references"), str(ROOT / "examples")]
from heads import UNROLLED, Eagle3, Medusa  # noqa: E402
from train_draft import Spelling, example, labels  # noqa: E402

SPELLINGS = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6, unique=True
)


@given(
    SPELLINGS.filter(lambda spelt: not any(b[: len(a)] == a for a, b in itertools.permutations(spelt, 2))), st.data()
)
def test_the_laws_of_the_draft_tokens_inside_a_target_token_make_up_the_targets_law(spelt, data):
    weights = data.draw(st.lists(st.floats(0.1, 1), min_size=len(spelt), max_size=len(spelt)))
    law = [(list(draft_ids), w / sum(weights)) for draft_ids, w in zip(spelt, weights, strict=True)]
    for draft_ids, probability in law:
        product = 1.0
        for place, draft_id in enumerate(draft_ids):
            product *= labels(law, draft_ids[:place], draft_id)[draft_id]
        assert product == pytest.approx(probability)


def test_a_token_that_no_likely_one_leads_to_has_all_of_the_law():
    assert labels([([1, 2], 0.6)], [3], 4) == {4: 1.0}


def test_an_example_has_the_text_and_a_law_for_every_draft_token_of_the_output():
    target, draft = (AutoTokenizer.from_pretrained(ROOT / "examples/models" / name) for name in ("target", "draft"))
    prompt, output = (target(text).input_ids for text in ("Once upon a time", " there was a lighthouse, naïve and 灯."))
    row = {"prompt": prompt, "output": output, "laws": [[[i, 0], [0.5, 0.25]] for i in output]}
    spelling = Spelling(target, draft)
    found = example(row, spelling)
    assert spelling.draft.decode(found.draft_ids) == target.decode(prompt + output)
    has_law = (found.label_probs.sum(1) > 0).tolist()
    assert has_law == sorted(has_law) and 0 < sum(has_law) < len(has_law)
    assert found.label_probs.sum(1)[has_law].allclose(torch.ones(sum(has_law)))
    own = (found.label_probs * (found.label_ids == found.draft_ids[:, None])).sum(1)
    assert (own[has_law] > 0.5).all()


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights(config):
    torch.manual_seed(0)
    return LlamaForCausalLM(config).state_dict()


def one_by_one(head: Eagle3, states: torch.Tensor, embedded: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits of the one chain that begins at the last slot, step by step, each over all keys before it."""
    with torch.no_grad():
        hidden = head.fc(states[:, :, :3].flatten(2))
        keys = []
        for j in range(UNROLLED):
            # The first step is over all slots; a later one adds one key, at the next position.
            n = states.shape[1]
            positions = torch.arange(n)[None] if j == 0 else torch.tensor([[n - 1 + j]])
            rows = embedded[:, :n] if j == 0 else embedded[:, n - 1 + j : n + j]
            layer, attention = head.midlayer, head.midlayer.self_attn
            x = torch.cat([layer.input_layernorm(rows), layer.hidden_norm(hidden)], -1)
            q, k, v = (
                p(x).unflatten(-1, (-1, attention.size)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            cos, sin = head._rotary[0](x, positions)

            def turned(values: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
                left, right = values.chunk(2, -1)
                return values * cos[:, :, None] + torch.cat([-right, left], -1) * sin[:, :, None]

            keys.append((turned(k), v))
            all_k, all_v = (torch.cat(parts, 1).repeat_interleave(2, 2) for parts in zip(*keys, strict=True))
            scores = torch.einsum("bqhd,bkhd->bhqk", turned(q), all_k) / attention.size**0.5
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(all_k.shape[1] - q.shape[1])
            mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), all_v)
            hidden = hidden + attention.o_proj(mixed.flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            hidden = hidden[:, -1:]
            yield head.lm_head(head.norm(hidden))[:, 0]


def test_chains_that_are_unrolled_together_are_those_that_run_one_by_one(config, weights):
    kept = torch.arange(0, 40, 2)
    head = Eagle3(config, weights, kept)
    states, embedded = torch.randn(1, 7, 4, 32), torch.randn(1, 7 + UNROLLED - 1, 32)
    used = [torch.ones(1, 7, dtype=torch.bool)] * UNROLLED
    together = head(states, embedded, used)
    for slot in (0, 3, 6):
        chain = one_by_one(head, states[:, : slot + 1], embedded[:, : slot + UNROLLED])
        for j, logits in enumerate(chain):
            torch.testing.assert_close(together[j][slot], logits[0], msg=f"slot {slot}, step {j}")


@pytest.mark.parametrize("kind", [Eagle3, Medusa])
def test_a_head_is_saved_with_the_target_ids_that_it_can_propose(kind, config, weights, tmp_path):
    kept = torch.arange(0, 40, 2)
    kind(config, weights, kept).save(tmp_path, config, kept, (2, 4, 5))
    tensors, described = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert described["vocab_size"] == 40
    if kind is Eagle3:
        assert (torch.arange(len(kept)) + tensors["d2t"]).tolist() == kept.tolist()
        assert described["draft_vocab_size"] == len(tensors["lm_head.weight"]) == len(kept)
    else:
        assert tensors["token_map"].tolist() == kept.tolist()
        assert described["truncated_vocab_size"] == len(tensors["lm_head.weight"]) == len(kept)
