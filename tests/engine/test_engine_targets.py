"""Targets of other kinds: mixtures of experts, such that keep a running state, and such that hear."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import engine
import pytest
from conftest import longer
from engine_prompts import texts

pytestmark = pytest.mark.engine

PROMPTS = texts()[:4]
SIZE = {
    "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def write_model(folder: Path, config: Any, model_class: Any = None) -> str:
    """A model with random weights, or a folder without any, and the embedded target's tokenizer."""
    import torch

    folder.mkdir()
    if model_class is None:
        config.save_pretrained(folder)
    else:
        torch.manual_seed(0)
        model = model_class(config).to(torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # Livelier than what it begins with, which writes one token over and over.
                parameter.data.mul_(4)
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(engine.TARGET, name), folder)
    return str(folder)


# Mixtures of experts.


def with_experts(folder: str) -> dict:
    """In a fresh process: start a target with experts, and count which of its parameters are copied meanwhile."""
    import torch

    copied: list[Any] = []
    copy_parameter = torch.nn.Parameter.__deepcopy__

    def noticed(self: Any, memo: dict) -> Any:
        copied.append(self)
        return copy_parameter(self, memo)

    torch.nn.Parameter.__deepcopy__ = noticed  # type: ignore[method-assign]
    arguments = {"target": folder, "dtype": "bfloat16"}
    outputs = engine.generate(engine.start_exact(**arguments), PROMPTS, engine.greedy())
    llm = engine.start_exact(speculative_config=engine.speculation(), **arguments)
    target = {id(parameter): parameter.nbytes for parameter in engine.runner(llm).model.parameters()}
    return {
        "experts": len(llm.llm_engine.vllm_config.compilation_config.static_all_moe_layers),
        "copied bytes": sum(target.get(id(parameter), 0) for parameter in copied),
        "target bytes": sum(target.values()),
        "same": engine.generate(llm, PROMPTS, engine.greedy()) == outputs,
        **engine.counters(llm),
    }


