"""Types of the kernel ``csrc/dtw.pyx``."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def warp(
    draft_pieces: Sequence[bytes], target_pieces: Sequence[bytes], window: int
) -> tuple[NDArray[np.int32], float]: ...
