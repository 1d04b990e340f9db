"""Shows what the draft does on vLLM's page of metrics and in ``LLM.get_metrics()``.

The draft works in a worker, the page is made in the front end, and vLLM has no way from one to the other that is open
to plugins. ``prometheus_client`` has one for any processes: files that both map into memory. The front end makes one
without a name for each engine, an environment variable tells the workers where it is, and it is gone with the last
process that uses it, however that ends. Where workers do not inherit the variable (on other machines), nothing is
counted. Can go when vLLM carries metrics of workers.

Knows ``prometheus_client``, which vLLM requires, and no vLLM.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key

logger = logging.getLogger(f"vllm.{__name__}")

# Not called VLLM_...: vLLM warns of each such name that it does not know, or refuses it if it is asked to.
FILES = "TOKENTIMING_METRICS"

_PREFIX = "vllm:tokentiming_"
# Name, its label besides vLLM's own, and what it counts.
COUNTERS = {
    "draft_passes": (None, "Passes of the draft model, each for a whole batch."),
    "draft_tokens": ("kind", "Tokens of the draft's vocabulary, by what was done with them (see drafting.Counts)."),
    "proposed_tokens": (None, "Target tokens handed to verification."),
    "staged_tokens": (None, "Those of them that were drafted in pieces of characters and are verified in stages."),
    "lessons": (None, "Verified positions that the draft's distribution has learned from."),
    "copied_tokens": ("kind", "Those of them that were copied from the request's own text, and which were accepted."),
    "one_hot": ("reason", "Drafts of sampled requests that were verified without proposal probabilities."),
    "not_drafted": ("reason", "Requests that the draft could have proposed for in a step and did not."),
    "faults": ("phase", "Errors in drafting that cost a step its proposals."),
    "seconds": ("phase", "Time on the host in each phase of drafting."),
}
GAUGES = {
    "draft_blocks": (None, "Blocks of the draft's KV cache."),
    "draft_blocks_held": (None, "Those of them that requests hold."),
}


class _Files:
    """One file for each engine of this front end, and the collector that reads them."""

    def __init__(self, num_engines: int) -> None:
        self._files = [os.memfd_create(f"vllm-tokentiming-{engine}") for engine in range(num_engines)]
        for file in self._files:
            MmapedDict(_path(os.getpid(), file)).close()  # Now it can be read, also before a worker writes to it.
        self.names = [_path(os.getpid(), file) for file in self._files]
        self._failed = False
        REGISTRY.register(self)

    def collect(self) -> Iterable[Metric]:
        """Our metrics; none if they cannot be read: vLLM's own stand on the same page."""
        try:
            return self._read()
        except Exception:
            if not self._failed:
                self._failed = True
                logger.exception("TokenTiming cannot read its metrics, so they are left out.")
            return []

    def _read(self) -> Iterable[Metric]:
        metrics: dict[str, Metric] = {}
        for name in self.names:
            for key, value, _, _ in MmapedDict.read_all_values_from_file(name):
                metric_name, sample, labels, text = json.loads(key)
                kind = "counter" if metric_name.removeprefix(_PREFIX) in COUNTERS else "gauge"
                metric = metrics.setdefault(metric_name, Metric(metric_name, text, kind))
                metric.add_sample(sample, labels, value)
        return list(metrics.values())

    def close(self) -> None:
        REGISTRY.unregister(self)
        for file in self._files:
            os.close(file)


def _path(process: int, file: int) -> str:
    return f"/proc/{process}/fd/{file}"


_files: _Files | None = None


def show_in_front_end(num_engines: int = 1) -> None:
    """Have the page of metrics show what the workers of the next engines will count, instead of the last ones'.

    Where that cannot be done, nothing is counted.

    Args:
        num_engines: Data-parallel engines.
    """
    global _files
    os.environ.pop(FILES, None)
    try:
        if _files is not None:
            _files.close()
            _files = None
        # With several front ends, vLLM makes a folder, and each of them shows all that is in there.
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            _files = _Files(num_engines)
            os.environ[FILES] = os.pathsep.join(_files.names)
    except Exception:  # Or the system has no files without names.
        logger.exception("TokenTiming cannot count what it does.")


class Recorder:
    """Writes a worker's numbers."""

    def __init__(self, model_name: str, engine: int) -> None:
        """Open the files, if the front end has any.

        Args:
            model_name: vLLM's labels.
            engine: The engine's place among data-parallel ones.
        """
        self._labels = {"model_name": model_name, "engine": str(engine)}
        self._keys: dict[tuple[str, str], str] = {}
        self._written: dict[tuple[str, str], float] = {}
        self._files: dict[str, MmapedDict] = {}  # By what is written into them.
        names = os.environ.get(FILES, "").split(os.pathsep)
        if (folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR")) and Path(folder).is_dir():
            name = f"tokentiming-{os.getpid()}.db"
            counters = MmapedDict(os.path.join(folder, f"counter_{name}"))
            gauges = MmapedDict(os.path.join(folder, f"gauge_livesum_{name}"))
            self._files = {**dict.fromkeys(COUNTERS, counters), **dict.fromkeys(GAUGES, gauges)}
        elif engine < len(names) and os.path.exists(names[engine]):
            self._files = dict.fromkeys(COUNTERS | GAUGES, MmapedDict(names[engine]))

    @property
    def is_seen(self) -> bool:
        """Return whether a front end shows what is written."""
        return bool(self._files)

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