@longer
def test_a_target_with_experts_is_not_copied(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**SIZE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    folder = write_model(tmp_path / "experts", config, Qwen3MoeForCausalLM)
    found = engine.in_fresh_process(with_experts, folder=folder)
    assert found["experts"] == 2 and found["target bytes"] > 0
    assert found["copied bytes"] == 0
    assert found["same"] and found["proposed"] > 0 and found["faults"] == 0


# Targets that keep a running state.


@pytest.fixture
def hybrid(tmp_path) -> str:
    """The folder of a hybrid model, without weights."""
    from transformers import FalconH1Config

    config = FalconH1Config(
        **SIZE,
        mamba_d_ssm=64,
        mamba_n_heads=2,
        mamba_d_head=32,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=16,
    )
    config.architectures = ["FalconH1ForCausalLM"]
    return write_model(tmp_path / "hybrid", config)


def draft_beside_a_hybrid_target(folder: str) -> dict:
    """In a fresh process: the draft's configuration in a worker of a hybrid target."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_tokentiming.config import TokenTimingConfig
    from vllm_tokentiming.vllm.draft_config import draft_vllm_config

    class Layer:
        def __deepcopy__(self, memo: dict) -> None:
            raise AssertionError("a layer of the target is copied")

    settings, found = TokenTimingConfig.parse({"model": engine.DRAFT}), {}
    for prefix_caching in (False, True):
        target = EngineArgs(
            folder, max_model_len=256, enforce_eager=True, enable_prefix_caching=prefix_caching
        ).create_engine_config()
        target.cache_config.mamba_page_size_padded = 4096
        target.compilation_config.static_forward_context["layer"] = Layer()
        target.compilation_config.static_all_moe_layers.append("layer")
        draft = draft_vllm_config(target, settings)
        found[str(prefix_caching)] = {
            side: {
                "mamba": [config.cache_config.mamba_cache_mode, config.cache_config.mamba_block_size is None],
                "page": config.cache_config.mamba_page_size_padded,
                "layers": len(config.compilation_config.static_forward_context),
                "experts": len(config.compilation_config.static_all_moe_layers),
            }
            for side, config in (("target", target), ("draft", draft))
        }
    return found


def test_a_hybrid_targets_layers_and_cache_settings_are_not_the_drafts(hybrid):
    found = engine.in_fresh_process(draft_beside_a_hybrid_target, folder=hybrid)
    for prefix_caching, mode in (("False", "none"), ("True", "align")):
        sides = found[prefix_caching]
        assert sides["target"] == {"mamba": [mode, False], "page": 4096, "layers": 1, "experts": 1}
        assert sides["draft"] == {"mamba": ["none", True], "page": None, "layers": 0, "experts": 0}


def refuse_a_hybrid_target(folder: str) -> str:
    """In a fresh process: what vLLM's front end says to speculation for a hybrid target."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        EngineArgs(folder, speculative_config=engine.speculation(), enforce_eager=True).create_engine_config()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_a_hybrid_target_is_refused_on_a_cpu(hybrid):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM takes back the running state of a target elsewhere")
    said = engine.in_fresh_process(refuse_a_hybrid_target, folder=hybrid)
    assert said.startswith(f"SettingsError: tokentiming cannot speed up {hybrid!r} on a CPU: ")
    assert "any speculation changes the text" in said and said.endswith("use a GPU or leave --speculative-config out.")


# Targets that hear.


def write_hearing_model(folder: Path) -> str:
    """A small Qwen2-Audio with random weights; vLLM imports it without torchvision, unlike most that see images."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        Qwen2Config,
        WhisperFeatureExtractor,
    )

    tokenizer = PreTrainedTokenizerFast.from_pretrained(engine.TARGET)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=128
        ),
        text_config=Qwen2Config(**SIZE | {"vocab_size": 8256, "tie_word_embeddings": False}),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    # As in the published checkpoints; transformers 5 writes another name.
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("model.model.", "model."): weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer).save_pretrained(folder)
    return str(folder)


def with_sounds(folder: str) -> dict:
    """In a fresh process: prompts with two sounds, one, and none in one batch; and what the draft has read of them."""
    import numpy as np

    from vllm_tokentiming.draft.sequences import DraftSequences

    rng = np.random.default_rng(0)
    short, long = (rng.normal(0, 0.1, 16_000 * seconds) for seconds in (1, 2))
    sound = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    prompts = [
        {
            "prompt": f"Hear: {sound} and {sound} are alike.",
            "multi_modal_data": {"audio": [(short, 16_000), (long, 16_000)]},
        },
        {"prompt": f"{sound}What do you hear?", "multi_modal_data": {"audio": [(short, 16_000)]}},
        {"prompt": "There is nothing to hear."},
    ]
    read: dict[str, list] = {}
    commit = DraftSequences.commit

    def noticed(self: Any, request: Any, snapshot: Any) -> None:
        commit(self, request, snapshot)
        ids = snapshot.target_ids[: snapshot.num_target].tolist()
        text = self._pair.draft.token_bytes.decode(request.context.draft_ids).decode(errors="replace")
        read.setdefault(snapshot.request_id, [ids, list(snapshot.unread), text])

    arguments = {"target": folder, "limit_mm_per_prompt": {"audio": 2}}
    outputs = engine.generate(engine.start_exact(**arguments), prompts, engine.greedy())
    DraftSequences.commit = noticed  # type: ignore[method-assign]
    llm = engine.start_exact(speculative_config=engine.speculation(), **arguments)
    return {
        "same": engine.generate(llm, prompts, engine.greedy()) == outputs,
        "read": [read[request_id] for request_id in sorted(read)],
        "placeholder": llm.get_tokenizer().convert_tokens_to_ids("<|AUDIO|>"),
        **engine.counters(llm),
    }


@longer
def test_the_draft_reads_a_prompt_without_its_sounds(tmp_path):
    found = engine.in_fresh_process(with_sounds, folder=write_hearing_model(tmp_path / "hearing"))
    assert found["same"] and found["proposed"] > 0 and found["faults"] == 0
    assert [len(unread) for _, unread, _ in found["read"]] == [2, 1, 0]
    for target_ids, unread, _ in found["read"]:
        inside = {position for first, end in unread for position in range(first, end)}
        assert inside == {position for position, i in enumerate(target_ids) if i == found["placeholder"]}
    wanted = ("Hear:  and  are alike.", "What do you hear?", "There is nothing to hear.")
    for (_, _, text), beginning in zip(found["read"], wanted, strict=True):
        assert text.startswith(beginning)
