"""What our code uses of vLLM is what `requirements.py` says that it needs, and this vLLM has it.

The code is read for imports from vLLM, attributes of objects of vLLM's, and arguments given to its functions. Which
variables hold such objects has to be said here; in a module that imports vLLM, a variable of which nothing is said is
an error, too.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterator
from pathlib import Path

import engine
import pytest

pytest.importorskip("vllm.version")  # The tests have a folder called `vllm`, too.

from vllm_tokentiming.config import SettingsError
from vllm_tokentiming.vllm import requirements
from vllm_tokentiming.vllm.requirements import (
    FOR_Q,
    FOR_V2,
    IN_V2,
    KV_CACHE_PLANNING,
    REQUIRED,
    Need,
    check_vllm,
    missing,
)

PACKAGE = Path(requirements.__file__).parent
RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
BUFFER = "vllm.v1.utils.CpuGpuBuffer"
METADATA = "vllm.v1.spec_decode.metadata.SpecDecodeMetadata"

# Expressions that hold objects of vLLM's, in all modules.
HOLDS = {
    "_get_tp_group()": "vllm.distributed.parallel_state.GroupCoordinator",
    "batch": "vllm.v1.worker.gpu_input_batch.InputBatch",
    "buffer": BUFFER,
    "cache": "vllm.config.CacheConfig",
    "cache_config": "vllm.config.CacheConfig",
    "compilation_config": "vllm.config.CompilationConfig",
    "config": "vllm.config.ModelConfig",
    "context[name]": "vllm.model_executor.layers.attention.Attention",
    "data": "vllm.v1.core.sched.output.NewRequestData",
    "engine_args": "vllm.engine.arg_utils.EngineArgs",
    "get_tp_group()": "vllm.distributed.parallel_state.GroupCoordinator",
    "groups[0]": "vllm.v1.kv_cache_interface.KVCacheGroupSpec",
    "groups[0].kv_cache_spec": "vllm.v1.kv_cache_interface.KVCacheSpec",
    "kv_config": "vllm.v1.kv_cache_interface.KVCacheConfig",
    "metadata": METADATA,
    "planning": KV_CACHE_PLANNING,
    "runner": RUNNER,
    "runner.input_batch": "vllm.v1.worker.gpu_input_batch.InputBatch",
    "scheduler_config": "vllm.config.SchedulerConfig",
    "scheduler_output": "vllm.v1.core.sched.output.SchedulerOutput",
    "self._config": "vllm.config.VllmConfig",
    "self._model": "vllm.model_executor.models.interfaces_base.VllmModelForTextGeneration",
    "self._vllm_config": "vllm.config.VllmConfig",
    "self.model_config": "vllm.config.ModelConfig",
    "spec": "vllm.v1.kv_cache_interface.KVCacheSpec",
    "spec_decode_metadata": METADATA,
    "target_model_config": "vllm.config.ModelConfig",
    "target_parallel_config": "vllm.config.ParallelConfig",
    "vllm_config": "vllm.config.VllmConfig",
    **{f"self.{name}": BUFFER for name in ("_block_table", "_input_ids", "_positions", "_query_start", "_seq_lens")},
    "self._slots": BUFFER,
}
# The same name for something else in one module.
IN_MODULE = {
    ("requests", "feature"): "vllm.multimodal.inputs.MultiModalFeatureSpec",
    ("requests", "place"): "vllm.multimodal.inputs.PlaceholderRange",
    ("request_settings", "parameters"): "vllm.sampling_params.SamplingParams",
    ("request_settings", "speculative"): "vllm.config.SpeculativeConfig",
    ("requests", "parameters"): "vllm.sampling_params.SamplingParams",
    # Or `NewRequestData`; `test_a_request_has_the_same_names_on_both_runners` holds the two together.
    ("requests", "request"): "vllm.v1.worker.gpu_input_batch.CachedRequestState",
    ("runner_choice", "worker"): "vllm.v1.worker.worker_base.WorkerBase",
    ("runner_choice", "speculative"): "vllm.config.SpeculativeConfig",
    ("runner_choice", "vllm_config"): "vllm.config.VllmConfig",
    ("runner_v2", "all_token_ids"): "vllm.v1.worker.gpu.buffer_utils.StagedWriteTensor",
    ("runner_v2", "input_batch"): "vllm.v1.worker.gpu.input_batch.InputBatch",
    ("runner_v2", "req_states"): "vllm.v1.worker.gpu.states.RequestState",
    ("runner_v2", "request"): "vllm.v1.core.sched.output.NewRequestData",
    ("runner_v2", "runner"): "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
    ("runner_v2", "self._states"): "vllm.v1.worker.gpu.states.RequestState",
    ("runner_v2", "self._states.prompt_len"): "vllm.v1.worker.gpu.buffer_utils.UvaBackedTensor",
    ("runner_v2", "self._states.total_len"): "vllm.v1.worker.gpu.buffer_utils.StagedWriteTensor",
    ("runner_v2", "speculative"): "vllm.config.SpeculativeConfig",
    ("runner_v2", "taken"): "vllm.v1.outputs.DraftTokenIds",
    ("loading", "target"): "vllm.config.ModelConfig",
    ("proposer", "target"): "vllm.config.ModelConfig",
    ("refusals", "draft"): "vllm.config.ModelConfig",
    ("refusals", "parallel"): "vllm.config.ParallelConfig",
    ("refusals", "target"): "vllm.config.ModelConfig",
    ("draft_config", "_build(settings, target)"): "vllm.config.ModelConfig",
    ("draft_config", "_build(settings, target, runner='auto')"): "vllm.config.ModelConfig",
    ("compat", "request"): "vllm.v1.request.Request",
    ("runner_v1", "request"): "vllm.v1.worker.gpu_input_batch.CachedRequestState",
    ("draft_config", "target"): "vllm.config.ModelConfig",
    ("vocabulary_loader", "model"): "vllm.config.ModelConfig",
    ("vocabulary_loader", "target"): "vllm.config.ModelConfig",
}
# What is of vLLM's but promises no more than Python does: containers, a logger, an `Enum`, a transformers tokenizer.
CONTAINERS = {"additional", "given", "layout", "logger", "requests", "specs", "tokenizer", "vllm_part"}
# Attributes of `VllmConfig` hold these.
CONFIGS = {
    "cache_config": "CacheConfig", "compilation_config": "CompilationConfig", "device_config": "DeviceConfig",
    "model_config": "ModelConfig", "parallel_config": "ParallelConfig", "scheduler_config": "SchedulerConfig",
    "speculative_config": "SpeculativeConfig",
}  # fmt: skip
# Ours, torch's, numpy's, Python's.
OTHERS = {
    "_WORDS", "_verifier", "bonus", "committed", "costs", "counts", "cu_num_tokens", "device", "drafter",
    "ends", "fault", "key", "known", "last", "lengths", "logits", "pair", "path", "probs", "proposer", "s",
    "self", "settings", "slots", "span", "table", "target_ids", "vocabulary", "where", "x", "other",
}  # fmt: skip
OTHERS_IN_MODULE = {
    ("request_settings", "_parameters_of_verify"),
    ("draft_model", "size"), ("plugin", "_OPTIONS"), ("proposer", "model"), ("refusals", "file"),
    ("compat", "found"), ("draft_config", "NO_TEXT"), ("vocabulary_loader", "store"), ("loading", "model"),
    ("loading", "builder"), ("loading", "folder"), ("loading", "learned_file"),
    ("proposer", "snapshot"), ("proposer", "learned"),
    *(("runner_v1", name) for name in (
        "_verifying", "before", "call", "found", "left", "mine", "ours", "proposals", "read",
    )),
    *(("runner_v2", name) for name in (
        "_propose_signature", "on_host", "proposals", "wanted",
    )),
    *(("verifier_v2", name) for name in (
        "before", "by_request", "call", "first_places", "left", "places", "proposals", "proposed_ids", "q",
        "temperatures",
    )),
}  # fmt: skip
# Arguments that a function takes by `**kwargs`, and what reads them.
PASSED_ON = {
    ("vllm.tokenizers.get_tokenizer", "tokenizer_mode"): "vllm.tokenizers.registry.resolve_tokenizer_args",
}
# What we add to vLLM's objects.
ADDED = {("vllm.v1.core.sched.output.NewRequestData", "cache_salt")}
MODULES = {
    "vllm.v1.sample.rejection_sampler", "vllm.v1.sample.ops.topk_topp_sampler", "vllm", KV_CACHE_PLANNING,
}  # fmt: skip


class _Reader:
    """Finds what a module uses of vLLM, as ``name``, ``(name, attribute)`` and ``(name, argument)``."""

    def __init__(self, path: Path, source: str) -> None:
        self.module, self.tree = path.stem, ast.parse(source)
        self.imports: dict[str, str] = {}
        self.others = set(OTHERS) | {name for module, name in OTHERS_IN_MODULE if module == self.module}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                module = getattr(node, "module", None)
                for alias in node.names:
                    name = f"{module}.{alias.name}" if module else alias.name
                    if name.split(".")[0] == "vllm":
                        self.imports[alias.asname or alias.name] = name
                    else:
                        self.others.add((alias.asname or alias.name).split(".")[0])
        self.used: set[str] = set(self.imports.values())
        self.attributes: set[tuple[str, str]] = set()
        self.arguments: set[tuple[str, str]] = set()
        self.unknown: set[str] = set()
        if self.imports or any(module == self.module for module, _ in IN_MODULE):
            self._read()

    def _type(self, node: ast.AST) -> str | None:
        """What of vLLM's an expression is; "" for nothing, ``None`` if that is not known."""
        text = ast.unparse(node)
        for found in (IN_MODULE.get((self.module, text)), HOLDS.get(text), self.imports.get(text)):
            if found:
                return found
        if text in CONTAINERS or isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp | ast.BoolOp):
            return ""
        if isinstance(node, ast.Name):
            return "" if node.id in self.others or hasattr(builtins, node.id) else None
        if isinstance(node, ast.Attribute):
            owner = self._type(node.value)
            if owner == "vllm.config.VllmConfig" and node.attr in CONFIGS:
                return "vllm.config." + CONFIGS[node.attr]
            return None if owner is None else ""
        if isinstance(node, ast.Subscript):
            return "" if self._type(node.value) is not None else None
        if isinstance(node, ast.Call):
            return "" if self._type(node.func) is not None else None
        return None

    def _read(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                owner = self._type(node.value)
                if owner is None:
                    self.unknown.add(ast.unparse(node))
                elif owner in MODULES:
                    self.used.add(f"{owner}.{node.attr}")
                elif owner:
                    self.attributes.add((owner, node.attr))
            elif isinstance(node, ast.Call):
                self._read_call(node)

    def _read_call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) == "patches.install":
            owner, attribute = node.args[:2]
            self.used.add(f"{self.imports[ast.unparse(owner)]}.{ast.literal_eval(attribute)}")
            return
        function = self.imports.get(ast.unparse(node.func))
        if ast.unparse(node.func) == "type(metadata)":
            function = METADATA
        if isinstance(node.func, ast.Attribute) and (owner := self._type(node.func.value)):
            function = f"{owner}.{node.func.attr}"
        if function is None:
            return
        names = [keyword.arg for keyword in node.keywords if keyword.arg]
        if function == "vllm.config.utils.replace":
            self.attributes |= {("vllm.config.VllmConfig", name) for name in names}
        else:
            self.arguments |= {(function, name) for name in names}


