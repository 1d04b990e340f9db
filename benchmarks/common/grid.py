"""What the suite measures: methods, presets, and the cells that they make."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAIN, OURS, TRANSFORMERS_PLAIN = "plain", "tokentiming", "plain (transformers)"

# vLLM's speculative configuration of each method; a draft model and the number of proposals are added.
VLLM_METHODS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "ngram (vLLM)": {"method": "ngram", "prompt_lookup_max": 4},
    "tli (vLLM)": {"method": "draft_model", "use_heterogeneous_vocab": True},
    "slem": {"method": "tokentiming", "strategy": "slem"},
    "tli": {"method": "tokentiming", "strategy": "tli"},
    "tokentiming, one by one": {"method": "tokentiming", "rejection_sample_method": "standard"},
    "tokentiming, no copies": {"method": "tokentiming", "copy_repeats": False},
    "tokentiming, fixed length": {"method": "tokentiming", "adaptive_length": False},
    OURS: {"method": "tokentiming"},
}
# What needs training for one target: made by `examples/references/`, in folders of a folder that is named.
TRAINED_METHODS: dict[str, dict[str, Any]] = {
    "same vocabulary (vLLM)": {"method": "draft_model", "model": "same-vocabulary"},
    "same vocabulary, drawn (vLLM)": {
        "method": "draft_model", "model": "same-vocabulary", "draft_sample_method": "probabilistic",
    },
    "Medusa (vLLM)": {"method": "medusa", "model": "medusa"},
    "EAGLE-3 (vLLM)": {"method": "eagle3", "model": "eagle3"},
}  # fmt: skip
# Outside vLLM, each against transformers' own plain generation; one request at a time.
TRANSFORMERS_METHODS = (TRANSFORMERS_PLAIN, "universal assisted (transformers)")
METHODS = (*VLLM_METHODS, *TRANSFORMERS_METHODS, *TRAINED_METHODS)


def baseline(method: str) -> str:
    """The method without speculation that a method is held against."""
    return TRANSFORMERS_PLAIN if method in TRANSFORMERS_METHODS else PLAIN


@dataclass(frozen=True)
class Cell:
    """What one process measures; temperatures, batches and workloads are rows inside.

    Attributes:
        ratio: Cost of a target pass in draft passes; 0 for the target as it was trained.
        method: A key of `METHODS`.
        proposals: Most tokens to propose in a step; 0 for plain decoding.
        repetition: From 0.
    """

    ratio: float
    method: str
    proposals: int
    repetition: int

    @property
    def name(self) -> str:
        """A file name."""
        method = "".join(c if c.isalnum() else "-" for c in self.method)
        return f"r{self.ratio:g}_{method}_k{self.proposals}_n{self.repetition}"


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
        found = []
        for repetition in range(self.repetitions):
            shift = repetition % len(self.methods)
            for place, ratio in enumerate(self.ratios):
                for method in self.methods[shift:] + self.methods[:shift]:
                    proposals = self.proposals if place == 0 else self.proposals[:1]
                    if method == baseline(method):
                        proposals = (0,)
                    found += [Cell(ratio, method, number, repetition) for number in proposals]
        return found

    def cases_of(self, cell: Cell) -> list[tuple[int, str]]:
        """The batches and workloads that a cell measures; a baseline all that anything is held against."""
        main = cell.ratio == self.ratios[0] and cell.proposals in (0, self.proposals[0])
        others = [name for name in self.workloads if name not in self.side_workloads]
        cases = [(self.concurrencies[0], name) for name in (*self.side_workloads, *(others if main else ()))]
        if main and cell.method not in TRANSFORMERS_METHODS:
            cases += [(number, name) for number in self.concurrencies[1:] for name in self.side_workloads]
        return cases


_IN_VLLM = (PLAIN, "ngram (vLLM)", "tli (vLLM)", "slem", "tli", OURS)
_POOL = ("heldout",)
GRIDS = {
    "tiny": Grid((0,), (PLAIN, OURS), (5,), (1, 2), (0.0, 0.8), _POOL, _POOL, repetitions=1, groups=2, tokens=8),
    "short": Grid((20,), _IN_VLLM, (5,), (1, 8), (0.0, 0.8), _POOL, _POOL, repetitions=1, groups=12),
    "default": Grid(
        (20, 5, 50), (*_IN_VLLM, *TRANSFORMERS_METHODS), (5,), (1, 8), (0.0, 0.8),
        (*_POOL, "gsm8k", "humaneval"), _POOL, repetitions=2, groups=20,
    ),
}  # fmt: skip


def with_draft(
    method: str, proposals: int, draft: Path, trained: Path | None = None, **settings: Any
) -> dict[str, Any] | None:
    """vLLM's speculative configuration of a method.

    Args:
        method: A key of `VLLM_METHODS` or of `TRAINED_METHODS`.
        proposals: Most tokens to propose in a step.
        draft: Folder of the draft.
        trained: Folder with the folders that `TRAINED_METHODS` names.
        settings: Further ones, which go to ours alone.
    """
    if method in TRAINED_METHODS:
        if trained is None:
            raise SystemExit(f"{method} needs --trained, a folder that examples/references/ has filled.")
        chosen = TRAINED_METHODS[method]
        return {**chosen, "model": str(trained / chosen["model"]), "num_speculative_tokens": proposals}
    chosen = VLLM_METHODS[method] or {}
    if not chosen:
        return None
    given: dict[str, Any] = {**chosen, "num_speculative_tokens": proposals}
    if chosen["method"] != "ngram":
        given["model"] = str(draft)
    return {**given, **(settings if chosen["method"] == OURS else {})}
