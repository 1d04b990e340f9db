"""What no worker could use is refused before a worker starts, by its name and with the reason."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from pathlib import Path

import engine
import psutil
import pytest
from front_end import CUSTOM, copy_files, refused

pytestmark = pytest.mark.engine


def _changed_config(folder: Path, **changes) -> str:
    """A copy of the draft with other values in its ``config.json``."""
    draft = copy_files(engine.DRAFT, folder / "draft", *os.listdir(engine.DRAFT))
    config = Path(draft, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return draft


def test_a_classifier_is_refused_as_a_draft(front_end, tmp_path):
    folder = _changed_config(tmp_path, architectures=["LlamaForSequenceClassification"])
    refused(front_end, engine.speculation(model=folder), folder, "scores or classes", "decoder-only language model")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"dtype": "float13"}, ("dtype is 'float13'", "'bfloat16'")),
        ({"quantization": "magic"}, ("quantization is 'magic'", "Unknown quantization method")),
        ({"quantization": "awq"}, ("quantization 'awq'", "change one of them")),
        ({"max_model_len": 10**6}, ("max_model_len is 1000000", "at most 2048", "lower it")),
        ({"revision": "main"}, ("revision is 'main'", "local folder", "leave revision out")),
        ({"tokenizer_revision": "main"}, ("tokenizer_revision is 'main'", "leave tokenizer_revision out")),
        ({"num_speculative_tokens": 512}, ('"num_speculative_tokens" is 512', "max_model_len", "4 to 8")),
        ({"q_memory_gib": 1e-6}, ("q_memory_gib is 1e-06", "raise q_memory_gib")),
        ({"q_memory_gib": 1e6}, ("q_memory_gib is 1000000", "GiB of memory", "lower q_memory_gib")),
        ({"kv_memory_gib": 0.001}, ("kv_memory_gib is 0.001", "one request of 2048 draft", "raise kv_memory_gib or")),
        ({"kv_memory_gib": 1e6}, ("kv_memory_gib is 1000000", "GiB of memory", "lower kv_memory_gib")),
        ({"tokenizer": "/no/tokenizer"}, ("'/no/tokenizer'", "there is no such folder", 'set "tokenizer" to')),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_the_draft_is_refused_by_its_name(front_end, settings, parts):
    message = refused(front_end, engine.speculation(**settings), *parts)
    assert 'set "model"' not in message


def test_a_folder_for_what_is_learned_that_cannot_be_written_is_refused(front_end, tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    for folder in (file, file / "below"):
        settings = engine.speculation(learned_weights_folder=str(folder))
        refused(front_end, settings, f"learned_weights_folder {str(folder)!r}", "name a folder that it can make")
    front_end(engine.speculation(learned_weights_folder=str(tmp_path / "new" / "folder")))
    assert (tmp_path / "new" / "folder").is_dir()


def test_two_settings_that_do_not_fit_are_refused_one_after_the_other(front_end):
    settings = engine.speculation(dtype="float13", max_model_len=10**6)
    refused(front_end, settings, "dtype is 'float13'")


def test_no_memory_for_probabilities_is_a_choice(front_end):
    front_end(engine.speculation(q_memory_gib=0))


@pytest.mark.parametrize(
    ("break_it", "parts"),
    [
        (lambda folder: folder.joinpath("config.json").unlink(), ("there is no config.json in that folder",)),
        (lambda folder: folder.joinpath("config.json").write_text("{,"), ("its config.json is not valid JSON",)),
        (lambda folder: folder.joinpath("config.json").write_text("[]"), ("its config.json is not a JSON object",)),
        (lambda folder: folder.joinpath("config.json").write_text("{}"), ("Unrecognized model", "model_type")),
        (lambda folder: folder.joinpath("tokenizer.json").write_text("{"), ("its tokenizer.json is not valid JSON",)),
        (lambda folder: folder.joinpath("model.safetensors").unlink(), ("no weights in that folder",)),
        (lambda folder: os.truncate(folder / "model.safetensors", 9999), ("model.safetensors", "copy it again")),
        (lambda folder: shutil.rmtree(folder), ("there is no such folder",)),
    ],
)  # fmt: skip
def test_a_draft_folder_that_is_not_whole_is_refused_with_what_is_wrong_with_it(front_end, tmp_path, break_it, parts):
    folder = copy_files(engine.DRAFT, tmp_path / "draft", *os.listdir(engine.DRAFT))
    front_end(engine.speculation(model=folder))
    break_it(Path(folder))
    refused(front_end, engine.speculation(model=folder), folder, *parts)


def test_a_file_is_refused_as_a_draft_model(front_end):
    file = str(Path(engine.DRAFT, "model.safetensors"))
    refused(front_end, engine.speculation(model=file), "this is a file; name the folder", engine.DRAFT)


def test_weights_are_not_looked_for_where_none_are_loaded(front_end, tmp_path):
    folder = copy_files(engine.DRAFT, tmp_path / "draft", "config.json", "tokenizer.json", "tokenizer_config.json")
    front_end(engine.speculation(model=folder), load_format="dummy")
    # The workers may be on another machine, which has them.
    front_end(engine.speculation(model=folder), nnodes=2, tensor_parallel_size=2, distributed_executor_backend="mp")


def test_a_draft_larger_than_the_memory_is_refused(front_end, tmp_path):
    folder = Path(copy_files(engine.DRAFT, tmp_path / "draft", *os.listdir(engine.DRAFT)))
    # A file with a hole: it says that it holds more than the memory, of which the disk holds nothing.
    numbers = psutil.virtual_memory().total
    header = json.dumps({"a": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + 4 * numbers)
    refused(
        front_end,
        engine.speculation(model=str(folder)),
        f"need {4 * numbers / 2**30:.2f} GiB",
        "choose a smaller draft model",
    )


def test_a_draft_that_the_workers_cannot_share_is_refused(front_end):
    refused(
        front_end, engine.speculation(), "must be divisible by tensor parallel size", "another draft model",
        tensor_parallel_size=3, distributed_executor_backend="mp",
    )  # fmt: skip


def test_fewer_draft_tokens_than_proposals_are_said_in_the_log(front_end):
    with engine.logged("vllm_tokentiming.vllm.refusals") as messages:
        front_end(engine.speculation(max_draft_tokens=2))
    assert [("max_draft_tokens is 2 and num_speculative_tokens 5" in message) for message in messages] == [True]
    with engine.logged("vllm_tokentiming.vllm.refusals") as messages:
        front_end(engine.speculation(max_draft_tokens=5))
    assert messages == []


def test_the_target_as_its_own_draft_is_said_in_the_log(front_end):
    with engine.logged("vllm_tokentiming.vllm.refusals") as messages:
        front_end(engine.speculation(model=engine.TARGET))
    assert len(messages) == 1 and "is the target itself" in messages[0]


def test_a_draft_larger_than_the_target_is_said_in_the_log(front_end):
    with engine.logged("vllm_tokentiming.vllm.refusals") as messages:
        front_end(engine.speculation(model=engine.TARGET), model=engine.DRAFT)
    assert len(messages) == 1 and "were the two swapped?" in messages[0]


# What was meant for us and is called otherwise.


@pytest.mark.parametrize("method", ["TokenTiming", "token_timing", "token-timing"])
def test_a_misspelled_method_is_refused_with_the_right_one(front_end, method):
    refused(front_end, engine.speculation(method=method), repr(method), 'did you mean "tokentiming"?')


def test_a_misspelled_method_of_the_shorthand_option_is_refused_with_the_right_one(front_end):
    given = {"model": engine.DRAFT, "num_speculative_tokens": 5}
    refused(front_end, given, "'TokenTiming'", 'did you mean "tokentiming"?', spec_method="TokenTiming")


def test_what_is_given_twice_is_refused(front_end):
    refused(front_end, engine.speculation(), '"model" is given twice', "leave one out", spec_model="another")


@pytest.mark.parametrize("wrong", [[{"method": "tokentiming"}], "tokentiming"])
def test_a_speculative_configuration_that_is_no_dictionary_is_refused(front_end, wrong):
    refused(front_end, wrong, repr(wrong), "write one dictionary")


@pytest.mark.parametrize(
    ("speculative", "additional", "part"),
    [
        (CUSTOM, {"tokentiming": "x"}, "\"tokentiming\" in --additional-config is 'x'"),
        (CUSTOM, {"tokentiming": ["x"]}, "write a dictionary there"),
        (CUSTOM, ["x"], "tokentiming has no settings: add --additional-config"),
        (CUSTOM, {"TokenTiming": {"model": engine.DRAFT}}, "tokentiming has no settings: add --additional-config"),
        (
            {**CUSTOM, "num_speculative_tokens": "5"},
            {"tokentiming": {"model": engine.DRAFT}},
            "is '5', which is a text",
        ),
        (engine.speculation(), ["x"], "--additional-config is ['x']; write a dictionary"),
        (engine.speculation(), {"tokentiming": "x"}, "not in both"),
    ],
)
def test_additional_settings_that_cannot_be_read_are_refused(front_end, speculative, additional, part):
    refused(front_end, dict(speculative), part, additional_config=additional)


def test_what_was_refused_can_be_mended_and_tried_again(front_end):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_tokentiming.config import SettingsError

    arguments = EngineArgs(
        engine.TARGET, speculative_config=engine.speculation(dtw_window=0), dtype="float32", max_model_len=512,
        enforce_eager=True,
    )  # fmt: skip
    with pytest.raises(SettingsError, match="dtw_window is 0"):
        arguments.create_engine_config()
    arguments.speculative_config["dtw_window"] = 4
    config = arguments.create_engine_config()
    assert config.speculative_config.method == "custom_class"


def test_the_sentence_is_all_that_is_told(front_end):
    from vllm_tokentiming.config import SettingsError

    for settings in ({"dtw_window": 0}, {"dtype": "float13"}, {"tokenizer": "/no/tokenizer"}, {"model": "/no/model"}):
        with pytest.raises(SettingsError) as caught:
            front_end(engine.speculation(**settings))
        shown = "".join(traceback.format_exception(caught.value))
        assert shown.count("Traceback") == 1
        assert shown.splitlines()[-1].endswith(str(caught.value))
