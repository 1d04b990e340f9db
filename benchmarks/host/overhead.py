"""What the plugin costs the host per request and step, apart from the models: phase by phase, without any model.

The real `Drafter` and `ProposalBuilder` run over real vocabularies and held-out text; a stand-in for the draft model
returns logits that favour the draft's own next token of the text (wrong ones now and then), and the "target" is the
text: it accepts what agrees with its own tokens of it and adds the next one. So some proposals are accepted, some
rejected.

- `host`, the phases that this plugin adds and that run on the host whatever the device: following the target (context),
  alignment, re-encoding (greedy), transduction and random numbers (sampled), and the rest of the step (bookkeeping).
- `transfer`: what is added over a whole vocabulary. It is tensor work on the draft's device, which is this processor
  here, where it also pushes everything else out of the caches. With `--skip-tensors` it does nothing, which is what
  the host sees when the device is another one (but for its launches, some microseconds each).
- `any draft`: what a draft with the same vocabulary pays, too (argmax; softmax and a draw). The "model" is not counted.

Steps of all pairs, texts, context lengths and modes are timed in turns, all in one run, so that each finds the caches
as other work has left them. Microseconds per request and step: medians with quartiles, without what the timers cost.

    python -m benchmarks.host.overhead --data DATA [--batch 8 --name overhead_batch]

DATA has `tokenizers/` and `corpus/` like the tests' (`TOKENTIMING_DATA`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from benchmarks.common.provenance import DATA, ROOT, provenance, write_data
from vllm_tokentiming import context
from vllm_tokentiming import drafter as drafting
from vllm_tokentiming.align import transducer
from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft import distribution
from vllm_tokentiming.draft.batch import RequestSnapshot
from vllm_tokentiming.draft.kv_pool import KVPool
from vllm_tokentiming.draft.length import FixedLength
from vllm_tokentiming.draft.sampling import DraftSampling
from vllm_tokentiming.transfer import proposals, pushforward, stages, strategies
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair

PAIRS = ["llama3/qwen2.5", "qwen2.5/llama3", "qwen2.5/llama2", "llama2/gpt2", "qwen2.5/t5_small"]
TEXTS = {
    "English": ["english_stories", "english_gsm8k"],
    "code": ["python"],
    "multilingual": ["multilingual_mixed", "russian_tinystories"],
}
LENGTHS = [128, 1024, 8192]  # target tokens
NUM_PROPOSALS, MAX_DRAFT_TOKENS = 5, 10  # The second is twice the first, as by default.
WRONG = 0.25  # How often the stand-in for the draft favours another token.
MASS = 0.75  # What a sampled request's distribution gives to the favoured token.
TARGET_PASS_US = 25_000
MODELS = ROOT / "examples" / "models"

STEP = "bookkeeping"  # What is left of a step.
NOTHING = torch.zeros(1, 1)
CERTAIN = torch.ones(1)  # The confidence in every drafted token.
HOST = ("context", "alignment", "re-encoding", "transduction", "random numbers", STEP)
REST = ("transfer", "any draft", "model")


class Clock:
    """Time spent in each phase, not counting the phases called from it; only a phase of `HOST` has others within it."""

    def __init__(self) -> None:
        """Start with nothing on the clock."""
        self.spent: dict[str, int] = defaultdict(int)
        self._inner = [0]  # Of each phase that is open: what the phases within it took.
        self._open = False
        self._own = 0
        self.nothing: Callable[[], None] = lambda: None
        self.wrap(self, "nothing", STEP)
        # What a timer takes outside of what it times: a median, since other work may take the processor away meanwhile.
        self._own = int(statistics.median(self._outside() for _ in range(200)))
        self.spent.clear()

    def _outside(self, calls: int = 50) -> float:
        self.spent.clear()
        begin = time.perf_counter_ns()
        for _ in range(calls):
            self.nothing()
        return (time.perf_counter_ns() - begin - self.spent[STEP]) / calls

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Time every call of a function or method as a phase."""
        function, inner, now, host = getattr(owner, name), self._inner, time.perf_counter_ns, phase in HOST

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._open and phase != STEP:
                return function(*args, **kwargs)
            before, self._open = self._open, host
            inner.append(0)
            begin = now()
            result = function(*args, **kwargs)
            elapsed = now() - begin
            self.spent[phase] += elapsed - inner.pop()
            inner[-1] += elapsed + self._own
            self._open = before
            return result

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """Microseconds per phase since the last call."""
        spent = {phase: nanoseconds / 1e3 for phase, nanoseconds in self.spent.items()}
        self.spent.clear()
        return spent


