"""Special tokens cross between vocabularies by the user's word, by role, or by text; never by accident."""

from dataclasses import replace

import pytest
from conftest import load_pair, load_tokenizer, load_vocabulary
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair
from vllm_tokentiming.vocab.special_tokens import Role, SpecialMap, SpecialTokens
from vllm_tokentiming.vocab.token_bytes import TokenBytes, VocabularyKind


def special(*texts: str, bos: str | None = None, eos: str | None = None, first_id: int = 0) -> SpecialTokens:
    """A vocabulary of these special tokens only, with ids from `first_id` on."""
    ids = {text: first_id + index for index, text in enumerate(texts)}
    token_bytes = TokenBytes({}, {i: text for text, i in ids.items()}, VocabularyKind.PLAIN, 0)
    return SpecialTokens.of(token_bytes, None if bos is None else ids[bos], None if eos is None else ids[eos])


def crossing(target: SpecialTokens, draft: SpecialTokens, **overrides) -> tuple[dict[str, str], dict[str, str]]:
    """Both directions of the map, by text."""
    special_map = SpecialMap.between(target, draft, overrides, "text")
    target_text = {i: text for text, i in target.by_text.items()}
    draft_text = {i: text for text, i in draft.by_text.items()}
    return (
        {target_text[t]: draft_text[d] for t, d in special_map.to_draft.items()},
        {draft_text[d]: target_text[t] for d, t in special_map.to_target.items()},
    )


LLAMA2 = special("<unk>", "<s>", "</s>", bos="<s>", eos="</s>")
QWEN = special("<|endoftext|>", "<|im_start|>", "<|im_end|>", eos="<|im_end|>", first_id=100)
GPT2 = special("<|endoftext|>", bos="<|endoftext|>", eos="<|endoftext|>", first_id=50)
SMOLLM2 = special("<|endoftext|>", "<|im_start|>", "<|im_end|>", bos="<|im_start|>", eos="<|im_end|>", first_id=30)
LLAMA3 = special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>", bos="<|begin_of_text|>")
BERT = special("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", first_id=20)


def test_roles_are_known_by_text():
    roles = special("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>").by_role
    assert roles == {Role.BEGIN: 0, Role.END: 1, Role.START_OF_TURN: 2, Role.END_OF_TURN: 3}


def test_the_configuration_of_the_tokenizer_wins_over_the_text():
    roles = special("<s>", "</s>", "[first]", "[last]", bos="[first]", eos="[last]").by_role
    assert roles == {Role.BEGIN: 2, Role.END: 3}


def test_an_end_of_turn_that_is_configured_as_the_end_leaves_both_roles_to_their_tokens():
    assert QWEN.by_role == {Role.END: 100, Role.START_OF_TURN: 101, Role.END_OF_TURN: 102}


def test_a_token_that_both_begins_and_ends_a_text_only_ends_it():
    assert GPT2.by_role == {Role.END: 50}


def test_a_token_that_begins_a_turn_does_not_begin_a_text_whatever_the_configuration_says():
    assert SMOLLM2.by_role == {Role.END: 30, Role.START_OF_TURN: 31, Role.END_OF_TURN: 32}
    to_draft, to_target = crossing(LLAMA3, SMOLLM2)
    starts = {"<|start_header_id|>": "<|im_start|>"}
    assert to_draft == {"<|end_of_text|>": "<|endoftext|>", "<|eot_id|>": "<|im_end|>"} | starts
    assert to_target == {draft_text: target_text for target_text, draft_text in to_draft.items()}


def test_a_vocabulary_without_special_tokens_has_no_roles():
    assert special().by_role == {} and special().by_text == {}


def test_special_tokens_cross_by_role():
    to_draft, to_target = crossing(LLAMA2, QWEN)
    assert to_draft == {"</s>": "<|endoftext|>"}
    assert to_target == {"<|endoftext|>": "</s>", "<|im_end|>": "</s>"}
    to_draft, to_target = crossing(QWEN, LLAMA2)
    assert to_draft == {"<|endoftext|>": "</s>"}
    assert to_target == {"</s>": "<|endoftext|>"}


