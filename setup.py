"""The Cython extensions of ``csrc/``; everything else stands in ``pyproject.toml``.

``TOKENTIMING_BOUNDS_CHECKS=1`` builds them with bounds checks on (a negative index is then an error too), and
``TOKENTIMING_SANITIZE=1`` with the address and the undefined-behaviour sanitizer of the C compiler.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

checks = os.environ.get("TOKENTIMING_BOUNDS_CHECKS", "0") == "1"
sanitize = os.environ.get("TOKENTIMING_SANITIZE", "0") == "1"
sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitize else []
compile_args = ["-O1", "-g", "-fno-omit-frame-pointer", *sanitizers] if sanitize else ["-O3"]


def extension(module: str, source: str) -> Extension:
    """The extension of one kernel; its name in the package is not always that of its source."""
    return Extension(
        f"vllm_tokentiming.{module}", [source], extra_compile_args=compile_args, extra_link_args=sanitizers
    )


setup(
    options={"build_ext": {"parallel": True}},  # A processor for each.
    ext_modules=cythonize(
        [
            extension("align._dtw", "csrc/dtw.pyx"),
            extension("align._spans", "csrc/spans.pyx"),
            extension("draft._ngrams", "csrc/ngrams.pyx"),
        ],
        include_path=["csrc"],  # The `.pxd` files, which hold what is inlined.
        language_level=3,
        force=True,  # The switches above change what is generated, not the source.
        compiler_directives={"boundscheck": checks, "wraparound": False, "cdivision": True, "initializedcheck": checks},
    ),
)
