"""Reads arguments as vLLM's front end does, in the process of the test, without starting an engine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import engine
import pytest

CUSTOM = {
    "method": "custom_class",
    "model": "vllm_tokentiming.TokenTimingProposer",
    "num_speculative_tokens": 5,
}


@pytest.fixture
def front_end(monkeypatch):
    """Reads arguments as vLLM's front end does; vLLM may change the environment meanwhile."""
    before = dict(os.environ)
    for name, value in engine.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def read(speculative_config: dict, **arguments):
        from vllm.engine.arg_utils import EngineArgs

        defaults = {"model": engine.TARGET, "dtype": "float32", "max_model_len": 512, "enforce_eager": True}
        given = {**defaults, **arguments}
        return EngineArgs(speculative_config=speculative_config, **given).create_engine_config()

    yield read
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(before)


def refused(front_end, speculative_config: dict, *parts: str, **arguments) -> str:
    """The arguments are refused, in one sentence that has all of the parts; returns it."""
    from vllm_tokentiming.config import SettingsError

    with pytest.raises(SettingsError) as caught:
        front_end(speculative_config, **arguments)
    message = str(caught.value)
    assert "tokentiming" in message
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def copy_files(source: str, folder: Path, *names: str) -> str:
    """Put files of a folder into a new one; returns its path."""
    folder.mkdir()
    for name in names:
        shutil.copy(Path(source, name), folder)
    return str(folder)
