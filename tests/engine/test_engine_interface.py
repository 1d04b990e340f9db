"""How a user asks for us, and what vLLM says to a user who asks for what cannot work."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import engine
import pytest
from front_end import CUSTOM
from front_end import copy_files as _copy
from front_end import refused as _refused

# Nothing of ours is imported up here: the functions that run in fresh processes do as a user does.

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]

PROMPTS = ["Once upon a time there was a", "def merge(left, right):\n    ", "Жила-была девочка"]


# What works.


def ask_in_both_ways() -> dict:
    """In a fresh process that imports nothing of ours: both ways, and a plain engine."""
    result: dict = {"imported": [name for name in sys.modules if name.startswith("vllm_tokentiming")]}
    for name, arguments in (
        ("plain", {}),
        ("method", {"speculative_config": engine.speculation()}),
        (
            "custom class",
            {"speculative_config": CUSTOM, "additional_config": {"tokentiming": {"model": engine.DRAFT}}},
        ),
    ):
        llm = engine.start_exact(**arguments)
        result[name] = {
            "outputs": engine.generate(llm, PROMPTS, engine.greedy()),
            "counters": engine.counters(llm),
        }
        # An engine takes vLLM's global state with it when it goes, so it goes before the next one comes.
        del llm
        gc.collect()
    return result


@pytest.fixture(scope="module")
def asked():
    return engine.in_fresh_process(ask_in_both_ways)


@pytest.mark.parametrize("way", ["method", "custom class"])
def test_each_way_to_ask_gives_the_same_outputs_and_accepted_proposals(asked, way):
    assert asked["imported"] == []
    assert asked[way]["outputs"] == asked["plain"]["outputs"]
    assert asked[way]["counters"]["accepted"] > 0


def test_the_example_of_the_readme_runs_as_it_stands_there(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert "assert " in block
    example = tmp_path / "example.py"
    example.write_text(block)
    # As a user runs it: the engine in a process of its own.
    environment = {**engine.environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [sys.executable, example], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def set_for_requests() -> dict:
    """In a fresh process: requests with settings of their own, right ones and wrong ones."""
    llm = engine.start_exact()
    result: dict = {"plain": engine.generate(llm, PROMPTS, engine.greedy())}
    del llm  # Before the next one comes, as above.
    gc.collect()
    llm = engine.start_exact(speculative_config=engine.speculation())
    for name, given in (
        ("none", {"max_proposals": 0}),
        ("one", '{"max_proposals": 1}'),
        ("all", {}),
        ("too many", {"max_proposals": 100}),
        ("misspelled", {"max_proposal": 1}),
        ("no dictionary", 1),
    ):
        before = engine.counters(llm)
        parameters = engine.greedy(extra_args={"tokentiming": given})
        try:
            outputs = engine.generate(llm, PROMPTS, parameters)
        except Exception as error:
            result[name] = [type(error).__name__, str(error)]
            continue
        after = engine.counters(llm)
        counts = {count: after[count] - before[count] for count in ("drafts", "proposed", "accepted")}
        result[name] = {"outputs": outputs, **counts}
    return result


def test_a_request_has_as_many_proposals_as_it_asks_for_and_a_wrong_number_is_refused():
    result = engine.in_fresh_process(set_for_requests)
    assert not [name for name in ("none", "one", "all") if isinstance(result[name], list)], result
    assert all(result[name]["outputs"] == result["plain"] for name in ("none", "one", "all"))
    assert result["none"]["proposed"] == 0
    assert 0 < result["one"]["accepted"] <= result["one"]["proposed"] == result["one"]["drafts"]
    assert result["all"]["proposed"] > result["all"]["drafts"]
    for name, part in (
        ("too many", "write a whole number from 0 to"),
        ("misspelled", "does not know the setting 'max_proposal'"),
        ("no dictionary", "write a dictionary"),
    ):
        kind, message = result[name]
        assert kind == "RequestError" and part in message


# What is refused before anything is loaded.


def settings_of(config) -> dict:
    from vllm_tokentiming.vllm.loading import settings_of

    return dict(settings_of(config))


def test_both_ways_to_ask_are_read_to_the_same_configuration(front_end):
    settings = {"model": engine.DRAFT, "dtw_window": 4}
    method = front_end({"method": "tokentiming", "num_speculative_tokens": 5, **settings})
    custom = front_end(dict(CUSTOM), additional_config={"tokentiming": settings})
    assert settings_of(method) == settings_of(custom) == settings
    for config in (method, custom):
        assert config.speculative_config.method == "custom_class"
        assert config.speculative_config.num_speculative_tokens == 5


def test_settings_change_nothing_that_vllm_compiles_anew_for(front_end):
    from vllm_tokentiming.config import TokenTimingConfig
    from vllm_tokentiming.vllm.draft_config import draft_vllm_config

    settings = {"kv_memory_gib": 0.5, "dtw_window": 4, "seed": 7, "strategy": "slem", "adaptive_length": True}
    configs = [front_end(engine.speculation(**given)) for given in ({}, settings)]
    assert len({config.compute_hash() for config in configs}) == 1
    drafts = [draft_vllm_config(config, TokenTimingConfig.parse(settings_of(config))) for config in configs]
    assert len({draft.compute_hash() for draft in drafts}) == 1
    # What a user gives there for others is left as it is, and is none of the draft's business.
    other = front_end(engine.speculation(), additional_config={"other": 1})
    assert other.additional_config == {"other": 1}
    assert draft_vllm_config(other, TokenTimingConfig.parse(settings_of(other))).additional_config == {}


def test_the_same_arguments_can_be_read_twice(front_end):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(engine.TARGET, speculative_config=engine.speculation(seed=3))
    assert [settings_of(arguments.create_engine_config())["seed"] for _ in range(2)] == [3, 3]


def test_nothing_that_vllm_does_not_know_is_left_in_the_environment_for_the_next_engine(front_end):
    for _ in range(2):
        front_end(engine.speculation(), fail_on_environ_validation=True)


def test_other_methods_are_left_alone(front_end):
    config = front_end({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3})
    assert config.speculative_config.method == "ngram"
    assert config.additional_config == {}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"modle": "x"}, ("'modle'", "did you mean 'model'")),
        ({"dtw_window": 0}, ("dtw_window is 0", "greater than or equal to 1")),
        ({"kv_memory_gib": -1}, ("kv_memory_gib is -1", "greater than 0")),
        ({"max_draft_tokens": "many"}, ("max_draft_tokens is 'many'", "integer")),
        ({"num_speculative_tokens": 0}, ('"num_speculative_tokens"', "4 to 8")),
        ({"rejection_sample_method": "synthetic"}, ("'synthetic'", "leave it out", '"allow_inexact"')),
        ({"rejection_sample_method": "blocks"}, ("'blocks'", "leave it out", '"block"', '"standard"')),
        ({"special_tokens": {"<no>": None}}, ("special_tokens", "'<no>' is not a special token of the")),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_work_is_refused(front_end, settings, parts):
    _refused(front_end, engine.speculation(**settings), *parts)


def test_an_unknown_way_to_verify_is_refused_in_the_other_form_as_well(front_end):
    given = CUSTOM | {"rejection_sample_method": "blocks"}
    settings = {"tokentiming": {"model": engine.DRAFT}}
    _refused(front_end, given, "'blocks'", "leave it out", additional_config=settings)


@pytest.mark.parametrize("given", [engine.speculation(), CUSTOM])
def test_proposals_are_verified_in_blocks_unless_the_user_wants_them_one_by_one(front_end, given):
    settings = {} if given is not CUSTOM else {"additional_config": {"tokentiming": {"model": engine.DRAFT}}}
    for wanted, method in ({}, "block"), ({"rejection_sample_method": "standard"}, "standard"):
        config = front_end(given | wanted, **settings)
        assert config.speculative_config.rejection_sample_method == method


def test_a_worker_without_our_entry_point_refuses_what_the_front_end_would_have(front_end):
    from vllm_tokentiming import TokenTimingProposer
    from vllm_tokentiming.config import SettingsError

    config = front_end(dict(CUSTOM), additional_config={"tokentiming": {"model": engine.DRAFT}})
    config.speculative_config.rejection_sample_method = "blocks"
    with pytest.raises(SettingsError, match="does not know the \"rejection_sample_method\" 'blocks'"):
        TokenTimingProposer(config)


def test_settings_without_a_draft_model_are_refused(front_end):
    without = {"method": "tokentiming", "num_speculative_tokens": 5}
    _refused(front_end, without, 'set "model" to a local folder or a Hugging Face name')
    _refused(front_end, dict(CUSTOM), 'set "model" to a local folder or a Hugging Face name')


def test_settings_without_a_number_of_tokens_are_refused(front_end):
    without = {"method": "tokentiming", "model": engine.DRAFT}
    _refused(front_end, without, 'needs "num_speculative_tokens" in the speculative configuration')


def test_settings_in_both_places_are_refused(front_end):
    given = {"tokentiming": {"model": engine.DRAFT}}
    _refused(
        front_end,
        engine.speculation(),
        "either in --speculative-config",
        "not in both",
        additional_config=given,
    )


def test_a_draft_model_that_does_not_exist_is_refused(front_end, tmp_path):
    folder = str(tmp_path / "nothing")
    _refused(front_end, engine.speculation(model=folder), f"cannot use {folder!r}", 'set "model" to')


def test_a_draft_model_without_a_tokenizer_is_refused(front_end, tmp_path):
    folder = _copy(engine.DRAFT, tmp_path / "draft", "config.json", "model.safetensors")
    _refused(
        front_end,
        engine.speculation(model=folder),
        f"tokenizer {folder!r}",
        "put a tokenizer.json into that folder",
    )


def test_a_draft_model_with_a_tokenizer_elsewhere_is_accepted(front_end, tmp_path):
    folder = _copy(engine.DRAFT, tmp_path / "draft", "config.json", "model.safetensors")
    config = front_end(engine.speculation(model=folder, tokenizer=engine.DRAFT))
    assert settings_of(config)["tokenizer"] == engine.DRAFT


def test_a_tokenizer_of_another_model_is_refused(front_end):
    settings = engine.speculation(tokenizer=engine.TARGET)
    _refused(
        front_end,
        settings,
        "has 8192 ids, its model only 3072",
        "choose the tokenizer that the model was trained with",
    )


def test_a_tokenizer_that_fails_on_some_text_is_refused(front_end, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], None, False))
    PreTrainedTokenizerFast(tokenizer_object=unigram).save_pretrained(tmp_path / "tokenizer")
    settings = engine.speculation(tokenizer=str(tmp_path / "tokenizer"))
    _refused(front_end, settings, "cannot use the draft's tokenizer", "needs an unknown token")


def test_a_draft_with_more_ids_than_can_be_told_apart_is_refused(front_end, tmp_path):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    folder = _copy(engine.DRAFT, tmp_path / "draft", *names)
    described = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(described | {"vocab_size": 2**24 + 1}))
    parts = (f"cannot draft with {folder!r}", "its vocabulary has 16777217 ids", "choose a draft model with a smaller")
    _refused(front_end, engine.speculation(model=folder), *parts)


def test_an_encoder_is_refused_as_a_draft(front_end, tmp_path):
    from transformers import BertConfig

    folder = _copy(engine.DRAFT, tmp_path / "encoder", "tokenizer.json", "tokenizer_config.json")
    config = BertConfig(
        vocab_size=3072, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64
    )
    config.architectures = ["BertModel"]
    config.save_pretrained(folder)
    message = _refused(front_end, engine.speculation(model=folder), folder, "decoder-only language model", "no text")
    assert "--runner" not in message, "there is no such option for the draft"


CODE = """
from pathlib import Path
Path({folder!r}).joinpath("it ran").touch()
from transformers import LlamaConfig, PreTrainedTokenizerFast
class Own(LlamaConfig):
    model_type = "own"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_the_code_of_a_draft_does_not_run_unless_the_user_trusts_it(front_end, tmp_path, part):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    folder = _copy(engine.DRAFT, tmp_path / "draft", *names)
    described = json.loads(Path(folder, part).read_text())
    if part == "config.json":
        described |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    else:
        described |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.OwnTokenizer", None]}}
    Path(folder, part).write_text(json.dumps(described))
    Path(folder, "code.py").write_text(CODE.format(folder=str(tmp_path)))
    _refused(front_end, engine.speculation(model=folder), "trust_remote_code")
    assert not (tmp_path / "it ran").exists()


