"""What the package checks, it checks with `python -O`, too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vllm_tokentiming

PACKAGE = Path(vllm_tokentiming.__file__).parent


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_checked_by_assert(path):
    asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert asserts == []
