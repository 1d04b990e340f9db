"""The folders of the package are layers: each imports only those before it, and only one of them knows vLLM."""

import ast
from pathlib import Path

import pytest

import vllm_tokentiming

PACKAGE = Path(vllm_tokentiming.__file__).parent
# In the order of the data, what knows nothing first. A file of the package's own folder is a layer of its own.
LAYERS = (
    *("config", "folders", "vocab", "align", "context", "startup_cache", "inspection", "tensors", "draft"),
    *("transfer", "verify", "rehearsal", "drafter", "vllm", "cli", "__init__"),
)
PURE = LAYERS[: LAYERS.index("tensors")]
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(name: str) -> str:
    """The layer of a module by its name."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def name_of(file: Path) -> str:
    return ".".join(("vllm_tokentiming", *file.relative_to(PACKAGE).with_suffix("").parts))


def imports(source: str) -> set[str]:
    """The modules that a file imports, also inside functions and for types."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(name: str, source: str) -> list[str]:
    layer = layer_of(name)
    wrong = []
    for imported in imports(source):
        top = imported.split(".")[0]
        if imported == "vllm_tokentiming.__version__":
            continue
        if top == "vllm_tokentiming" and LAYERS.index(layer_of(imported)) > LAYERS.index(layer):
            wrong.append(imported)
        if (top == "vllm" and layer != "vllm") or (top == "torch" and layer in PURE):
            wrong.append(imported)
    return sorted(wrong)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_layer_imports_only_what_it_may(file):
    assert wrong_imports(name_of(file), file.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("vllm_tokentiming.vocab.pair", "import torch"),
        ("vllm_tokentiming.vocab.pair", "def f():\n    from torch import nn"),
        ("vllm_tokentiming.vocab.pair", "from vllm_tokentiming.align.dtw import warp"),
        ("vllm_tokentiming.drafter", "from vllm.config import VllmConfig"),
        ("vllm_tokentiming.drafter", "from vllm_tokentiming.vllm import compat"),
        ("vllm_tokentiming.transfer.stages", "import vllm_tokentiming.verify"),
    ],
)
def test_a_wrong_import_would_be_found(name, source):
    assert len(wrong_imports(name, source)) == 1
