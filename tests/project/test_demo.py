"""What `examples/demo.py` shows, and the draft that it shows it with."""

import json
import sys

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

sys.path.insert(0, str(ROOT / "examples"))
import demo

DRAFT = ROOT / "examples/models/smollm2-draft"


def test_without_smollm2_the_embedded_pair_is_shown_and_that_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "PUBLISHED", tmp_path / "smollm2")
    monkeypatch.setattr(demo, "WIDENED", tmp_path / "widened")
    assert demo.shown().target == ROOT / "examples/models/target"
    assert "the embedded pair is shown" in capsys.readouterr().out


def test_with_smollm2_its_own_draft_is_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "PUBLISHED", tmp_path)
    found = demo.shown()
    assert (found.target, found.draft) == (tmp_path, DRAFT) and not capsys.readouterr().out


def test_what_differs_is_named_by_prompt_and_token():
    prompts = [demo.Prompt("same", "a"), demo.Prompt("other", "b")]
    plain = [demo.Output("xy", [], [1, 2], 1.0), demo.Output("xz", [], [1, 3], 1.0)]
    written = [plain[0], demo.Output("xw", [], [1, 4], 1.0)]
    assert [sentence[:15] for sentence in demo.differences(prompts, plain, written)] == ["other, token 1:"]


@pytest.mark.parametrize("name", ["prompts.json", "chat.json"])
def test_the_prompts_are_read(name):
    prompts = [demo.Prompt(**fields) for fields in json.loads((ROOT / "examples" / name).read_text())]
    assert len({prompt.name for prompt in prompts}) == len(prompts) > 4


def test_the_draft_for_smollm2_is_small_and_has_a_vocabulary_and_a_chat_template_of_its_own():
    assert sum(path.stat().st_size for path in DRAFT.iterdir()) < 16e6
    tokenizer = AutoTokenizer.from_pretrained(DRAFT)
    written = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert len(tokenizer) == 4096 and "<|im_start|>user\nHello<|im_end|>" in written
