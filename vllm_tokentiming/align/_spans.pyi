"""Types of the kernel ``csrc/spans.pyx``."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def span_blocks(draft_pieces: Sequence[bytes], target_pieces: Sequence[bytes]) -> NDArray[np.int32]: ...