def skip_tensors() -> None:
    """Let tensor work do nothing: what the host sees of it where the device is another one, with free launches."""

    def favour(self: StandIn, spans: list[Any]) -> torch.Tensor:
        return torch.tensor([[float(self.favoured(span))] for span in spans])  # In the place of logits.

    chooser, nothing = distribution.DraftDistribution, distribution.Candidates(b"", [], [], [])
    instead: list[tuple[Any, str, Callable[..., Any]]] = [
        (StandIn, "forward", favour),
        (torch.Tensor, "index_fill_", lambda self, *_: self),
        (torch.Tensor, "softmax", lambda self, *_, **__: self),
        (torch.Tensor, "max", lambda logits, _: (CERTAIN.expand(len(logits)), logits[:, 0].long())),
        (torch.Tensor, "__setitem__", lambda *_: None),
        (torch.Tensor, "zero_", lambda self: self),
        (torch, "zeros", lambda *_, **__: NOTHING),
        (distribution, "draw", lambda logits, _: logits[:, 0].long()),
        (distribution, "shape", lambda logits, *_: logits),
        (chooser, "_likeliest_target", lambda _, probs: (CERTAIN.expand(len(probs)), probs[:, 0].long())),
        (chooser, "_candidates", lambda _, __, pending: [nothing] * len(pending)),
        (chooser, "_drop_rare_incomplete", lambda *_: torch.tensor([False])),
        (pushforward.PushForward, "later_row", lambda *_: ()),
        (pushforward.PushForward, "later_candidate_row", lambda *_: ()),
        (proposals.ProposalBuilder, "_fill_first", lambda *_: None),
        (strategies.Transduction, "_add_stage", lambda *_: None),
    ]
    for owner, name, function in instead:
        setattr(owner, name, function)


def watch() -> Clock:
    """Put the plugin's phases on a clock."""
    clock = Clock()
    clock.wrap(drafting.Drafter, "propose", STEP)
    clock.wrap(context.DraftContext, "commit", "context")
    clock.wrap(context, "align", "alignment")
    clock.wrap(strategies, "retokenize", "re-encoding")
    clock.wrap(transducer.Transducer, "emit", "transduction")
    for module in (proposals, strategies):
        clock.wrap(module, "uniforms", "random numbers")
    transfer: list[tuple[Any, tuple[str, ...]]] = [
        (distribution.DraftDistribution, ("_likeliest_target", "_candidates", "_drop_rare_incomplete")),
        (pushforward.PushForward, ("first_rows", "later_row", "later_candidate_row")),
        (stages.StageBuilder, ("first_stage", "later_stage")),
        (torch.Tensor, ("__getitem__", "__setitem__", "index_fill_", "topk", "nonzero")),
        (torch, ("zeros", "stack")),
    ]
    any_draft: list[tuple[Any, tuple[str, ...]]] = [
        (distribution, ("shape", "draw")),
        (torch.Tensor, ("softmax", "max", "amax", "tolist")),
        (torch, ("cat",)),
    ]
    for phase, places in (("transfer", transfer), ("any draft", any_draft)):
        for owner, names in places:
            for name in names:
                clock.wrap(owner, name, phase)
    clock.wrap(StandIn, "forward", "model")
    return clock