def _readers() -> Iterator[_Reader]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.stem == "doctor":  # It tells what fails in it, whatever that is.
            continue
        yield _Reader(path, path.read_text())


def _name(need: Need) -> str:
    return ".".join(filter(None, (need.module, need.path)))


ALL = (*REQUIRED, *FOR_Q, *FOR_V2, *IN_V2)
NEEDED = {_name(need) for need in ALL}
TAKEN = {(_name(need), parameter) for need in ALL for parameter in need.takes}
HELD = {(_name(need), attribute) for need in ALL for attribute in need.has}
# A method that stands there with its parameters need not stand among the attributes, too.
HELD |= {tuple(name.rsplit(".", 1)) for name in NEEDED if "." in name}


@pytest.mark.parametrize("reader", _readers(), ids=lambda reader: reader.module)
def test_what_is_of_vllm_can_be_told(reader):
    assert sorted(reader.unknown) == [], "say in HOLDS what these hold, or in OTHERS that it is not vLLM's"


def test_every_import_and_every_patch_is_required():
    used = set().union(*(reader.used for reader in _readers()))
    modules = {need.module for need in ALL}
    members = {f"{owner}.{attribute}" for owner, attribute in HELD}
    assert len(used) > 30
    assert sorted(used - NEEDED - modules - members) == []


