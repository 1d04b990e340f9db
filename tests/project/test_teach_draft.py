"""A draft learns from what a target writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import engine
import pytest

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OPTIONS = "--prompts 24 --continuation 48 --passes 12 --batch 4 --length 64 --learning-rate 0.001"


def _teach(folder: str) -> list[float]:
    sys.path.insert(0, str(EXAMPLES))
    import teach_draft

    paths = ["--target", engine.TARGET, "--draft", engine.DRAFT, "--out", f"{folder}/draft"]
    paths += ["--text", f"{folder}/text.txt", "--written", f"{folder}/written.txt"]
    return teach_draft.main([*paths, *OPTIONS.split()])


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("teach")
    prompts = json.loads((EXAMPLES / "prompts.json").read_text())
    (folder / "text.txt").write_text("<|endoftext|>".join(prompt["text"] for prompt in prompts))
    return folder, engine.in_fresh_process(_teach, folder=str(folder))


def test_the_draft_gets_to_know_what_the_target_writes(taught):
    losses = taught[1]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_the_draft_keeps_its_tokenizer(taught):
    before, after = (
        json.loads((Path(place) / "tokenizer.json").read_text()) for place in (engine.DRAFT, taught[0] / "draft")
    )
    assert after["model"] == before["model"]


def test_what_the_target_wrote_is_kept(taught):
    written = (taught[0] / "written.txt").read_bytes().decode().split("\x00")
    assert len(written) == 24
    assert all(len(text) > 20 for text in written)
