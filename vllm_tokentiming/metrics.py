"""What the draft does, on vLLM's page of metrics and in ``LLM.get_metrics()``.

The draft works in a worker, the page is made in the front end, and vLLM has no way from one to the other that is open
to plugins. ``prometheus_client`` has one for any processes, files that both map into memory: the front end chooses
their folder and reads them when asked, a worker writes numbers into its own. An environment variable names the folder;
where workers do not inherit it (on other machines), nothing is counted. Can go when vLLM carries metrics of workers.

Knows ``prometheus_client``, which vLLM requires, and no vLLM.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

# Not called VLLM_...: vLLM warns of each such name that it does not know, or refuses it if it is asked to.
FOLDER = "TOKENTIMING_METRICS_DIR"

_PREFIX = "vllm:tokentiming_"
# Name, its label besides vLLM's own, and what it counts.
COUNTERS = {
    "draft_passes": (None, "Passes of the draft model, each for a whole batch."),
    "draft_tokens": ("kind", "Tokens of the draft's vocabulary, by what was done with them (see drafting.Counts)."),
    "proposed_tokens": (None, "Target tokens handed to verification."),
    "staged_tokens": (None, "Those of them that were drafted in pieces of characters and are verified in stages."),
    "one_hot": ("reason", "Drafts of sampled requests that were verified without proposal probabilities."),
    "not_drafted": ("reason", "Requests that could have had proposals in a step and got none."),
    "faults": ("phase", "Errors in drafting that cost a step its proposals."),
    "seconds": ("phase", "Time on the host in each phase of drafting."),
}
GAUGES = {
    "draft_blocks": (None, "Blocks of the draft's KV cache."),
    "draft_blocks_held": (None, "Those of them that requests hold."),
}


class PhaseClock:
    """Tells how long each phase of a step took, and in which one something failed.

    Attributes:
        phase: The one that runs; "" between steps.
        seconds: Spent in each so far.
    """

    def __init__(self) -> None:
        """Start between steps."""
        self.phase = ""
        self.seconds: Counter[str] = Counter()
        self._since = 0.0

    def enter(self, phase: str) -> None:
        """End the phase that runs, and begin another; "" for none."""
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] += now - self._since  # type: ignore[assignment]
        self.phase, self._since = phase, now


class _Folder:
    """Of this front end's newest engine."""

    def __init__(self) -> None:
        self._made = tempfile.TemporaryDirectory(prefix="vllm-tokentiming-")
        self.path = self._made.name
        self._collector = MultiProcessCollector(REGISTRY, self.path)

    def close(self) -> None:
        REGISTRY.unregister(self._collector)
        self._made.cleanup()


_folder: _Folder | None = None


def show_in_front_end() -> None:
    """Have the page of metrics show what the workers of the next engine will count, instead of the last one's."""
    global _folder
    if _folder is not None:
        _folder.close()
        _folder = None
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")  # Several front ends; each shows all that is in there.
    if shared is None:
        _folder = _Folder()
    os.environ[FOLDER] = shared or _folder.path  # type: ignore[union-attr]


class Recorder:
    """Writes a worker's numbers."""

    def __init__(self, model_name: str, engine: int) -> None:
        """Open the files, if the front end has a folder for them.

        Args:
            model_name: vLLM's labels.
            engine: The engine's place among data-parallel ones.
        """
        self._labels = {"model_name": model_name, "engine": str(engine)}
        self._keys: dict[tuple[str, str], str] = {}
        self._written: dict[tuple[str, str], float] = {}
        self._files: dict[str, MmapedDict] = {}  # By what is written into them.
        folder = os.environ.get(FOLDER, "")
        if folder and Path(folder).is_dir():
            name = f"tokentiming-{os.getpid()}.db"
            counters = MmapedDict(os.path.join(folder, f"counter_{name}"))
            gauges = MmapedDict(os.path.join(folder, f"gauge_livesum_{name}"))
            self._files = {**dict.fromkeys(COUNTERS, counters), **dict.fromkeys(GAUGES, gauges)}

    def write(self, values: Mapping[str, float | Mapping[str, float]]) -> None:
        """Write what everything stands at.

        Args:
            values: For names of ``COUNTERS`` and ``GAUGES``, the number since the start, or one for each value of the
                label.
        """
        if not self._files:
            return
        for name, value in values.items():
            for label, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                if self._written.get((name, label)) != number:
                    self._written[name, label] = number
                    key = self._keys.get((name, label)) or self._key(name, label)
                    self._files[name].write_value(key, number, 0.0)

    def _key(self, name: str, label: str) -> str:
        label_name, text = (COUNTERS | GAUGES)[name]
        labels = {**self._labels, **({label_name: label} if label_name else {})}
        sample = _PREFIX + name + ("_total" if name in COUNTERS else "")
        key: str = mmap_key(_PREFIX + name, sample, list(labels), list(labels.values()), text)
        self._keys[name, label] = key
        return key
