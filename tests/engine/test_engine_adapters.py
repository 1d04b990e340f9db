"""LoRA adapters of the target, and weights that change while the engine runs: the draft guesses, the target decides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import engine
import pytest
from engine_prompts import texts

pytestmark = pytest.mark.engine

PROMPTS = texts()[:8]
RANK = 8


def write_adapter(folder: Path) -> None:
    """A LoRA adapter with random weights, strong enough to change what is written."""
    import torch
    from safetensors.torch import save_file

    config = json.loads(Path(engine.TARGET, "config.json").read_text())
    width, heads, head = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, rows in (("q_proj", heads * head), ("v_proj", config["num_key_value_heads"] * head)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) * 0.1
            weights[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))


def _engines(**arguments) -> dict:
    return {
        "plain": engine.start_exact(**arguments),
        "ours": engine.start_exact(speculative_config=engine.speculation(), **arguments),
    }


def with_adapters(folder: str) -> dict:
    """In a fresh process: prompts with and without an adapter, plain and speculating."""
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("adapter", 1, folder)
    result = {}
    for name, llm in _engines(enable_lora=True, max_loras=1, max_lora_rank=RANK).items():
        # Not in one batch: vLLM's CPU kernels give the adapter to all of it.
        result[name] = {
            kind: [
                list(output.outputs[0].token_ids)
                for output in llm.generate(PROMPTS, engine.greedy(24), lora_request=request, use_tqdm=False)
            ]
            for kind, request in (("base", None), ("adapted", adapter))
        }
        result[name]["counters"] = engine.counters(llm)
    return result


def write_changed_target(folder: Path) -> None:
    """The target with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(engine.TARGET, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**weights, name: weights[name].flip(0).contiguous()}, folder / "model.safetensors", {"format": "pt"})


def with_changed_weights(folder: str) -> dict:
    """In a fresh process: outputs before the target's weights are replaced, with others, and after."""
    result = {}
    for name, llm in _engines().items():
        written = {"before": engine.generate(llm, PROMPTS, engine.greedy(24))}
        for when, path in (("changed", folder), ("after", engine.TARGET)):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            written[when] = engine.generate(llm, PROMPTS, engine.greedy(24))
        result[name] = {**written, "counters": engine.counters(llm)}
    return result


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    write_adapter(folder)
    return engine.in_fresh_process(with_adapters, folder=str(folder))


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("changed") / "target"
    write_changed_target(folder)
    return engine.in_fresh_process(with_changed_weights, folder=str(folder))


@pytest.mark.parametrize("kind", ["base", "adapted"])
def test_requests_with_and_without_an_adapter_write_what_they_write_without_drafts(adapted, kind):
    assert adapted["ours"][kind] == adapted["plain"][kind]
    assert adapted["ours"]["counters"]["accepted"] > 0
    assert adapted["ours"]["counters"]["faults"] == 0


def test_the_adapter_changes_what_is_written(adapted):
    assert adapted["plain"]["adapted"] != adapted["plain"]["base"]


@pytest.mark.parametrize("when", ["before", "changed", "after"])
def test_new_weights_of_the_target_decide_at_once(changed, when):
    assert changed["ours"][when] == changed["plain"][when]
    assert changed["ours"]["counters"]["accepted"] > 0


def test_the_weights_did_change(changed):
    assert changed["plain"]["changed"] != changed["plain"]["before"]
    assert changed["plain"]["after"] == changed["plain"]["before"]
