"""Chats cross from one template to another."""

import itertools
from functools import cache

import pytest
from conftest import MODELS
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vllm_tokentiming.context import DraftContext
from vllm_tokentiming.pair import Vocabulary, VocabularyPair
from vllm_tokentiming.turns import boundaries, chat_template, pieces_of

LOOP = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}"
HEADER = "<|start_header_id|>"
# Special tokens and templates in the manner of some families.
FAMILIES = {
    "chatml": (
        ["<|im_start|>", "<|im_end|>"],
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + ASK + "<|im_start|>assistant\n{% endif %}",
    ),
    "headers": (
        ["<|begin_of_text|>", HEADER, "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>" + LOOP + HEADER + "{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
        + ASK + HEADER + "assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "turns": (
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>" + LOOP + "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
        + ASK + "<start_of_turn>model\n{% endif %}",
    ),
    "brackets": (
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "<s>" + LOOP + "{% if m.role == 'assistant' %} {{ m.content }}</s>"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    ),
}  # fmt: skip
# Whose vocabulary each has as a draft: the draft's has a begin-of-text token, which ChatML does not write.
DRAFTS = {family: "target" if family == "chatml" else "draft" for family in FAMILIES}
# What brackets write between messages begins with ordinary text, which in a target cannot be told from content.
PAIRS = [pair for pair in itertools.permutations(FAMILIES, 2) if pair[0] != "brackets"]
CHATS = [
    [("user", "Where are the keys?")],
    [("user", "Что это?"), ("assistant", "Это река.\n\nБольшая."), ("user", "世界?")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "<|im_end|> in words")],
]


@cache
def tokenizer_of(family: str, model: str) -> PreTrainedTokenizerFast:
    special, template = FAMILIES[family]
    backend = Tokenizer.from_file(str(MODELS / model / "tokenizer.json"))
    begin = next((text for text in special if text in ("<|begin_of_text|>", "<bos>", "<s>")), None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


@cache
def vocabulary(family: str, model: str) -> Vocabulary:
    tokenizer = tokenizer_of(family, model)
    begin = tokenizer.bos_token_id
    return Vocabulary.of(tokenizer.backend_tokenizer, 0, begin, None, chat_template(tokenizer))


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content.replace("<|im_end|>", "im_end")} for role, content in chat]


@pytest.mark.parametrize("chat", CHATS, ids=len)
@pytest.mark.parametrize("families", PAIRS, ids="-".join)
def test_the_draft_reads_a_chat_as_its_own_template_writes_it(families, chat):
    target_family, draft_family = families
    target, draft = vocabulary(target_family, "target"), vocabulary(draft_family, DRAFTS[draft_family])
    context = DraftContext(VocabularyPair.of(target, draft))
    rendered = tokenizer_of(target_family, "target").apply_chat_template(
        messages(chat), tokenize=False, add_generation_prompt=True
    )
    context.commit(tokenizer_of(target_family, "target")(rendered, add_special_tokens=False)["input_ids"])
    wanted = tokenizer_of(draft_family, DRAFTS[draft_family]).apply_chat_template(
        messages(chat), tokenize=False, add_generation_prompt=True
    )
    # This one asks for nothing; what the target writes comes where a reply that is there would.
    wanted += " " if draft_family == "brackets" else ""
    spelt: list[int] = []
    for piece in pieces_of(wanted, draft.special.by_text):
        spelt += [piece] if isinstance(piece, int) else draft.encoder.encode(piece)
    assert context.draft_ids == spelt


def test_only_what_the_template_has_is_looked_at():
    def render(chat, ask):
        if any(message["role"] != "user" for message in chat):
            raise ValueError("only users")
        return "".join(f"[{message['content']}]" for message in chat)

    assert boundaries(render) == {}
    found = boundaries(chat_template(tokenizer_of("turns", "target")))
    assert "first system" not in found
    assert found["user assistant"] == "<end_of_turn>\n<start_of_turn>model\n"
    assert found["any user"] == "<start_of_turn>user\n"


def test_a_prompt_that_a_template_adds_is_content():
    family = "chatml"
    tokenizer = tokenizer_of(family, "target")
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    own += "You are a very helpful assistant that adds this.<|im_end|>\n{% endif %}"
    backend = tokenizer.backend_tokenizer
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=own + tokenizer.chat_template)
    target = Vocabulary.of(backend, 0, None, None, chat_template(adding))
    pair = VocabularyPair.of(target, vocabulary("headers", "draft"))
    assert "first user" not in pair.turns.texts
    context = DraftContext(pair)
    rendered = adding.apply_chat_template(messages(CHATS[0]), tokenize=False, add_generation_prompt=True)
    context.commit(adding(rendered, add_special_tokens=False)["input_ids"])
    assert b"adds this." in pair.draft.token_bytes.decode(context.draft_ids)


def test_users_can_have_the_draft_read_the_targets_template():
    target, draft = vocabulary("chatml", "target"), vocabulary("headers", "draft")
    assert VocabularyPair.of(target, draft).turns.texts
    assert not VocabularyPair.of(target, draft, own_turns=False).turns.by_first


def test_equal_templates_need_nothing():
    pair = VocabularyPair.of(vocabulary("chatml", "target"), vocabulary("chatml", DRAFTS["chatml"]))
    assert not pair.turns.texts


def test_a_mark_that_the_draft_has_not_is_not_spelt_out():
    # Without boundaries (the user has another template), `<|end_header_id|>` means nothing to a ChatML draft.
    target, draft = vocabulary("headers", "draft"), vocabulary("chatml", DRAFTS["chatml"])
    pair = VocabularyPair.of(target, draft, own_turns=False)
    context = DraftContext(pair)
    context.commit(tokenizer_of("headers", "draft")("<|start_header_id|>user<|end_header_id|>\n\nHello")["input_ids"])
    special = draft.special.by_text
    assert context.draft_ids == [special["<|im_start|>"], *draft.encoder.encode(b"user\n\nHello")]
