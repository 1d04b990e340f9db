"""What is told of a pair before anything is started."""

import json

import pytest
from conftest import EMBEDDED, EXACT, LOSSY, MODELS, cases, load_pair, need

from vllm_tokentiming.cli import main
from vllm_tokentiming.inspection import SAMPLE, as_text, block_shares, inspect

PAIRS = [EMBEDDED, ("qwen2.5", "llama3"), ("llama2", "gpt2"), ("gpt2", "bert"), ("mistral_tekken", "t5_small")]
TEXTS = [text.encode() for text in SAMPLE]


def run(capsys, *arguments):
    status = main(["inspect", *map(str, arguments)])
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.mark.parametrize("names", cases(PAIRS), ids="/".join)
def test_a_description_is_consistent(names):
    pair = load_pair(*names)
    found = inspect(pair, TEXTS)
    assert json.loads(json.dumps(found)) == found
    assert sum(found["blocks"].values()) == pytest.approx(1)
    assert sum(found["emissions"].values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in found["overlap"].values())
    assert found["draft"]["exact"] == (names[1] in EXACT)
    assert any("cannot spell" in warning for warning in found["warnings"]) == any(name in LOSSY for name in names)
    assert all(warning in as_text(found) for warning in found["warnings"])


def test_a_vocabulary_lies_one_to_one_over_itself(embedded):
    same = load_pair(EMBEDDED[0], EMBEDDED[0])
    shares = block_shares(same, TEXTS)
    assert shares.one_to_one == 1
    assert shares.draft_tokens == shares.target_tokens > 0
    assert inspect(same, TEXTS)["overlap"] == {"of_draft": 1, "of_target": 1}


def test_blocks_are_counted_by_hand(embedded):
    pair, text = embedded.pair, SAMPLE[0].encode()
    draft, target = (side.encoder.encode(text) for side in (pair.draft, pair.target))
    ends = [set(), set()]
    for found, side, ids in zip(ends, (pair.draft, pair.target), (draft, target), strict=True):
        length = 0
        for token_id in ids:
            length += len(side.token_bytes[token_id])
            found.add(length)
    common = len(ends[0] & ends[1])
    shares = block_shares(pair, [text])
    assert (shares.draft_tokens, shares.target_tokens) == (len(draft), len(target))
    total = shares.one_to_one + shares.one_to_many + shares.many_to_one + shares.many_to_many
    assert total == pytest.approx(1)
    assert round(shares.one_to_one * common) == pytest.approx(shares.one_to_one * common)


def test_the_command_describes_as_text_and_as_json(capsys):
    status, text, _ = run(capsys, MODELS / "target", MODELS / "draft")
    assert status == 0
    assert "byte-exact" in text
    status, text, _ = run(capsys, MODELS / "target", MODELS / "draft", "--json")
    assert status == 0
    assert json.loads(text)["special_tokens"]["target_to_draft"] == {"<|endoftext|>": "</s>"}


def test_the_command_looks_at_the_users_text(capsys, tmp_path):
    own = tmp_path / "text"
    own.write_text("Мой текст.\nИ ещё одна строка.\n", encoding="utf-8")
    _, usual, _ = run(capsys, MODELS / "target", MODELS / "draft", "--json")
    _, found, _ = run(capsys, MODELS / "target", MODELS / "draft", "--json", "--text", own)
    assert json.loads(found)["blocks"] != json.loads(usual)["blocks"]


def test_a_tokenizer_alone_is_enough(capsys, data_folder):
    need("tokenizers", "gpt2")
    status, text, _ = run(capsys, data_folder / "tokenizers" / "gpt2", MODELS / "draft")
    assert status == 0
    assert "byte-exact" in text


@pytest.mark.parametrize("arguments", [("/no/such/model", MODELS / "draft"), (MODELS / "target", MODELS)])
def test_a_model_that_is_not_there_is_refused_in_a_sentence(capsys, arguments):
    status, text, error = run(capsys, *arguments)
    assert (status, text) == (1, "")
    assert error.startswith("vllm-tokentiming: cannot load the tokenizer of")
    assert error.count("\n") == 1
