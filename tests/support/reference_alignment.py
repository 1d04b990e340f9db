"""Intentionally simple oracles for `vllm_tokentiming.align.dtw`: plain recursion, exact fractions.

They say what the kernels must compute, and nothing about how: whole matrices, and no band but a condition on
the cell. A block or a path is a list of tuples here.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import accumulate, pairwise

# The documented resolution of a local cost: exact for pieces of up to 24 bytes, rounded down for longer ones.
UNITS_PER_EDIT_DISTANCE = 5354228880

# In order of preference, so that the smallest of equally cheap paths, read from the end, is the wanted one.
DIAGONAL, DRAFT_ADVANCES, TARGET_ADVANCES = 0, 1, 2
BACK = {DIAGONAL: (1, 1), DRAFT_ADVANCES: (1, 0), TARGET_ADVANCES: (0, 1)}

Path = list[tuple[int, int]]
Blocks = list[tuple[int, int, int, int]]


@cache
def edit_distance(a: bytes, b: bytes) -> int:
    """Levenshtein distance by the whole matrix."""
    matrix = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            matrix[i][j] = min(
                matrix[i - 1][j] + 1,
                matrix[i][j - 1] + 1,
                matrix[i - 1][j - 1] + (a[i - 1] != b[j - 1]),
            )
    return matrix[-1][-1]


def levenshtein_cost(draft_piece: bytes, target_piece: bytes) -> Fraction:
    """Edit distance over the longer length, both without their leading spaces."""
    draft_word, target_word = draft_piece.lstrip(b" "), target_piece.lstrip(b" ")
    longer = max(len(draft_word), len(target_word))
    if longer == 0:
        return Fraction(0)
    distance = edit_distance(draft_word, target_word)
    return Fraction(distance * UNITS_PER_EDIT_DISTANCE // longer, UNITS_PER_EDIT_DISTANCE)


def cheapest_path(n: int, m: int, window: int, local_cost: Callable[[int, int], Fraction]) -> tuple[Fraction, Path]:
    """The cheapest path from (0, 0) to (n - 1, m - 1) through cells with |i - j| <= max(window, |n - m|)."""
    band = max(window, abs(n - m))

    @cache
    def best(i: int, j: int) -> tuple[Fraction, tuple[int, ...]] | None:
        """Total cost of the best path that ends at (i, j), and its steps from the last one to the first."""
        if i < 0 or j < 0 or abs(i - j) > band:
            return None
        if i == j == 0:
            return local_cost(0, 0), ()
        candidates = []
        for step, (back_i, back_j) in BACK.items():
            before = best(i - back_i, j - back_j)
            if before is not None:
                candidates.append((before[0] + local_cost(i, j), (step, *before[1])))
        return min(candidates)

    found = best(n - 1, m - 1)
    assert found is not None
    i, j = n - 1, m - 1
    path = [(i, j)]
    for step in found[1]:
        i, j = i - BACK[step][0], j - BACK[step][1]
        path.append((i, j))
    return found[0], path[::-1]


def levenshtein_warp(draft: list[bytes], target: list[bytes], window: int) -> tuple[Fraction, Path]:
    """Cost and path of the warping, for non-empty sides."""
    return cheapest_path(len(draft), len(target), window, lambda i, j: levenshtein_cost(draft[i], target[j]))


def blocks_of_path(path: Path) -> Blocks:
    """Cut a path at its diagonal steps."""
    runs = [[path[0]]]
    for (i, j), cell in pairwise(path):
        if cell == (i + 1, j + 1):
            runs.append([])
        runs[-1].append(cell)
    return [(run[0][0], run[-1][0] + 1, run[0][1], run[-1][1] + 1) for run in runs]


def blocks_of_offsets(draft_lengths: list[int], target_lengths: list[int]) -> Blocks:
    """Cut both sides behind the last token that ends at each common offset but 0, and at their ends."""
    draft_ends, target_ends = list(accumulate(draft_lengths)), list(accumulate(target_lengths))
    cuts = [(0, 0)]
    for offset in sorted(set(draft_ends) & set(target_ends) - {0}):
        cuts.append((sum(end <= offset for end in draft_ends), sum(end <= offset for end in target_ends)))
    if cuts[-1] != (len(draft_lengths), len(target_lengths)):
        cuts.append((len(draft_lengths), len(target_lengths)))
    return [(i0, i1, j0, j1) for (i0, j0), (i1, j1) in pairwise(cuts)]
