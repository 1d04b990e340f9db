"""Settings are read as they are meant; what cannot work is refused in a sentence that says what to change."""

import json
import os

import pytest
from conftest import examples
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_tokentiming.config import (
    PROPOSER,
    VERIFICATIONS,
    SettingsError,
    TokenTimingConfig,
    check_verification,
    reason,
    refuse_misnamed,
    settings_in,
    split_speculative_config,
)


def refusal(settings_: dict) -> str:
    with pytest.raises(SettingsError) as caught:
        TokenTimingConfig.parse(settings_)
    return str(caught.value)


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message
    assert message.startswith("tokentiming") and message.endswith(".") and len(message) < 600


def test_a_draft_model_is_all_that_is_needed():
    config = TokenTimingConfig.parse({"model": "some/draft"})
    assert config.model == "some/draft"
    assert config.strategy == "tokentiming"
    assert config.dtw_window == 8
    assert config.unmapped_special_tokens == "text"
    assert config.special_tokens == {}
    assert config.tokenizer is config.max_model_len is config.kv_memory_gib is config.max_draft_tokens is None


EVERYTHING = {
    "model": "/folder/draft",
    "revision": "main",
    "tokenizer": "/folder/tokenizer",
    "tokenizer_revision": "v2",
    "dtype": "float32",
    "quantization": "fp8",
    "max_model_len": 512,
    "kv_memory_gib": 1,
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "max_draft_tokens": 12,
    "learned_weights_folder": "/folder/learned",
    "dtw_window": 3,
    "strategy": "tokentiming",
    "special_tokens": {"<|im_end|>": "</s>", "<|im_start|>": None},
    "unmapped_special_tokens": "drop",
}


def test_every_setting_arrives_as_it_was_given():
    config = TokenTimingConfig.parse(EVERYTHING)
    assert {key: getattr(config, key) for key in EVERYTHING} == EVERYTHING


def test_settings_survive_the_way_to_the_workers_as_plain_json():
    config = TokenTimingConfig.parse(EVERYTHING)
    again = TokenTimingConfig.parse(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config


def test_settings_cannot_be_changed_later():
    config = TokenTimingConfig.parse({"model": "some/draft"})
    with pytest.raises(ValidationError):
        config.dtw_window = 2
    assert config.dtw_window == 8


def test_reading_settings_leaves_the_users_dictionary_alone():
    given_settings = {"model": "some/draft", "special_tokens": {"<s>": None}}
    TokenTimingConfig.parse(given_settings)
    assert given_settings == {"model": "some/draft", "special_tokens": {"<s>": None}}


def test_without_a_draft_model_the_refusal_says_how_to_name_one():
    message = refusal({"dtw_window": 3})
    assert_one_sentence(message)
    assert '"model"' in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", ""),
        ("model", 3),
        ("model", None),
        ("revision", 1),
        ("tokenizer", ["a"]),
        ("dtype", None),
        ("max_model_len", 0),
        ("max_model_len", "512"),
        ("max_model_len", 1.5),
        ("kv_memory_gib", 0),
        ("kv_memory_gib", -1.0),
        ("kv_memory_gib", "2"),
        ("kv_memory_gib", float("inf")),
        ("enforce_eager", "yes"),
        ("enforce_eager", 1),
        ("max_draft_tokens", 0),
        ("max_draft_tokens", True),
        ("online_learning", 1),
        ("learned_weights_folder", ""),
        ("learned_weights_folder", 1),
        ("dtw_window", 0),
        ("dtw_window", None),
        ("strategy", "magic"),
        ("strategy", "two\nlines"),
        ("special_tokens", None),
        ("special_tokens", ["<s>"]),
        ("special_tokens", {"<s>": 3}),
        ("unmapped_special_tokens", "keep"),
    ],
)
def test_a_value_that_cannot_work_is_refused_in_one_sentence_that_names_the_setting(key, value):
    message = refusal({"model": "some/draft", key: value})
    assert_one_sentence(message)
    assert f"{key} is {value!r}" in message


def test_a_setting_that_is_gone_is_refused_as_any_unknown_one():
    message = refusal({"model": "some/draft", "alignment_prior": 1.0})
    assert_one_sentence(message)
    assert "does not know the setting 'alignment_prior'" in message


def test_a_choice_that_does_not_exist_is_refused_with_those_that_do():
    assert "'text' or 'drop'" in refusal({"model": "m", "unmapped_special_tokens": "keep"})


@pytest.mark.parametrize(
    ("key", "meant"),
    [("dtw_windw", "dtw_window"), ("Model", "model"), ("max_draft_token", "max_draft_tokens")],
)
def test_a_misspelled_setting_is_refused_with_the_one_that_was_meant(key, meant):
    message = refusal({"model": "some/draft", key: 1})
    assert_one_sentence(message)
    assert f"{key!r}" in message and f"did you mean {meant!r}?" in message


