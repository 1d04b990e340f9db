"""Checks an installation, and says in words what is wrong with it (``vllm-tokentiming doctor``)."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

from vllm_tokentiming import __version__
from vllm_tokentiming.vllm.requirements import FOR_Q, FOR_V2, IN_V2, REQUIRED, TESTED_VERSIONS, missing

GROUP, NAME = "vllm.general_plugins", "tokentiming"


class Problem(Exception):
    """Something that keeps the plugin from working; says what to do."""


def _kernels() -> str:
    try:
        importlib.import_module("vllm_tokentiming.align.dtw")
    except ImportError as error:
        raise Problem(f"the compiled kernels cannot be loaded ({error}); install the package again") from None
    return "the compiled kernels load"


def _vllm() -> str:
    try:
        version = importlib.import_module("vllm").__version__
    except ImportError as error:
        raise Problem(f"vLLM cannot be imported ({error}); install the vLLM that fits this device") from None
    tested = any(version.startswith(known) for known in TESTED_VERSIONS)
    return f"vLLM {version}" + ("" if tested else f", on which nothing was tested ({', '.join(TESTED_VERSIONS)} were)")


def _requirements() -> str:
    if lacks := missing(REQUIRED):
        raise Problem(f"this vLLM lacks {', '.join(lacks)}; install vLLM {TESTED_VERSIONS[-1]}")
    if lacks := missing(FOR_Q):
        return f"this vLLM has what is needed, but for {', '.join(lacks)}: sampled requests are verified as one-hot"
    return "this vLLM has everything that is needed"


def _entry_point() -> str:
    found = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not found:
        raise Problem(f"vLLM will not find the plugin: no entry point {NAME!r} in {GROUP!r}; install the package again")
    try:
        found[0].load()
    except Exception as error:
        raise Problem(
            f"the entry point {found[0].value} cannot be loaded ({error}); install the package again"
        ) from None
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        raise Problem(f"VLLM_PLUGINS is {allowed!r}, so vLLM loads no other plugin; add {NAME!r} to it")
    return "vLLM finds the plugin by its entry point"


def _device() -> str:
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if not kind:
        raise Problem("vLLM finds no device that it can run on; install the vLLM that fits this device")
    return f"vLLM runs on {current_platform.get_device_name() if kind != 'cpu' else 'the CPU'}"


def _runner() -> str:
    from vllm.triton_utils import HAS_TRITON

    asked = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    on_v2 = HAS_TRITON if asked is None else asked not in ("", "0")
    if not on_v2:
        why = "there is no Triton" if asked is None else f"VLLM_USE_V2_MODEL_RUNNER is {asked!r}"
        return f"vLLM's model runner V1 will run, since {why}"
    if asked is None and missing(FOR_V2):
        return f"vLLM's model runner V1 will run: V2 lacks {', '.join(missing(FOR_V2))}"
    if lacks := missing(IN_V2):
        raise Problem(f"vLLM's model runner V2 lacks {', '.join(lacks)}; set VLLM_USE_V2_MODEL_RUNNER=0")
    return "vLLM's model runner V2 will run, unless the target needs V1"


def _cache() -> str:
    from vllm_tokentiming.vllm.vocabulary_loader import startup_cache

    folder = startup_cache().folder
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        raise Problem(f"{folder} cannot be written to, so every start takes as long as the first; set VLLM_CACHE_ROOT")
    kept = sum(file.stat().st_size for file in Path(folder).glob("*.npz"))
    return f"vocabularies are kept in {folder} ({kept / 1e6:.0f} MB)"


CHECKS: tuple[Callable[[], str], ...] = (_kernels, _vllm, _requirements, _entry_point, _device, _runner, _cache)


def diagnosis() -> Iterator[tuple[bool, str]]:
    """Make all checks, in order; those after one that fails may fail for the same reason.

    Yields:
        Whether a check passed, and a sentence.
    """
    yield True, f"vllm-tokentiming {__version__}, Python {platform.python_version()}"
    for check in CHECKS:
        try:
            yield True, check()
        except Problem as problem:
            yield False, str(problem)
        except Exception as error:
            yield False, f"{check.__name__.strip('_')} could not be checked: {type(error).__name__}: {error}"