def test_every_attribute_is_required():
    attributes = set().union(*(reader.attributes for reader in _readers()))
    assert len(attributes) > 70
    assert sorted(attributes - HELD - ADDED) == []


def test_every_argument_is_required():
    arguments = set().union(*(reader.arguments for reader in _readers()))
    by_reader = {(PASSED_ON.get((function, name), function), name) for function, name in arguments}
    assert len(arguments) >= 30
    assert sorted(by_reader - TAKEN) == []


def test_this_vllm_has_everything():
    assert engine.in_fresh_process(look_for_everything) == []


def look_for_everything() -> list[str]:
    """In a fresh process: what this vLLM lacks."""
    return missing(ALL)


def test_a_request_has_the_same_names_on_both_runners():
    held = {
        name: {attribute for owner, attribute in HELD if owner == name}
        for name in ("vllm.v1.worker.gpu_input_batch.CachedRequestState", "vllm.v1.core.sched.output.NewRequestData")
    }
    used = {attribute for reader in _readers() if reader.module == "requests" for _, attribute in reader.attributes}
    of_request = used & held["vllm.v1.worker.gpu_input_batch.CachedRequestState"]
    assert of_request == {"mm_features", "prompt_embeds", "sampling_params"}
    assert of_request <= held["vllm.v1.core.sched.output.NewRequestData"]


