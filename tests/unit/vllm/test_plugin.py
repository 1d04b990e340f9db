"""The entry point runs in the engines of all users, so it must never fail."""

from __future__ import annotations

import engine
import pytest

from vllm_tokentiming.vllm import plugin

PARTS = ("_teach_method", "_teach_salts", "_teach_requests", "_teach_runner")


@pytest.mark.parametrize("part", PARTS)
def test_a_vllm_that_cannot_be_taught_goes_on_without_us(monkeypatch, part):
    taught = []
    for name in PARTS:
        monkeypatch.setattr(plugin, name, lambda name=name: taught.append(name))

    def fail():
        raise ImportError("this vLLM has no such module")

    monkeypatch.setattr(plugin, part, fail)
    with engine.logged("vllm_tokentiming.vllm.plugin") as messages:
        plugin.register()
    assert {*taught, part} == set(PARTS)
    assert messages == ["TokenTiming cannot be used with this vLLM."]