def test_special_tokens_without_a_role_cross_by_text():
    target = special("<a>", "<b>", "</s>")
    draft = special("<b>", "<c>", "<eos>", first_id=10)
    assert crossing(target, draft) == ({"<b>": "<b>", "</s>": "<eos>"}, {"<b>": "<b>", "<eos>": "</s>"})


def test_a_role_wins_over_a_text():
    target = special("<|end|>", "</s>", eos="</s>")
    draft = special("<|end|>", "<|eot_id|>", first_id=10)
    assert draft.by_role[Role.END_OF_TURN] == 10
    draft = special("<|eot_id|>", "<|end|>", first_id=10)
    assert crossing(target, draft)[0] == {"<|end|>": "<|eot_id|>"}


def test_a_draft_that_ends_its_turn_proposes_the_one_end_that_the_target_has():
    turn_only = special("<|im_end|>")
    assert crossing(turn_only, LLAMA2)[1] == {"</s>": "<|im_end|>"}
    assert crossing(LLAMA2, turn_only)[1] == {"<|im_end|>": "</s>"}


def test_a_draft_never_proposes_to_begin_a_text():
    to_draft, to_target = crossing(LLAMA2, special("<s>", "</s>", first_id=7))
    assert to_draft == {"<s>": "<s>", "</s>": "</s>"}
    assert to_target == {"</s>": "</s>"}


@pytest.mark.parametrize("text", ["<unk>", "[UNK]", "<UNK>"])
def test_unk_never_crosses_by_itself(text):
    assert crossing(special(text), special(text, first_id=3)) == ({}, {})
    assert crossing(special(text), special(text, first_id=3), **{text: text})[1] == {}


def test_without_any_counterpart_nothing_crosses():
    assert crossing(BERT, LLAMA2) == ({}, {})
    assert crossing(special(), LLAMA2) == ({}, {})


def test_the_user_decides_where_a_token_goes():
    to_draft, to_target = crossing(QWEN, LLAMA2, **{"<|im_end|>": "</s>", "<|im_start|>": "<s>"})
    assert to_draft == {"<|endoftext|>": "</s>", "<|im_end|>": "</s>", "<|im_start|>": "<s>"}
    assert to_target == {"</s>": "<|endoftext|>"}


