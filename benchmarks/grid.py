"""What the suite measures: methods, presets, and the cells that they make."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAIN, TRANSFORMERS_PLAIN = "plain", "plain (transformers)"
SAME_VOCABULARY = "draft_model (vLLM), same vocabulary"

# vLLM's speculative configuration of each method; a draft model and the number of proposals are added.
VLLM_METHODS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "ngram (vLLM)": {"method": "ngram", "prompt_lookup_max": 4},
    "tli (vLLM)": {"method": "draft_model", "use_heterogeneous_vocab": True},
    "slem": {"method": "tokentiming", "strategy": "slem"},
    "tli": {"method": "tokentiming", "strategy": "tli"},
    "tokentiming": {"method": "tokentiming"},
    SAME_VOCABULARY: {"method": "draft_model", "draft_sample_method": "probabilistic"},
}
# Outside vLLM, each against transformers' own plain generation; one request at a time.
TRANSFORMERS_METHODS = (TRANSFORMERS_PLAIN, "universal assisted (transformers)")
METHODS = (*VLLM_METHODS, *TRANSFORMERS_METHODS)


def baseline(method: str) -> str:
    """The method without speculation that a method is held against."""
    return TRANSFORMERS_PLAIN if method in TRANSFORMERS_METHODS else PLAIN


@dataclass(frozen=True)
class Cell:
    """What one process measures; temperatures and workloads are rows inside.

    Attributes:
        ratio: Cost of a target pass in draft passes; 0 for the target as it was trained.
        method: A key of `METHODS`.
        proposals: Most tokens to propose in a step; 0 for plain decoding.
        concurrency: Requests in a batch.
        repetition: From 0.
    """

    ratio: float
    method: str
    proposals: int
    concurrency: int
    repetition: int

    @property
    def name(self) -> str:
        """A file name."""
        method = "".join(c if c.isalnum() else "-" for c in self.method)
        return f"r{self.ratio:g}_{method}_k{self.proposals}_c{self.concurrency}_n{self.repetition}"


@dataclass(frozen=True)
class Grid:
    """What to measure.

    A full product would take days. One case is measured on all workloads: the main ratio, one request at a time, the
    first number of proposals. From there every axis (ratio, concurrency, proposals) is varied alone, on
    `side_workloads`.

    Attributes:
        ratios: Costs of a target pass in draft passes; the first is the main one.
        methods: Keys of `METHODS`.
        proposals: The first is the main one.
        concurrencies: The first is the main one.
        temperatures: Rows of every cell.
        workloads: Rows of the main case.
        side_workloads: Rows of the other cases.
        repetitions: Of everything.
        groups: Batches in a row; a row has `groups * concurrency` prompts.
        tokens: Written for each prompt.
        characters: Of each prompt, at most.
    """

    ratios: tuple[float, ...]
    methods: tuple[str, ...]
    proposals: tuple[int, ...]
    concurrencies: tuple[int, ...]
    temperatures: tuple[float, ...]
    workloads: tuple[str, ...]
    side_workloads: tuple[str, ...]
    repetitions: int
    groups: int
    tokens: int = 64
    characters: int = 400

    def cells(self) -> list[Cell]:
        """All cells, in the order in which they are to be measured.

        A repetition measures every method before the next one begins, and each begins with another method, so that a
        machine that becomes slower or faster treats all alike.
        """
        cases = [(ratio, self.concurrencies[0]) for ratio in self.ratios]
        cases += [(self.ratios[0], concurrency) for concurrency in self.concurrencies[1:]]
        found = []
        for repetition in range(self.repetitions):
            shift = repetition % len(self.methods)
            for place, (ratio, concurrency) in enumerate(cases):
                for method in self.methods[shift:] + self.methods[:shift]:
                    if concurrency > 1 and method in TRANSFORMERS_METHODS:
                        continue
                    proposals = self.proposals if place == 0 else self.proposals[:1]
                    if method == baseline(method):
                        proposals = (0,)
                    found += [Cell(ratio, method, number, concurrency, repetition) for number in proposals]
        return found

    def workloads_of(self, cell: Cell) -> tuple[str, ...]:
        """The workloads that a cell measures; a baseline all that anything is held against."""
        main = (self.ratios[0], self.concurrencies[0]) == (cell.ratio, cell.concurrency)
        if not main or cell.proposals not in (0, self.proposals[0]):
            return self.side_workloads
        return (*self.side_workloads, *(name for name in self.workloads if name not in self.side_workloads))


_HELDOUT = ("heldout/english_stories", "heldout/python", "heldout/russian_tinystories")
_SPEC_BENCH = tuple(
    f"spec-bench/{kind}" for kind in ("mt-bench", "translation", "summarization", "qa", "math_reasoning", "rag")
)
_POOL = ("heldout",)
GRIDS = {
    "quick": Grid((20,), (PLAIN, "tli (vLLM)", "tokentiming"), (5,), (1,), (0.0, 0.8), _POOL, _POOL, 2, 6),
    "default": Grid(
        (20, 5, 50), METHODS, (5,), (1, 4, 16), (0.0, 0.8),
        (*_HELDOUT, "gsm8k", "humaneval", "multilingual"), _POOL, 2, 6,
    ),
    "full": Grid(
        (20, 0, 5, 50), METHODS, (5, 3, 8), (1, 4, 16), (0.0, 0.6, 1.0),
        (*_HELDOUT, "heldout/multilingual_udhr", *_SPEC_BENCH, "humaneval", "gsm8k", "multilingual"), _POOL, 4, 8,
    ),
}  # fmt: skip


def with_draft(method: str, proposals: int, draft: Path, same_vocabulary_draft: Path | None) -> dict[str, Any] | None:
    """vLLM's speculative configuration of a method."""
    settings = VLLM_METHODS[method]
    if settings is None:
        return None
    model = same_vocabulary_draft if method == SAME_VOCABULARY else draft
    needs_model = settings["method"] != "ngram"
    return {**settings, "num_speculative_tokens": proposals, **({"model": str(model)} if needs_model else {})}
