"""Lets vLLM's Triton kernels run on a machine without an accelerator, under Triton's own interpreter.

    PYTHONPATH=.venv/triton python scripts/triton_interpreter.py -m benchmarks.exactness.exactness --settings ...

runs a module that way, on vLLM's model runner V2, and the tests of runner V2 import it. It has to come before vLLM.
vLLM believes in Triton on a CPU only if there is a backend of that name, so one is named here, which the interpreter
never asks for anything. Three things that the interpreter of 3.9.0 lacks are added: `log1p`, `isnan`, and masks that
are integers. (vLLM's kernel for top-p does not run in it even so.) A step of an engine takes tenths of a second.
"""

from __future__ import annotations

import functools
import inspect
import os
import runpy
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton
import triton.backends
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


@triton.jit
def _log1p(x):
    return tl.log(x + 1.0)


@triton.jit
def _isnan(x):
    return x != x


def _with_boolean_masks(method: Any, place: int) -> Any:
    """Wrap a load or store of the interpreter, whose mask is the argument at a place."""

    def wrapped(self: Any, *arguments: Any) -> Any:
        given = list(arguments)
        mask = given[place]
        if mask is not None and mask.data.dtype != np.bool_:
            given[place] = interpreter.TensorHandle(mask.data.astype(np.bool_), tl.int1)
        return method(self, *given)

    return wrapped


# By module or class, what the interpreter replaces in it while a kernel runs: it looks for that in every call of every
# function, which takes a fifth of its time.
_BUILTINS = {
    place: [(name, member) for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]
    for place in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
}


def _patch_builtin(place: Any, builder: Any, scope: Any) -> None:
    for name, member in _BUILTINS[place]:
        if getattr(place, name) is member:  # Not replaced yet, by a function that calls this one.
            interpreter._patch_attr(place, name, member, builder, scope)


interpreter._patch_builtin = _patch_builtin
# An accelerator does not look for overflows either, and hashes overflow on purpose. A third of the time.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
_np_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)


def _get_np_dtype(tt_dtype: Any) -> Any:
    """Look up what is asked for in every operation, for which the interpreter makes a table each time."""
    scalar = tt_dtype.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _np_dtype_of_scalar(scalar)


interpreter._get_np_dtype = _get_np_dtype
triton.backends.backends["cpu"] = triton.backends.Backend(None, _Driver)
libdevice.log1p, libdevice.isnan = _log1p, _isnan
_builder = interpreter.InterpreterBuilder
_builder.create_masked_load = _with_boolean_masks(_builder.create_masked_load, 1)
_builder.create_masked_store = _with_boolean_masks(_builder.create_masked_store, 2)
# Rows of -inf, as of positions without a proposal, are computed with and not used.
np.seterr(invalid="ignore")

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        sys.exit("usage: triton_interpreter.py -m MODULE [ARGUMENT ...]")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    del sys.argv[:2]
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