def test_the_user_may_drop_a_token():
    special_map = SpecialMap.between(QWEN, QWEN, {"<|im_start|>": None}, "text")
    assert special_map.dropped == {101}
    assert 101 not in special_map.to_draft
    assert special_map.unmapped == "text"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"<nope>": "</s>"}, "special_tokens: '<nope>' is not a special token of the target"),
        ({"<nope>": None}, "special_tokens: '<nope>' is not a special token of the target"),
        ({"<|im_end|>": "<nope>"}, "special_tokens: '<nope>' is not a special token of the draft"),
    ],
)
def test_the_user_cannot_name_tokens_that_are_not_special(overrides, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        SpecialMap.between(QWEN, LLAMA2, overrides, "text")


# What a draft may write.


def test_a_draft_may_write_what_has_bytes_and_what_ends_a_text(embedded):
    pair = embedded.pair
    refused = [i for i, may in enumerate(pair.draftable.tolist()) if not may]
    assert {pair.draft.token_bytes.special[i] for i in refused} == {"<unk>", "<s>"}
    assert pair.draftable[pair.draft.special.by_role[Role.END]]


def test_a_draft_may_not_write_padding_rows_nor_gaps():
    target = load_vocabulary("embedded_target")
    pieces = {0: b"a", 2: b"b", 3: b""}
    token_bytes = TokenBytes(pieces, {4: "<unk>", 5: "<s>", 6: "</s>"}, VocabularyKind.PLAIN, 12)
    special = SpecialTokens.of(token_bytes, None, None)
    draft = replace(target, token_bytes=token_bytes, special=special)
    draftable = VocabularyPair.of(target, draft).draftable
    assert draftable.tolist() == [i in (0, 2, 6) for i in range(12)]


@pytest.mark.parametrize("target", ["llama2", "mistral_tekken", "t5_small", "bert"])
@pytest.mark.parametrize("draft", ["llama2", "mistral_tekken", "t5_small", "bert"])
def test_a_draft_may_not_write_unk_nor_begin_a_text_even_where_the_target_has_the_same(target, draft):
    pair = load_pair(target, draft)
    by_text = pair.draft.special.by_text
    never = {by_text[text] for text in ("<unk>", "[UNK]", "<s>") if text in by_text}
    assert never and not pair.draftable[list(never)].any()
    assert pair.draftable[pair.draft.token_bytes.lengths > 0].all()
    assert set(pair.special.to_target) == {i for i in by_text.values() if pair.draftable[i]}


def test_a_padded_head_has_as_many_rows_as_it_says_and_none_of_the_padding_may_be_written():
    vocabulary = load_vocabulary("gpt2")
    padded = TokenBytes({0: b"a"}, {}, VocabularyKind.PLAIN, vocabulary.token_bytes.size + 47)
    draft = replace(vocabulary, token_bytes=padded, special=SpecialTokens.of(padded, None, None))
    draftable = VocabularyPair.of(vocabulary, draft).draftable
    assert draftable.shape == (vocabulary.token_bytes.size + 47,) and draftable.sum() == 1


# What comes before a text.


@pytest.mark.parametrize(
    ("draft", "texts"),
    [
        # What the tokenizer itself writes.
        *((name, ["<s>"]) for name in ("llama2", "mistral_tekken")), ("bert", ["[CLS]"]),
        # What begins a text, though the tokenizer leaves it to others to write it.
        ("embedded_draft", ["<s>"]), ("llama3", ["<|begin_of_text|>"]),
        # What stands between documents.
        *((name, ["<|endoftext|>"]) for name in ("embedded_target", "gpt2", "gpt_neox_20b", "qwen2.5")),
    ],
)  # fmt: skip
def test_what_comes_before_a_text_depends_on_the_drafts_tokenizer(draft, texts):
    pair = load_pair("embedded_target", draft)
    assert [pair.draft.token_bytes.special[i] for i in pair.draft_prefix] == texts


def test_a_tokenizer_may_write_more_than_one_token_before_a_text():
    tokenizer = Tokenizer.from_str(load_tokenizer("embedded_draft").to_str())
    tokenizer.post_processor = TemplateProcessing(single="</s> <s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    pair = VocabularyPair.of(load_vocabulary("embedded_target"), Vocabulary.of(tokenizer))
    assert pair.draft_prefix == [2, 1]


def test_an_end_that_ends_messages_does_not_separate_documents():
    def render(chat, ask):
        return "".join(f"{m['role']}: {m['content']}<|endoftext|>" for m in chat) + "assistant: " * ask

    ends = Vocabulary.of(load_tokenizer("embedded_target"), render=render)
    assert VocabularyPair.of(load_vocabulary("embedded_draft"), ends).draft_prefix == []


@pytest.mark.parametrize(("target", "draft"), [("llama3", "qwen2.5"), ("qwen2.5", "llama3")])
def test_the_turns_of_real_chat_models_cross_by_role(target, draft):
    pair = load_pair(target, draft)
    names = {
        "llama3": ("<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"),
        "qwen2.5": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    }
    for target_text, draft_text in zip(names[target], names[draft], strict=True):
        target_id, draft_id = pair.target.special.by_text[target_text], pair.draft.special.by_text[draft_text]
        assert pair.special.to_draft[target_id] == draft_id
        assert pair.special.to_target[draft_id] == target_id
