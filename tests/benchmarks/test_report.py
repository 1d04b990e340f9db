"""The reports are what their program writes from the data, and its checks see what they are for."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.common import provenance
from benchmarks.common.grid import GRIDS, METHODS, baseline
from benchmarks.common.reduce import reduced
from benchmarks.common.workloads import loops
from benchmarks.report import conclusions, report
from benchmarks.report.results import compare, ratio_of_sums
from benchmarks.report.speed import Suite

ROOT = provenance.ROOT
TEXT = [list(range(number, number + 21)) for number in (0, 100, 200)]
CONDITION = {"dtype": "bfloat16", "compiled": True, "threads": 2, "device": "cpu", "max_num_seqs": 256}
MADE = {
    "command": "python x.py", "commit": "0123456789abcdef", "modified": [], "versions": {"vllm": "9"},
    "hardware": "2 cores of X, CPU", "time": "2026-01-02T03:04:05Z",
}  # fmt: skip


def cell(method, repetition, seconds, passes, written, others=0.0):
    groups = [
        {
            "seconds": s, "others": others, "target_ids": [ids], "tokens": 20, "passes": p,
            "drafts": 0 if method == "plain" else p, "accepted_at": [] if method == "plain" else [p // 2, 1, 0],
        }
        for s, p, ids in zip(seconds, passes, written, strict=True)
    ]  # fmt: skip
    timed = {"calls": sum(passes), "seconds": 0.1 * sum(passes), "median": 0.1}
    phases = {"target pass": timed, "step": {**timed, "seconds": 0.2 * sum(passes)}}
    if method != "plain":
        phases["draft pass"] = {"calls": 4 * sum(passes), "seconds": 0.04 * sum(passes), "median": 0.01}
    shape = {"layers": 9, "hidden": 64, "parameters": 2, "original_parameters": 1, "chosen_by": None}
    row = {"temperature": 0.0, "workload": "heldout", "concurrency": 1, "groups": groups, "phases": phases}
    proposals = 0 if method == "plain" else 3
    return {
        "cell": {"ratio": 20, "method": method, "proposals": proposals, "repetition": repetition},
        "rows": [row], "widened": shape, "conditions": CONDITION, "commit": "c", "seed": 0,
        "datasets": {"heldout, batch 1": "0" * 64},
    }  # fmt: skip


def cells(written=TEXT, plain_text=TEXT, **changes):
    found = []
    for repetition in range(2):
        found.append(cell("plain", repetition, [4, 4, 4], [20, 20, 20], plain_text))
        found.append(cell("tokentiming", repetition, [2, 2, 1], [10, 10, 5], written, **changes))
    return found


def measured(*arguments, **changes):
    (found,) = compare(reduced(cells(*arguments, **changes))["rows"])
    return found


def speed(*arguments):
    settings = {"side_workloads": ["heldout"]}
    about = {"provenance": MADE, "departures": ["not compiled"], "pair": "a pair", "settings": settings}
    return {**about, **reduced(cells(*arguments))}


def accepted(*workloads):
    workloads = workloads or ("heldout",)
    rows = [
        {
            "method": method, "temperature": t, "workload": workload,
            "tokens": [40, 40], "passes": passes, "outputs": 4, "different": 1,
        }
        for t in (0.0, 0.8)
        for workload in workloads
        for method, passes in (("slem", [40, 30]), ("tokentiming", [20, 15]))
    ]  # fmt: skip
    settings = {"workloads": list(workloads), "num_prompts": 4, "tokens": 11, "group": 2, "proposals": 5}
    about = {"provenance": MADE, "conditions": {"slem": CONDITION}, "pair": "a pair", "settings": settings}
    return {**about, "rows": rows}


def written(folder, **data):
    """A repository with data files and the reports that are written from them, without pictures."""
    (folder / "benchmarks/plots").mkdir(parents=True)
    (folder / "README.md").write_text(f"# Name\n\n{report.BEGIN}old\n{report.END}\nMore.\n")
    for name, content in data.items():
        provenance.write_data(folder / f"benchmarks/data/{name}.json", content)
    for name, text in report.render(report.read(folder / "benchmarks/data"), folder).items():
        (folder / name).write_text(text)
    return folder


def differences(folder):
    return list(report.differences(report.read(folder / "benchmarks/data"), folder))


def test_the_committed_reports_are_written_from_the_committed_data():
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.report.report", "--check"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def test_a_number_that_was_changed_by_hand_is_found(tmp_path):
    folder = written(tmp_path, acceptance=accepted())
    assert differences(folder) == []
    path = folder / "README.md"
    assert "| tokentiming | 2.29 [2.00, 2.67] |" in path.read_text()
    path.write_text(path.read_text().replace("| tokentiming | 2.29 ", "| tokentiming | 2.39 "))
    lines = differences(folder)
    assert any(line.startswith("-| tokentiming | 2.39 ") for line in lines)
    assert any(line.startswith("+| tokentiming | 2.29 ") for line in lines)


def test_the_check_says_what_differs_and_fails(tmp_path):
    folder = written(tmp_path, acceptance=accepted())
    (folder / "benchmarks/RESULTS.md").write_text("On an accelerator, it is a few launches.\n")
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.report.report", "--check", "--root", str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1
    assert "-On an accelerator, it is a few launches." in found.stderr


def test_a_report_without_data_is_neither_written_nor_left_there(tmp_path):
    folder = written(tmp_path)
    assert sorted(path.name for path in (folder / "benchmarks").glob("*.md")) == ["RESULTS.md"]
    assert "no measurement" in (folder / "README.md").read_text()
    (folder / "benchmarks/SOAK.md").write_text("# Soak\n")
    assert differences(folder) == ["benchmarks/SOAK.md is there, but its data is not"]


def test_pictures_have_to_be_there_and_referred_to(tmp_path):
    folder = written(tmp_path, speed=speed())
    drawn = report.pictures(report.read(folder / "benchmarks/data"))
    assert sorted(differences(folder)) == sorted(f"plots/{name} is referred to, but missing" for name in drawn)
    for name in [*drawn, "old.png"]:
        (folder / "benchmarks/plots" / name).touch()
    assert differences(folder) == ["plots/old.png is there, but no report refers to it"]


def test_pictures_are_drawn_and_old_ones_removed(tmp_path):
    pytest.importorskip("matplotlib")
    folder = written(tmp_path, speed=speed())
    (folder / "benchmarks/plots/old.png").touch()
    report.write(report.read(folder / "benchmarks/data"), folder)
    assert differences(folder) == []
    assert not (folder / "benchmarks/plots/old.png").exists()


def test_a_finding_without_its_value_is_left_out():
    text = "## Head\n\n- One is {{a}}.\n- Two is\n  {{b}}.\n- Three.\n"
    assert report.findings(text, {"a": "1"}) == "## Head\n\n- One is 1.\n- Three.\n"


def test_findings_name_only_values_that_data_can_have():
    values = report.values_of({"acceptance": accepted()})
    assert values["tokentiming over slem, T = 0"].startswith("2.00 [")
    text = report.results({"acceptance": accepted()})
    assert "2.00 [2.00, 2.00] times as many tokens a pass" in text
    assert "{{" not in text
    assert "µs" not in text.partition("## Tokens per target pass")[0]


def test_conditions_and_what_is_not_a_users_stand_below_a_section(tmp_path):
    text = report.results({"speed": speed()})
    assert "bfloat16, compiled, 2 threads, at most 256 requests at once; vLLM 9; 2 cores of X, CPU" in text
    assert "Not as users have it: not compiled." in text
    mixed = {**accepted(), "conditions": {"slem": CONDITION, "tokentiming": {**CONDITION, "threads": 3}}}
    text = report.results({"acceptance": mixed})
    assert "slem: bfloat16, compiled, 2 threads" in text
    assert "tokentiming: bfloat16, compiled, 3 threads" in text


def test_an_accelerators_speeds_are_given_in_those_of_plain_decoding():
    ways = {"temperature": 0.0, "batch": 2}
    rows = [
        {"method": "plain", **ways, "tokens_per_second": [90, 100, 110], "tokens_per_pass": 1.0, "same_greedy": 2},
        {"method": "tokentiming", **ways, "tokens_per_second": [50, 60, 70], "tokens_per_pass": 2.5, "same_greedy": 1},
    ]
    condition = {"dtype": "bfloat16", "compiled": True, "device": "cuda", "max_num_seqs": 8}
    text = report.tables.accelerator(
        {
            "provenance": MADE, "departures": [], "pair": "a pair", "rows": rows,
            "conditions": {
                "plain": {**condition, "runner": "V2", "asynchronous": True},
                "tokentiming": {**condition, "runner": "V1", "asynchronous": False},
            },
            "settings": {"tokens": 16, "rounds": 3, "proposals": 6},
        }
    )  # fmt: skip
    assert "| T = 0, 2 | 100 | 0.6 [0.55, 0.65] | 2.50 |" in text
    assert "Plain: model runner V2, scheduled ahead; Tokentiming: model runner V1. 1 of 2 greedy texts" in text
    assert "bfloat16, compiled, at most 8 requests at once; vLLM 9" in text


def test_what_repeats_itself_is_added_up_over_the_ways_to_ask():
    rows = [
        {"method": "plain", "outputs": 4, "same_greedy": 3, "largest_gap": gap, "same_seeded": 4}
        for gap in (0.125, None, 0.25)
    ]
    text = report.tables.repeatability_in_short({"pair": "a pair", "conditions": {"plain": CONDITION}, "rows": rows})
    assert "in bfloat16" in text
    assert "plain, 9 of 12 greedy texts (largest gap of the two log-probabilities: 0.250) and 12 of 12 seeded" in text


def test_speedup_and_tokens_per_pass_are_ratios_of_sums():
    found = measured()
    assert found.speedup().value == pytest.approx(12 / 5)
    assert found.tokens_per_pass().value == pytest.approx(60 / 25)
    assert found.acceptance() == pytest.approx([12 / 25, 3 / 25, 0])
    assert found.bound()["bound"] == pytest.approx((60 / 25) * 0.1 / (0.1 + 4 * 0.01))
    assert sum(found.phases().values()) == pytest.approx(0.2)


def test_a_busy_machine_is_reported():
    assert conclusions.disturbance([measured()]) == []
    assert "not to be trusted" in conclusions.disturbance([measured(others=0.3)])[-1]


def test_groups_whose_plain_output_loops_count_for_no_method():
    looping = [*TEXT[:2], [1, 2, 3] * 7]
    found = measured(looping, looping)
    assert found.looping.tolist() == [False, False, True]
    assert found.speedup().value == pytest.approx(2)
    assert found.speedup(keep_loops=True).value == pytest.approx(12 / 5)


def test_interval_holds_the_ratio_and_is_a_point_without_variation():
    rng = np.random.default_rng(0)
    above = rng.uniform(1, 2, (3, 8))
    estimate = ratio_of_sums(above, np.ones((3, 8)))
    assert estimate.low < estimate.value < estimate.high
    assert ratio_of_sums(np.full((2, 4), 3.0), np.ones((2, 4))) == (3, 3, 3)


def test_a_changed_greedy_token_is_counted_and_in_float32_no_rounding():
    assert "6 of 6 greedy outputs" in conclusions.losslessness([measured()], "float32")[0]
    found = measured([TEXT[0], [*TEXT[1][:7], 0, *TEXT[1][8:]], TEXT[2]])
    assert [row["different"] for row in found.rows] == [1, 1]
    sentence, *wrong = conclusions.losslessness([found], "float32")
    assert "4 of 6 greedy outputs" in sentence
    assert all("Not lossless" in line for line in wrong)
    assert len(wrong) == 2
    (sentence,) = conclusions.losslessness([found], "bfloat16")
    assert "rounds otherwise" in sentence


def test_a_data_file_has_a_line_for_each_row_and_short_numbers(tmp_path):
    path = tmp_path / "new/x.json"
    provenance.write_data(path, {"a": 1 / 3, "rows": [{"b": [2 / 3, 4]}, {"b": "ж"}]})
    assert path.read_text().splitlines()[3:5] == ['  {"b": [0.66667, 4]},', '  {"b": "ж"}']
    assert json.loads(path.read_text()) == {"a": 0.33333, "rows": [{"b": [0.66667, 4]}, {"b": "ж"}]}


def test_a_command_names_no_folder_of_this_machine():
    found = provenance.provenance(["/other/place/x.py", str(provenance.ROOT / "benchmarks/y"), "--pair", "A <- B"])
    assert found["command"] == "python x.py benchmarks/y --pair 'A <- B'"


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


def test_a_program_is_named_as_it_is_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/any/suite.py", "--tokens", "2"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="benchmarks.speed.suite"))
    assert provenance.provenance()["command"] == "python -m benchmarks.speed.suite --tokens 2"


def test_every_repetition_has_the_same_cells_and_begins_with_another_method():
    cells = GRIDS["default"].cells()
    assert len({cell.name for cell in cells}) == len(cells)
    first, second = ([c for c in cells if c.repetition == n] for n in range(2))
    assert len(first) == len(second)
    assert first[0].method != second[0].method
    assert all(baseline(method) in METHODS for method in METHODS)


def test_a_baseline_measures_every_case_of_what_is_held_against_it():
    for grid in GRIDS.values():
        for found in grid.cells():
            plain = next(c for c in grid.cells() if c.ratio == found.ratio and c.method == baseline(found.method))
            assert set(grid.cases_of(found)) <= set(grid.cases_of(plain))


def test_one_group_has_no_interval():
    assert str(ratio_of_sums(np.full((2, 1), 3.0), np.ones((2, 1)))) == "3.00 [one group]"


def test_the_main_case_is_the_one_most_was_measured_in():
    suite = Suite(speed())
    assert (suite.ratio, suite.concurrency) == (20, 1)
    assert suite.in_main == suite.main == suite.pooled


def test_tokens_per_pass_are_told_by_kind_of_text():
    found = accepted("prose", "code")
    for row in found["rows"]:
        if row["workload"] == "code" and row["method"] == "slem":
            row["passes"] = [10, 10]
    text = report.tables.acceptance(found)
    assert "| slem | 1.78 [" in text.replace("`", ""), "all kinds together: 160 tokens in 90 passes"
    prose, code = (
        next(line for line in text.splitlines() if line.startswith(f"| {kind}")) for kind in ("prose", "code")
    )
    assert "1.14 [" in prose and "4.00 [" in code


def test_the_parts_of_a_start_are_added_up():
    def row(start, part, seconds, repetition):
        about = {"way": "as named", "start": start, "process": "worker", "repetition": repetition, "part": part}
        return {**about, "processor": seconds, "passed": seconds}

    rows = [
        row("cold", part, seconds + n, n) for n in (0, 1, 2) for part, seconds in (("encoders", 1), ("transducer", 2))
    ]
    rows += [row("warm", "encoders", 0.5, 0), {"way": "as named", "repetition": 0, "kept_bytes": 3_000_000}]
    text = report.tables.startup({"provenance": MADE, "pair": "a pair", "rows": rows})
    cold = next(line for line in text.splitlines() if "worker" in line and "cold" in line)
    warm = next(line for line in text.splitlines() if "worker" in line and "warm" in line)
    assert "5.0 (3.0 to 7.0)" in cold and "encoders 2.0, transducer 3.0" in cold
    assert "0.5 (0.5 to 0.5)" in warm
    assert "3 MB" in text