class StandIn:
    """Stands for the draft model: favours what it is told to, token by token."""

    max_model_len = 1 << 20
    max_batch_tokens = 1 << 20

    def __init__(self, vocab_size: int, usual: list[int]) -> None:
        """Let the tail of its distribution be the frequencies of the draft's tokens in text."""
        counts = torch.full((vocab_size,), 1e-3)
        for token_id, count in Counter(usual).items():
            counts[token_id] = count
        self._log_tail = (counts / counts.sum() * (1 - MASS)).log()
        self.pool = KVPool(num_blocks=1 << 14, block_size=16, num_rows=256, max_tokens=1 << 17)
        self.texts: list[Iterator[int]] = []  # Of each request.
        self.requests: dict[str, Any] = {}  # The drafter's.

    def favoured(self, span: Any) -> int:
        """What is favoured after a span."""
        return next(next(self.texts[int(i)] for i, request in self.requests.items() if request.row == span.row))

    def forward(self, spans: list[Any]) -> torch.Tensor:
        """The logits after each span."""
        logits = self._log_tail.repeat(len(spans), 1)
        for row, span in zip(logits, spans, strict=True):
            row[self.favoured(span)] = float(np.log(MASS))
        return logits


class Simulation:
    """A batch of requests whose target writes a given text, each from another place on."""

    def __init__(
        self,
        pair: VocabularyPair,
        shared: proposals.ProposalBuilder,
        text: bytes,
        length: int,
        sampled: bool,
        batch: int,
        proposals: int = NUM_PROPOSALS,
    ) -> None:
        """Begin at `length` target tokens of the text, or up to `batch` more."""
        self._pair, self._text = pair, text
        self._target_ids = np.array(pair.target.encoder.encode(text), dtype=np.int32)
        self._offsets = pair.target.token_bytes.lengths[self._target_ids].cumsum()
        self._usual = pair.draft.encoder.encode(text)
        self._model = StandIn(pair.draft.token_bytes.size, self._usual)
        self._drafter = drafting.Drafter(pair, self._model, shared, FixedLength(), 2 * proposals)  # type: ignore[arg-type]
        self._proposals = proposals
        self._model.requests = self._drafter.sequences.by_request
        self._sampling = DraftSampling(seed=0, temperature=1.0) if sampled else None
        self._num_target = [length + number for number in range(batch)]
        self._rng = random.Random(length)

    def _favoured(self, num_target: int) -> Iterator[int]:
        begin = int(self._offsets[num_target - 1])
        right = self._pair.draft.encoder.encode(self._text[begin : begin + 100])
        favoured = [self._rng.choice(self._usual) if self._rng.random() < WRONG else token_id for token_id in right]
        return itertools.chain(favoured, itertools.repeat(self._usual[0]))

    def step(self) -> float:
        """Propose once, and let the target verify; how many proposals of a request it accepted."""
        self._model.texts = [self._favoured(number) for number in self._num_target]
        batch = [
            RequestSnapshot(str(index), self._target_ids, number, self._proposals, self._sampling)
            for index, number in enumerate(self._num_target)
        ]
        total = 0
        for index, proposed in enumerate(self._drafter.propose(batch).target_ids):
            true = self._target_ids[self._num_target[index] :].tolist()
            accepted = next(
                (i for i, two in enumerate(zip(proposed, true, strict=False)) if len({*two}) > 1), len(proposed)
            )
            self._num_target[index] += accepted + 1
            total += accepted
        return total / len(batch)


@cache
def vocabulary(data: Path, name: str) -> Vocabulary:
    """A vocabulary of the data folder, or an embedded one."""
    folder = MODELS / name.removeprefix("embedded_") if name.startswith("embedded_") else data / "tokenizers" / name
    return Vocabulary.of(Tokenizer.from_file(str(folder / "tokenizer.json")))