class Parent:
    annotated: int

    def prepare(self) -> None:
        self.of_parent = 1


class Owner(Parent):
    of_class = 0

    def __init__(self, other: Parent) -> None:
        self.plain, self.second = 1, 2
        self.told: int = 3
        other.of_other = 4
        print(other.read)

    @property
    def derived(self) -> int:
        return self.plain


@pytest.mark.parametrize("name", ["annotated", "of_parent", "of_class", "plain", "second", "told", "derived"])
def test_attributes_are_found_wherever_they_come_from(name):
    assert missing([Need(__name__, "Owner", has=(name,))]) == []


@pytest.mark.parametrize("name", ["of_other", "read", "nothing"])
def test_what_a_class_uses_of_others_is_not_its_own(name):
    assert missing([Need(__name__, "Owner", has=(name,))]) == [f"{__name__}.Owner.{name}"]


def test_what_is_missing_is_named(monkeypatch):
    wanted = (
        Need(__name__, "Owner.prepare", takes=("self", "depth")),
        Need("no_such_module", "function"),
        Need(__name__, "Owner.no_such_method"),
    )
    assert missing(wanted) == [
        f"{__name__}.Owner.prepare(depth)",
        "no_such_module.function",
        f"{__name__}.Owner.no_such_method",
    ]
    monkeypatch.setattr(requirements, "REQUIRED", wanted)
    vllm = type(sys)("vllm")
    vllm.__version__ = "0.1"
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    with pytest.raises(SettingsError, match=r"vLLM 0\.1, which lacks .*prepare\(depth\) and 2 more; install vLLM"):
        check_vllm()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(runner):\n    return runner.brand_new", {(RUNNER, "brand_new")}),
        ("def f(vllm_config):\n    vllm_config.model_config.new = 1", {("vllm.config.ModelConfig", "new")}),
        ("replace(vllm_config, new=1)", {("vllm.config.VllmConfig", "new")}),
    ],
)
def test_a_new_attribute_would_be_found(source, found):
    reader = _Reader(Path("runner_v1.py"), f"from vllm.config.utils import replace\n{source}\n")
    assert found <= reader.attributes


def test_a_new_variable_argument_or_patch_would_be_found():
    source = "from vllm.a import B, f\nimport patches\nf(new=1)\nfor thing in B.all: thing.part\n"
    source += "patches.install(B, 'g', h)\n"
    reader = _Reader(Path("runner_v1.py"), source)
    assert reader.unknown == {"thing.part"}
    assert reader.arguments == {("vllm.a.f", "new")}
    assert reader.attributes == {("vllm.a.B", "all")}
    assert "vllm.a.B.g" in reader.used
