"""A patch is made once, fails without harm, and cannot be taken away unnoticed."""

from __future__ import annotations

import ast
import functools
import inspect
import types
from pathlib import Path

import engine
import pytest

from vllm_tokentiming.config import SettingsError
from vllm_tokentiming.vllm import patches

SOURCES = sorted(Path(patches.__file__).parent.rglob("*.py"))


class Theirs(Exception):
    """What vLLM's own function raises."""


@pytest.fixture
def owner(monkeypatch):
    """A class that stands for one of vLLM's; what is patched is forgotten afterwards."""
    monkeypatch.setattr(patches, "_installed", {})

    class Owner:
        calls = 0

        def double(self, number: int) -> int:
            type(self).calls += 1
            if number < 0:
                raise Theirs(number)
            return 2 * number

        @classmethod
        def named(cls, number: int) -> str:
            return f"{cls.__name__} {number}"

    return Owner


def _install(owner, attribute, ours, **keywords) -> patches.Patch:
    patches.install(owner, attribute, ours, since="1.0", until="2.0", **keywords)
    return patches.installed()[-1]


def _fail(*_arguments):
    raise RuntimeError("it was made to fail")


def test_ours_gets_the_original_and_its_arguments(owner):
    patch = _install(owner, "double", lambda original, self, number: original(self, number) + 1)
    assert owner().double(3) == 7
    assert (patch.name, patch.since, patch.until) == ("Owner.double", "1.0", "2.0")
    assert list(inspect.signature(owner.double).parameters) == ["self", "number"]


def test_a_method_of_the_class_stays_one(owner):
    _install(owner, "named", lambda original, cls, number: original(cls, number) + "!")
    assert owner.named(1) == owner().named(1) == "Owner 1!"


def test_a_function_of_a_module_can_be_patched(owner):
    module = types.ModuleType("vllm.some.module")
    module.double = lambda number: 2 * number
    patch = _install(module, "double", lambda original, number: original(number) + 1)
    assert module.double(3) == 7
    assert patch.name == "some.module.double"


def test_a_patch_is_made_once(owner):
    for _ in range(3):
        _install(owner, "double", lambda original, self, number: original(self, number) + 1)
    assert owner().double(3) == 7
    assert len(patches.installed()) == 1


def test_what_is_not_there_cannot_be_patched(owner):
    with pytest.raises(AttributeError):
        _install(owner, "no_such", _fail)
    assert patches.installed() == []


def test_a_fault_before_the_original_leaves_vllm_as_it_is(owner):
    _install(owner, "double", _fail)
    assert owner().double(3) == 6
    assert owner.calls == 1


def test_a_fault_before_the_original_has_what_is_done_instead(owner):
    def instead(original, fault, self, number):
        return [original(self, number), str(fault)]

    _install(owner, "double", _fail, instead=instead)
    assert owner().double(3) == [6, "it was made to fail"]


def test_after_a_fault_behind_the_original_its_result_stands(owner):
    def ours(original, self, number):
        original(self, number)
        _fail()

    _install(owner, "double", ours, instead=_fail)
    assert owner().double(3) == 6
    assert owner.calls == 1


def test_what_vllm_raises_passes_through_and_is_tried_once(owner):
    _install(owner, "double", lambda original, self, number: original(self, number) + 1, instead=_fail)
    with pytest.raises(Theirs):
        owner().double(-1)
    assert owner.calls == 1


def test_what_the_user_has_to_change_passes_through(owner):
    def ours(original, self, number):
        raise SettingsError("change it")

    _install(owner, "double", ours)
    with pytest.raises(SettingsError, match="change it"):
        owner().double(3)


def test_a_fault_is_logged_once_with_the_name_of_the_function(owner):
    _install(owner, "double", _fail)
    with engine.logged("vllm_tokentiming.vllm.patches") as messages:
        for _ in range(3):
            owner().double(3)
    assert messages == ["TokenTiming's part of vLLM's Owner.double failed."]


def test_a_patch_that_another_plugin_replaced_is_missed(owner):
    _install(owner, "double", lambda original, self, number: original(self, number))
    patches.check()
    owner.double = lambda self, number: 0
    with pytest.raises(SettingsError, match=r"Owner\.double, which .*test_patches has replaced; leave that plugin out"):
        patches.check()


def test_a_patch_that_another_plugin_wraps_still_stands(owner):
    _install(owner, "double", lambda original, self, number: original(self, number) + 1)
    ours = owner.double

    @functools.wraps(ours)
    def theirs(self, number):
        return ours(self, number) + 10

    owner.double = theirs
    patches.check()
    assert owner().double(3) == 17


def _patched_by_hand(source: str) -> list[str]:
    """Assignments to attributes of what a module imports from vLLM."""
    tree = ast.parse(source)
    from_vllm = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            targets = [ast.Attribute(node.args[0], "?", ast.Store())]
        of_names = [t for t in targets if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name)]
        found += [ast.unparse(target) for target in of_names if target.value.id in from_vllm]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_of_vllm_is_patched_in_another_way(path):
    assert _patched_by_hand(path.read_text()) == []


def test_a_patch_made_by_hand_would_be_found():
    source = "from vllm.a import B, c as d\nB.e = 1\nsetattr(d, 'f', 2)\nself.g = B\n"
    assert _patched_by_hand(source) == ["B.e", "d.?"]
