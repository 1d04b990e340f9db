"""The Cython extensions of ``csrc/``; everything else stands in ``pyproject.toml``.

``TOKENTIMING_BOUNDS_CHECKS=1`` builds them with bounds checks on (a negative index is then an error too).
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

checks = os.environ.get("TOKENTIMING_BOUNDS_CHECKS", "0") == "1"

setup(
    ext_modules=cythonize(
        [Extension("vllm_tokentiming.align._dtw", ["csrc/dtw.pyx"], extra_compile_args=["-O3"])],
        language_level=3,
        force=True,  # The switch above changes the generated code, not the source.
        compiler_directives={"boundscheck": checks, "wraparound": False, "cdivision": True, "initializedcheck": checks},
    )
)