def test_a_pooling_model_is_refused_as_a_target(front_end):
    _refused(front_end, engine.speculation(), "pooling", "set --runner to generate", runner="pooling")


def test_pipeline_parallelism_is_refused(front_end):
    _refused(front_end, engine.speculation(), "set --pipeline-parallel-size to 1", pipeline_parallel_size=2)


def test_a_vllm_that_lacks_something_is_refused(front_end, monkeypatch):
    from vllm_tokentiming.vllm import requirements

    wanted = (requirements.Need("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.no_such_method"),)
    monkeypatch.setattr(requirements, "REQUIRED", wanted)
    _refused(front_end, engine.speculation(), "GPUModelRunner.no_such_method", "install vLLM")


def test_kernels_that_were_not_built_are_refused(front_end, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_tokentiming.align._dtw", None)
    monkeypatch.delitem(sys.modules, "vllm_tokentiming.align.dtw", raising=False)
    _refused(front_end, engine.speculation(), "pip install")


# What only the worker can know.


def ask_for_too_little_and_too_much_memory() -> dict:
    """In a fresh process: what vLLM raises when the draft's KV cache cannot be had."""
    import psutil

    shape = json.loads(Path(engine.DRAFT, "config.json").read_text())
    numbers = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    result = {}
    for name, wanted in (
        # Enough for the numbers of 2048 tokens in float32, but the cache has one block more.
        ("little", 2048 * numbers * 4),
        # All of the machine's memory, of which some is taken.
        ("much", psutil.virtual_memory().total),
    ):
        try:
            engine.start_exact(speculative_config=engine.speculation(kv_memory_gib=wanted / 2**30))
        except Exception as error:
            result[name] = [type(error).__name__, str(error)]
    return result


def test_a_kv_cache_too_small_for_one_request_or_too_large_for_the_memory_is_refused():
    result = engine.in_fresh_process(ask_for_too_little_and_too_much_memory)
    for name, parts in (
        ("little", ("kv_memory_gib is 0.0", "one request of 2048 draft tokens needs 0.0", "raise kv_memory_gib or")),
        ("much", ("KV cache needs", "are free", "lower kv_memory_gib or max_model_len")),
    ):  # fmt: skip
        kind, message = result[name]
        assert kind == "SettingsError"
        for part in parts:
            assert part in message