def test_a_misspelled_model_is_refused_as_misspelled_and_not_as_missing():
    message = refusal({"modle": "some/draft"})
    assert_one_sentence(message)
    assert "'modle'" in message and "did you mean 'model'?" in message


def test_settings_that_are_no_dictionary_are_refused():
    for wrong in ("x", ["model"], 3):
        message = refusal(wrong)
        assert_one_sentence(message)
        assert repr(wrong) in message and '{"model": "<draft model>"}' in message


def test_a_home_folder_is_found_though_no_shell_has_read_the_settings(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    config = TokenTimingConfig.parse({"model": "~/draft", "tokenizer": "~/tokenizer"})
    assert (config.model, config.tokenizer) == ("/somebody/draft", "/somebody/tokenizer")


def test_a_setting_unlike_any_other_is_refused_with_all_there_are():
    message = refusal({"model": "some/draft", "xyzzy": 1})
    assert "\n" not in message and "'xyzzy'" in message
    assert all(name in message for name in TokenTimingConfig.model_fields)


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)
keys = st.sampled_from([*TokenTimingConfig.model_fields]) | st.text(max_size=12) | st.integers()


@given(
    st.sampled_from([{}, {"model": "m"}, {"model": "m"}]),
    st.dictionaries(keys, values | st.dictionaries(st.text(max_size=3), values, max_size=2), max_size=3),
)
@examples(300)
@example({"model": "m"}, {1: 2})
@example({"model": "m"}, {"two\nlines": 2})
@example({"model": "m"}, {"kv_memory_gib": float("nan")})
@example({"model": "m"}, {"kv_memory_gib": float("inf")})
def test_whatever_is_given_it_is_read_or_refused_in_one_line(model, others):
    given_settings = {**model, **others}
    try:
        config = TokenTimingConfig.parse(given_settings)
    except SettingsError as error:
        message = str(error)
        assert "\n" not in message and message.startswith("tokentiming")
        assert '"model"' in message or any(str(key) in message or repr(key) in message for key in given_settings)
    else:
        for key in ("model", "tokenizer", "learned_weights_folder"):
            if given_settings.get(key):
                given_settings[key] = os.path.expanduser(given_settings[key])
        assert all(getattr(config, str(key)) == value for key, value in given_settings.items())


def test_a_strategy_that_changes_the_output_has_to_be_allowed():
    paper = {"model": "some/draft", "strategy": "tokentiming-paper"}
    message = refusal(paper)
    assert_one_sentence(message)
    assert '"allow_inexact"' in message
    assert TokenTimingConfig.parse({**paper, "allow_inexact": True}).strategy == "tokentiming-paper"


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"online_learning": False}, '"online_learning" is false'),
        ({"strategy": "slem"}, '"slem" never learns'),
        ({"strategy": "tli"}, '"tli" never learns'),
        ({"strategy": "tokentiming-paper", "allow_inexact": True}, '"tokentiming-paper" never learns'),
    ],
)
def test_a_folder_for_what_is_learned_is_refused_where_nothing_is_learned(settings, part):
    message = refusal({"model": "some/draft", "learned_weights_folder": "/f", **settings})
    assert_one_sentence(message)
    assert "learned_weights_folder is '/f'" in message and part in message


def test_the_folder_for_what_is_learned_may_be_in_the_home():
    config = TokenTimingConfig.parse({"model": "some/draft", "learned_weights_folder": "~/learned"})
    assert config.learned_weights_folder == os.path.expanduser("~/learned")


# Beside vLLM's own settings.


def test_vllms_settings_go_to_vllm_and_the_others_to_us():
    speculative = {
        "method": "tokentiming",
        "model": "some/draft",
        "num_speculative_tokens": 5,
        "dtw_window": 4,
    }
    vllm_part, ours = split_speculative_config(speculative)
    assert vllm_part == {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 5}
    assert ours == {"model": "some/draft", "dtw_window": 4}
    assert speculative["method"] == "tokentiming", "the user's dictionary is not changed"


def test_a_setting_that_nobody_knows_is_left_to_us_to_refuse():
    _, ours = split_speculative_config({"num_speculative_tokens": 1, "model": "m", "numspec": 2})
    assert "'numspec'" in refusal(ours)


def test_the_rejection_method_is_vllms():
    vllm_part, ours = split_speculative_config({"num_speculative_tokens": 1, "rejection_sample_method": "standard"})
    assert vllm_part["rejection_sample_method"] == "standard" and ours == {}


@pytest.mark.parametrize(
    ("method", "allow_inexact", "part"),
    [
        ("synthetic", False, '"allow_inexact"'),
        ("fly", False, '"allow_inexact"'),
        ("what is not known yet", False, 'set it to "block" or "standard"'),
        ("what is not known yet", True, 'set it to "block" or "standard"'),
    ],
)
def test_a_way_to_verify_that_is_not_exact_or_not_known_is_refused(method, allow_inexact, part):
    settings = TokenTimingConfig.parse({"model": "some/draft", "allow_inexact": allow_inexact})
    with pytest.raises(SettingsError) as caught:
        check_verification(method, settings)
    assert_one_sentence(str(caught.value))
    assert repr(method) in str(caught.value) and part in str(caught.value)


