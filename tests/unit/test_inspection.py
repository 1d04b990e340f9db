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


def _broken(folder, kind):
    """A folder whose tokenizer cannot be used, and what is to be said about it."""
    folder.mkdir()
    content = (MODELS / "draft" / "tokenizer.json").read_text(encoding="utf-8")
    if kind == "no folder":
        return folder / "nothing", "there is no such folder"
    if kind == "empty":
        return folder, "the folder has none; put a tokenizer.json into that folder"
    if kind == "settings only":
        folder.joinpath("tokenizer_config.json").write_text("{}")
        return folder, "the folder has none; put a tokenizer.json into that folder"
    folder.joinpath("tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    file = folder / "tokenizer.json"
    file.write_text(content)
    if kind == "file":
        return file, f"this is a file; name the folder that it is in, {str(folder)!r}"
    if kind == "cut":
        file.write_text(content[:5000])
        return folder, "its tokenizer.json is not valid JSON"
    if kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
        return folder, "git lfs pull"
    file.write_text('{"a": 1}')
    return folder, "its tokenizer.json does not describe a tokenizer"


BROKEN = ["no folder", "empty", "settings only", "file", "cut", "pointer", "other"]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_tokenizer_that_cannot_be_used_is_refused_with_the_reason(capsys, tmp_path, kind):
    name, told = _broken(tmp_path / "model", kind)
    status, text, error = run(capsys, MODELS / "target", name)
    assert (status, text) == (1, "")
    assert told in error and error.count("\n") == 1


def test_a_name_that_the_hub_cannot_give_is_refused_with_the_whole_reason(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, _, error = run(capsys, MODELS / "target", "nobody/such-a-model")
    assert "this is no folder here" in error and "HF_HUB_OFFLINE is set" in error
    assert error.count("\n") == 1


def test_a_home_folder_is_found(capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(MODELS))
    assert run(capsys, "~/target", "~/draft")[0] == 0


@pytest.mark.parametrize(
    ("content", "told"), [(None, "No such file"), (b"", "it is empty"), (b"\xff\xfe", "it is not UTF-8 text")]
)
def test_a_text_that_cannot_be_read_is_refused_by_name(capsys, tmp_path, content, told):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    status, text, error = run(capsys, MODELS / "target", MODELS / "draft", "--text", file)
    assert (status, text) == (1, "")
    assert told in error and repr(str(file)) in error and error.count("\n") == 1
