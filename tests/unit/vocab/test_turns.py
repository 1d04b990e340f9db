"""Chats cross from one template to another."""

import itertools
from functools import cache
from pathlib import Path

import pytest
from conftest import MODELS, need
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vllm_tokentiming.context import DraftContext
from vllm_tokentiming.vocab.chat_template import boundaries, chat_template, pieces_of
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair

TEMPLATES = Path(__file__).parent / "chat_templates"
# The special tokens of some families, the begin-of-text token first if there is one; their templates are in
# `chat_templates`. ChatML's three are of the embedded target's vocabulary, which has these tokens and no other.
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FAMILIES = {
    "chatml": [],
    "qwen2.5": [],
    "smollm2": [],
    "llama3": HEADERS,
    "llama3.2": HEADERS,
    "gemma2": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "gemma3": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "[INST]", "[/INST]"],
    "zephyr": ["<s>"],
}
BEGIN = {family: special[0] for family, special in FAMILIES.items() if special} | {"smollm2": "<|im_start|>"}
# System prompts that a template adds by itself, and all that it writes with one.
DATES = "Knowledge until: December 2023\nIt is today: 26 Jul 2024\n\n"
SMOL = "You help people, and your name is Smol. Whoever trained you gave you this prompt."
QWEN = "You are Qwen. Whoever made you gave you this prompt, and you help with everything."
OWN = {
    "smollm2": (SMOL, f"<|im_start|>system\n{SMOL}<|im_end|>\n"),
    "qwen2.5": (QWEN, f"<|im_start|>system\n{QWEN}<|im_end|>\n"),
    "llama3.2": (DATES, f"<|start_header_id|>system<|end_header_id|>\n\n{DATES}<|eot_id|>"),
}
CHATS = {
    "user": [("user", "Where are the keys?")],
    "system": [("system", "Be kind."), ("user", "Где ключи?")],
    "turns": [("user", "Что это?"), ("assistant", "Это река.\n\nБольшая."), ("user", "世界?")],
    "system and turns": [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c?")],
    "many turns": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "end of turn")],
    "tool": [("user", "Is it cold?"), ("assistant", "I look."), ("tool", "-5 degrees")],
    "tool and turns": [
        ("user", "Is it cold?"), ("assistant", "I look."), ("tool", "-5 degrees"), ("assistant", "Yes."), ("user", "O!")
    ],
    "two tools": [("user", "Is it cold?"), ("assistant", "I look."), ("tool", "-5 degrees"), ("tool", "snow")],
}  # fmt: skip
# What cannot be reached: why, and between which target and draft, in which chats.
FOLDING = ("gemma3", "mistral")  # They write the system message into a user message.
UNREACHABLE = {
    "where the target writes the system message into a user message, nothing tells the two apart": (
        lambda target, draft, chat: "system" in chat and target in FOLDING and draft not in FOLDING
    ),
    "Mistral's template writes the system message into the last user message, others before the first": (
        lambda target, draft, chat: (
            "turns" in chat
            and (target, draft).count("mistral") == 1
            and ("system" in chat or (draft == "mistral" and target in OWN))
        )
    ),
    "the target writes two tool results into one turn, with nothing but ordinary text between them": (
        lambda target, draft, chat: chat == "two tools" and target == "qwen2.5" != draft
    ),
}


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    special, template = FAMILIES[family], (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    backend = Tokenizer.from_file(str(MODELS / ("draft" if special else "target") / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BEGIN.get(family), chat_template=template.removesuffix("\n")
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


@cache
def vocabulary(family: str) -> Vocabulary:
    tokenizer = tokenizer_of(family)
    return Vocabulary.of(tokenizer.backend_tokenizer, 0, tokenizer.bos_token_id, None, chat_template(tokenizer))


def rendered(family: str, chat: list[tuple[str, str]]) -> str | None:
    """A chat in a family's template, with a reply asked for; `None` if the template does not have such chats."""
    messages = [{"role": role, "content": content} for role, content in chat]
    try:
        text = tokenizer_of(family).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return None
    return text if all(content.strip() in text for _, content in chat) else None


def read_by_the_draft(family: str, chat: list[tuple[str, str]], target: str) -> str | None:
    """What a draft should read: its own rendering, with the target's own system prompt in place of its own."""
    if family == target:
        return rendered(family, chat)
    if target in OWN:  # A prompt that is always there, even before the user's, crosses as it is.
        if chat[0][0] != "system":
            chat = [("system", "OWN"), *chat]
        elif target == "llama3.2":
            chat = [("system", "OWN" + chat[0][1]), *chat[1:]]
    text = rendered(family, chat)
    if text is None:
        return None
    if family in OWN:
        words, turn = OWN[family]
        text = text.replace(words if chat[0][0] == "system" else turn, "", 1)
    if target in OWN:
        text = text.replace("OWN", OWN[target][0], 1)
    # Mistral's asks for nothing: what the target writes comes where a reply that is there would.
    return text + " " if family == "mistral" else text


CASES = [
    (target, draft, chat)
    for target, draft in itertools.product(FAMILIES, repeat=2)
    for chat, messages in CHATS.items()
    if rendered(target, messages) is not None and read_by_the_draft(draft, messages, target) is not None
]


@pytest.mark.parametrize(("target_family", "draft_family", "chat"), CASES)
def test_the_draft_reads_a_chat_as_its_own_template_writes_it(target_family, draft_family, chat):
    target, draft = vocabulary(target_family), vocabulary(draft_family)
    pair = VocabularyPair.of(target, draft)
    draft_ids = read_of(pair, ids_of(target_family, rendered(target_family, CHATS[chat])))
    wanted: list[int] = []
    for piece in pieces_of(read_by_the_draft(draft_family, CHATS[chat], target_family), draft.special.by_text):
        wanted += [piece] if isinstance(piece, int) else draft.encoder.encode(piece)
    # Some tokenizers begin every text with a token that their template does not write.
    if wanted[: len(pair.draft_prefix)] != pair.draft_prefix and not pair.is_chat(wanted):
        wanted = pair.draft_prefix + wanted
    reasons = [why for why, is_so in UNREACHABLE.items() if is_so(target_family, draft_family, chat)]
    if reasons:
        assert draft_ids != wanted, f"no longer so: {reasons[0]}"
    else:
        decode = tokenizer_of(draft_family).decode
        assert (decode(draft_ids), draft_ids) == (decode(wanted), wanted)


@cache
def published(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(need("tokenizers", name))


def ids_of(family: str, text: str) -> list[int]:
    return tokenizer_of(family)(text, add_special_tokens=False)["input_ids"]


def read_of(pair: VocabularyPair, *commits: list[int]) -> list[int]:
    context = DraftContext(pair)
    for target_ids in commits:
        context.commit(target_ids)
    return context.draft_ids


@pytest.mark.parametrize(("target_name", "draft_name"), itertools.permutations(["llama3", "qwen2.5"]))
def test_published_tokenizers_and_templates_cross(target_name, draft_name):
    target, draft = published(target_name), published(draft_name)
    sides = [
        Vocabulary.of(side.backend_tokenizer, 0, side.bos_token_id, None, chat_template(side))
        for side in (target, draft)
    ]
    pair = VocabularyPair.of(*sides)
    for chat in ("user", "turns", "tool and turns"):
        # With a system message, neither template adds one.
        messages = [{"role": role, "content": content} for role, content in [("system", "Be kind."), *CHATS[chat]]]
        target_ids = target.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        wanted = draft.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert read_of(pair, target_ids) == wanted


def test_a_message_may_begin_inside_a_token_of_what_stands_before_it():
    pair = VocabularyPair.of(vocabulary("chatml"), vocabulary("gemma2"))
    text = "<|im_start|>user\n\na<|im_end|>\n<|im_start|>assistant\n"
    assert ids_of("chatml", text)[2] == ids_of("chatml", "\n\n")[0]
    context = tokenizer_of("gemma2").decode(read_of(pair, ids_of("chatml", text)))
    assert context == "<bos><start_of_turn>user\n\na<end_of_turn>\n<start_of_turn>model\n"


def test_a_user_may_write_what_the_target_writes_after_a_tools_result():
    pair = VocabularyPair.of(vocabulary("qwen2.5"), vocabulary("llama3"))
    chat = [("system", "a"), ("user", "What is this?\n</tool_response>")]
    context = read_of(pair, ids_of("qwen2.5", rendered("qwen2.5", chat)))
    assert tokenizer_of("llama3").decode(context) == rendered("llama3", chat)


def test_only_what_the_template_has_is_looked_at():
    def render(chat, ask):
        if any(message["role"] != "user" for message in chat):
            raise ValueError("only users")
        return "".join(f"[{message['content']}]" for message in chat)

    assert boundaries(render) == {}
    found = boundaries(chat_template(tokenizer_of("gemma2")))
    assert "first system" not in found
    assert found["user assistant"] == "<end_of_turn>\n<start_of_turn>model\n"
    assert found["any user"] == "<start_of_turn>user\n"


def test_users_can_have_the_draft_read_the_targets_template():
    target, draft = vocabulary("chatml"), vocabulary("llama3")
    assert VocabularyPair.of(target, draft).turns.texts
    assert not VocabularyPair.of(target, draft, own_turns=False).turns.by_first


def test_equal_templates_need_nothing():
    pair = VocabularyPair.of(vocabulary("chatml"), vocabulary("chatml"))
    assert not pair.turns.texts


def test_a_mark_that_the_draft_has_not_is_not_spelt_out():
    # Without boundaries (the user has another template), `<|end_header_id|>` means nothing to a ChatML draft.
    target, draft = vocabulary("llama3"), vocabulary("chatml")
    pair = VocabularyPair.of(target, draft, own_turns=False)
    context = DraftContext(pair)
    context.commit(tokenizer_of("llama3")("<|start_header_id|>user<|end_header_id|>\n\nHello")["input_ids"])
    special = draft.special.by_text
    assert context.draft_ids == [special["<|im_start|>"], *draft.encoder.encode(b"user\n\nHello")]