def text_of(data: Path, kinds: list[str], characters: int) -> bytes:
    """Held-out documents one after the other, again from the first where they end."""
    documents = [d for k in kinds for d in json.loads((data / "corpus" / f"{k}.heldout.json").read_text())]
    random.Random(0).shuffle(documents)
    text = "\n\n".join(documents) + "\n\n"
    return (text * -(-characters // len(text)))[:characters].encode()


def simulations(data: Path, names: str, steps: int, batch: int) -> Iterator[tuple[dict[str, Any], Simulation]]:
    """Every text, context length and mode of a pair."""
    pair = VocabularyPair.of(*(vocabulary(data, name) for name in names.split("/")))
    shared = proposals.ProposalBuilder(
        pair,
        Transducer(pair),
        "tokentiming",
        length=FixedLength(),
        truncate=apply_top_k_top_p,
        draft_size=pair.draft.token_bytes.size,
        target_size=pair.target.token_bytes.size,
        num_proposals=NUM_PROPOSALS,
        max_draft_tokens=MAX_DRAFT_TOKENS,
        max_q_bytes=1 << 30,
        device=torch.device("cpu"),
    )
    for (kind, corpora), length, sampled in itertools.product(TEXTS.items(), LENGTHS, (False, True)):
        text = text_of(data, corpora, 6 * (length + 6 * steps) + 2000)
        described = {"pair": names, "text": kind, "context": length, "mode": "sampled" if sampled else "greedy"}
        yield described, Simulation(pair, shared, text, length, sampled, batch)


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(values, n=4)


def table(steps: list[dict[str, Any]], by: tuple[str, ...]) -> list[dict[str, Any]]:
    """Group steps, and print a line for each group."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for step in steps:
        groups[tuple(step[key] for key in by)].append(step)
    shown = [*by, "host: median [quartiles]", *HOST, "transfer", "any draft", "accepted", "% of 25 ms", "alignment %"]
    print("\n| " + " | ".join(shown) + " |\n" + "|---" * len(shown) + "|")
    rows = []
    for key, group in sorted(groups.items(), key=lambda item: tuple(map(str, item[0][:-1]))):
        found = {phase: quartiles([step["us"].get(phase, 0.0) for step in group]) for phase in (*HOST, *REST)}
        found["host"] = quartiles([sum(step["us"].get(phase, 0.0) for phase in HOST) for step in group])
        accepted = statistics.mean(step["accepted"] for step in group)
        low, mid, high = found["host"]
        phases = [f"{found[phase][1]:.1f}" for phase in (*HOST, "transfer", "any draft")]
        shares = [f"{found[phase][1] / TARGET_PASS_US:.3%}" for phase in ("host", "alignment")]
        cells = [*map(str, key), f"{mid:.1f} [{low:.1f}, {high:.1f}]", *phases, f"{accepted:.2f}", *shares]
        print("| " + " | ".join(cells) + " |", flush=True)
        described = dict(zip(by, key, strict=True))
        rows.append({**described, "steps": len(group), "accepted": accepted, "us": found})
    return rows


def main() -> None:
    """Measure all pairs, and print the steps by pair and by context length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("TOKENTIMING_DATA"))
    parser.add_argument("--pairs", nargs="+", default=PAIRS, help="target/draft, names in the data's tokenizers/")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each simulation")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before those")
    parser.add_argument("--batch", type=int, default=1, help="requests in a step; what it costs is shared between them")
    parser.add_argument("--threads", type=int, default=1, help="of tensor work; one is what vLLM takes on two cores")
    parser.add_argument("--skip-tensors", action="store_true", help="the host's part alone, as beside a GPU")
    parser.add_argument("--name", default="overhead", help="of the data file")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data file")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data, or TOKENTIMING_DATA, must name a folder with tokenizers/ and corpus/")
    args.data = Path(args.data)
    torch.set_num_threads(args.threads)
    running = [
        found for names in args.pairs for found in simulations(args.data, names, args.steps + args.warm_up, args.batch)
    ]
    if args.skip_tensors:
        skip_tensors()
    clock, steps = watch(), []
    for number in range(args.warm_up + args.steps):
        for described, simulation in running:
            clock.take()
            accepted = simulation.step()
            if number >= args.warm_up:
                spent = {phase: taken / args.batch for phase, taken in clock.take().items()}
                steps.append({**described, "accepted": accepted, "us": spent})
    table(steps, ("pair", "mode", "context"))
    table(steps, ("pair", "mode", "text"))
    settings = {
        "batch": args.batch,
        "steps": args.steps,
        "proposals": NUM_PROPOSALS,
        "max_draft_tokens": MAX_DRAFT_TOKENS,
        "wrong": WRONG,
        "mass": MASS,
        "skip_tensors": args.skip_tensors,
        "threads": torch.get_num_threads(),
    }
    rows = table(steps, ("pair", "mode"))
    write_data(args.out / f"{args.name}.json", {"provenance": provenance(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
