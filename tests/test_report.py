"""The report's numbers are what the suite's files say, and its checks see what they are for."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import conclusions
import lossless
import report
from grid import GRIDS, METHODS, baseline
from results import compare, ratio_of_sums, read
from workloads import loops

TEXT = [list(range(number, number + 21)) for number in (0, 100, 200)]


def write(folder, method, repetition, seconds, passes, written, *, busy=0.0):
    groups = [
        {
            "seconds": s, "cpu_seconds": s * (1 - busy), "target_ids": [ids],
            "counters": {"passes": p, "tokens": 20, "drafts": p, "accepted_at": [p // 2, 1, 0]},
        }
        for s, p, ids in zip(seconds, passes, written, strict=True)
    ]  # fmt: skip
    timed = {"calls": sum(passes), "seconds": 0.1 * sum(passes), "median": 0.1}
    phases = {"target pass": timed, "step": {**timed, "seconds": 0.2 * sum(passes)}}
    if method != "plain":
        phases["draft pass"] = {"calls": 4 * sum(passes), "seconds": 0.04 * sum(passes), "median": 0.01}
    proposals = 0 if method == "plain" else 3
    cell = {"ratio": 20, "method": method, "proposals": proposals, "concurrency": 1, "repetition": repetition}
    row = {"temperature": 0.0, "workload": "heldout", "groups": groups, "phases": phases}
    origin = {"argv": ["suite.py"], "commit": "c", "modified": [], "versions": {}, "processor": "p", "cores": 1}
    shape = {"layers": 9, "hidden": 64, "parameters": 2, "original_parameters": 1, "chosen_by": None}
    content = {
        "cell": cell, "rows": [row], "widened": shape, "provenance": {**origin, "time": "t"},
        "job": {"seed": 0}, "datasets": {"heldout": {"prompts": "0" * 64}},
    }  # fmt: skip
    (folder / f"{method}-{repetition}.json").write_text(json.dumps(content))


def pair(folder, written=TEXT, plain_text=TEXT):
    for repetition in range(2):
        write(folder, "plain", repetition, [4, 4, 4], [20, 20, 20], plain_text)
        write(folder, "tokentiming", repetition, [2, 2, 1], [10, 10, 5], written)


def test_speedup_and_tokens_per_pass_are_ratios_of_sums(tmp_path):
    pair(tmp_path)
    (measured,) = compare(read(tmp_path))
    assert measured.speedup().value == pytest.approx(12 / 5)
    assert measured.tokens_per_pass().value == pytest.approx(60 / 25)
    assert measured.acceptance() == pytest.approx([12 / 25, 3 / 25, 0])
    bound = measured.bound()
    assert bound["bound"] == pytest.approx((60 / 25) * 0.1 / (0.1 + 4 * 0.01))
    assert sum(measured.phases().values()) == pytest.approx(0.2)


def test_a_busy_machine_is_reported(tmp_path):
    pair(tmp_path)
    assert not any("busy" in sentence for sentence in conclusions.disturbance(compare(read(tmp_path)), "seconds"))
    write(tmp_path, "tokentiming", 1, [2, 2, 1], [10, 10, 5], TEXT, busy=0.3)
    sentences = conclusions.disturbance(compare(read(tmp_path)), "seconds")
    assert "not to be trusted" in sentences[-1]


def test_groups_whose_plain_output_loops_count_for_no_method(tmp_path):
    looping = [*TEXT[:2], [1, 2, 3] * 7]
    pair(tmp_path, looping, looping)
    (measured,) = compare(read(tmp_path))
    assert measured.looping.tolist() == [False, False, True]
    assert measured.speedup().value == pytest.approx(2)
    assert measured.speedup(keep_loops=True).value == pytest.approx(12 / 5)


def test_interval_holds_the_ratio_and_is_a_point_without_variation():
    rng = np.random.default_rng(0)
    above = rng.uniform(1, 2, (3, 8))
    estimate = ratio_of_sums(above, np.ones((3, 8)))
    assert estimate.low < estimate.value < estimate.high
    assert ratio_of_sums(np.full((2, 4), 3.0), np.ones((2, 4))) == (3, 3, 3)


def test_a_changed_greedy_token_is_reported_and_noted(tmp_path):
    pair(tmp_path)
    assert lossless.check(tmp_path) == []
    changed = [TEXT[0], [*TEXT[1][:7], 0, *TEXT[1][8:]], TEXT[2]]
    write(tmp_path, "tokentiming", 1, [2, 2, 1], [10, 10, 5], changed)
    (sentence,) = lossless.check(tmp_path)
    assert "1 of 3 outputs differ" in sentence
    assert "token 7" in sentence
    noted = json.loads((tmp_path / "tokentiming-1.json").read_text())["rows"][0]["lossless"]
    assert noted == {"same": 2, "of": 3, "first_difference": [7]}


def test_the_report_is_written_from_the_files(tmp_path, monkeypatch):
    (tmp_path / "suite").mkdir()
    pair(tmp_path / "suite")
    lossless.check(tmp_path / "suite")
    monkeypatch.setattr(sys, "argv", ["report", "--suite", str(tmp_path / "suite"), "--out", str(tmp_path / "R.md")])
    report.main()
    text = (tmp_path / "R.md").read_text()
    assert "6 of 6 greedy outputs" in text
    assert "**2.40 [" in text
    assert "The targets were widened" in text
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "acceptance_by_position.png", "speedup_by_workload.png", "step_by_phase.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target_ids", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], False),
        ([9, 8, 7, 6, 1, 2, 1, 2], True),
        ([5, 6, 7, 8, 3, 3, 3, 3], True),
        ([], False),
    ],
)
def test_loops_are_found_by_the_second_half(target_ids, expected):
    assert loops(target_ids) is expected


def test_every_repetition_has_the_same_cells_and_begins_with_another_method():
    cells = GRIDS["default"].cells()
    assert len({cell.name for cell in cells}) == len(cells)
    first, second = ([c for c in cells if c.repetition == n] for n in range(2))
    assert len(first) == len(second)
    assert first[0].method != second[0].method
    assert all(baseline(method) in METHODS for method in METHODS)


def test_one_group_has_no_interval():
    assert str(ratio_of_sums(np.full((2, 1), 3.0), np.ones((2, 1)))) == "3.00 [one group]"
