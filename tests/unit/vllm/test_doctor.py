"""`vllm-tokentiming doctor` passes on a whole installation, and names what is wrong with a broken one."""

import sys
from importlib.metadata import EntryPoint

import pytest

pytest.importorskip("vllm.version")  # The tests have a folder called `vllm`, too.

from vllm_tokentiming.cli import main
from vllm_tokentiming.vllm import doctor
from vllm_tokentiming.vllm.requirements import Need


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))


def problems() -> list[str]:
    return [sentence for passed, sentence in doctor.diagnosis() if not passed]


def test_a_whole_installation_passes(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "PROBLEM" not in printed
    assert len(printed.splitlines()) == 1 + len(doctor.CHECKS)
    assert "finds the plugin by its entry point" in printed


def test_kernels_that_do_not_load_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm_tokentiming.align.dtw", None)
    assert main(["doctor"]) == 1
    assert "PROBLEM  the compiled kernels cannot be loaded" in capsys.readouterr().out


def test_what_a_vllm_lacks_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "REQUIRED", (Need("vllm.config", "NoSuchConfig"),))
    (problem,) = problems()
    assert "lacks vllm.config.NoSuchConfig" in problem


def test_a_vllm_that_takes_no_q_is_no_problem_but_told(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "FOR_Q", (Need("vllm.config", "NoSuchConfig"),))
    assert main(["doctor"]) == 0
    assert "but for vllm.config.NoSuchConfig" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([], "no entry point 'tokentiming'"),
        ([EntryPoint("tokentiming", "vllm_tokentiming.nowhere:register", "vllm.general_plugins")], "cannot be loaded"),
    ],
)
def test_an_entry_point_that_vllm_cannot_use_is_named(monkeypatch, points, words):
    monkeypatch.setattr(doctor, "entry_points", lambda group: points)
    (problem,) = problems()
    assert words in problem


def test_a_list_of_plugins_that_leaves_us_out_is_named(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another,one")
    (problem,) = problems()
    assert "VLLM_PLUGINS is 'another,one'" in problem
    monkeypatch.setenv("VLLM_PLUGINS", "another,tokentiming")
    assert not problems()


def test_a_check_that_fails_itself_does_not_end_the_others(monkeypatch):
    def _broken():
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "CHECKS", (_broken, *doctor.CHECKS))
    assert problems() == ["broken could not be checked: OSError: no such device"]


@pytest.mark.parametrize(
    ("asked", "there", "words"),
    [
        (None, False, "model runner V1 will run, since there is no Triton"),
        ("0", True, "V1 will run, since VLLM_USE_V2_MODEL_RUNNER is '0'"),
        (None, True, "model runner V2 will run"),
        ("1", False, "model runner V2 will run"),
    ],
)
def test_the_runner_that_vllm_will_choose_is_named(monkeypatch, capsys, asked, there, words):
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", there)
    monkeypatch.setattr(doctor, "IN_V2", ())  # Without Triton, not all of it can be imported.
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if asked is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", asked)
    assert main(["doctor"]) == 0
    assert words in capsys.readouterr().out


def test_a_runner_v2_that_lacks_something_is_named(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr(doctor, "IN_V2", (Need("vllm.config", "NoSuchConfig"),))
    (problem,) = problems()
    assert "lacks vllm.config.NoSuchConfig; set VLLM_USE_V2_MODEL_RUNNER=0" in problem