def test_a_way_to_verify_that_is_done_is_accepted():
    for method in VERIFICATIONS:
        check_verification(method, TokenTimingConfig.parse({"model": "some/draft"}))
    check_verification("fly", TokenTimingConfig.parse({"model": "some/draft", "allow_inexact": True}))


@pytest.mark.parametrize("num", [{}, *({"num_speculative_tokens": bad} for bad in (None, 0, -2, "5", 2.0, True))])
def test_without_a_number_of_proposals_the_refusal_says_which_is_good(num):
    with pytest.raises(SettingsError) as caught:
        split_speculative_config({"method": "tokentiming", "model": "some/draft", **num})
    assert_one_sentence(str(caught.value))
    assert '"num_speculative_tokens"' in str(caught.value)


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        ("5", "is a text: write the number without quotes"),
        (5.0, "has a point: write a whole number"),
        (0, "is too few: it has to be 1 or more"),
        (-1, "is too few: it has to be 1 or more"),
        (True, "is not a number: write a whole number"),
        ([5], "is not a number: write a whole number"),
    ],
)
def test_a_wrong_number_of_proposals_is_refused_with_what_is_wrong_with_it(number, fault):
    with pytest.raises(SettingsError) as caught:
        split_speculative_config({"method": "tokentiming", "model": "m", "num_speculative_tokens": number})
    assert_one_sentence(str(caught.value))
    assert f"is {number!r}, which {fault}" in str(caught.value)


# What was meant for us.


@pytest.mark.parametrize(
    "method", ["TokenTiming", "token_timing", "token-timing", "Token Timing", "tokentimming", "TOKENTIMING "]
)
def test_a_misspelled_method_is_refused_with_the_right_one(method):
    with pytest.raises(SettingsError, match='did you mean "tokentiming"') as caught:
        refuse_misnamed(method, "some/draft", {})
    assert repr(method) in str(caught.value)


@pytest.mark.parametrize("model", ["vllm_tokentiming.TokenTimingPropose", "vllm-tokentiming.TokenTimingProposer"])
def test_a_misspelled_proposer_is_refused_with_the_right_one(model):
    with pytest.raises(SettingsError, match=f'did you mean "{PROPOSER}"'):
        refuse_misnamed("custom_class", model, {})


def test_settings_of_ours_without_a_method_are_refused():
    with pytest.raises(SettingsError, match='\'dtw_window\', but no method; add "method": "tokentiming"'):
        refuse_misnamed(None, "some/draft", {"model": "some/draft", "dtw_window": 3})


@pytest.mark.parametrize(
    ("method", "model", "given"),
    [
        (None, None, {}),
        (None, "some/draft", {"model": "some/draft", "num_speculative_tokens": 5, "revision": "x", "max_model_len": 9}),
        ("ngram", None, {"dtw_window": 3}),
        ("draft_model", "some/draft", {}),
        ("custom_class", "other.Proposer", {}),
        ("custom_class", PROPOSER, {}),
        ("tokentiming", "some/draft", {}),
        (3, 4, {}),
    ],
)
def test_what_others_are_called_is_left_alone(method, model, given):
    refuse_misnamed(method, model, given)


@pytest.mark.parametrize("wrong", ["x", ["x"], {}, {"TokenTiming": {"model": "m"}}, None])
def test_an_additional_config_without_settings_of_ours_is_refused(wrong):
    with pytest.raises(SettingsError, match="tokentiming has no settings: add --additional-config"):
        settings_in(wrong)


@pytest.mark.parametrize("wrong", ["x", ["x"], 3])
def test_settings_in_the_additional_config_that_are_no_dictionary_are_refused(wrong):
    with pytest.raises(SettingsError) as caught:
        settings_in({"tokentiming": wrong})
    assert_one_sentence(str(caught.value))
    assert repr(wrong) in str(caught.value) and '{"tokentiming": {"model": "<draft model>"}}' in str(caught.value)


# What others raise.


def test_a_reason_is_told_whole_and_in_one_line():
    error = OSError("Couldn't do it from one of:\n (1) a file,\n (2) another file.\n")
    assert reason(error) == "Couldn't do it from one of: (1) a file, (2) another file"
    assert reason(KeyError("added_tokens")) == "there is no 'added_tokens' in it"
    assert reason(OSError()) == "OSError"
    assert len(reason(ValueError("model, " * 1000))) < 700


def test_a_reason_of_pydantics_is_told_without_its_wrapping():
    with pytest.raises(ValidationError) as caught:
        TokenTimingConfig.model_validate({"model": "", "dtw_window": 0})
    assert reason(caught.value) == (
        "String should have at least 1 character; Input should be greater than or equal to 1"
    )
