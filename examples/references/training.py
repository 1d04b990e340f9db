"""Trains for a budget of processor time, in pieces if need be, and keeps the learning curve.

All references are trained by `fit`, so that their budgets are the same thing: processor seconds of the training steps,
evaluations excepted.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

LAW = 16  # Tokens of a law that are kept, at most.
WIDEST = 512  # Tokens of a text that are read.
MOST_IN_LAW = LAW + 1
HELD_OUT = 16  # One text in so many is not trained on.
WARM_UP = 0.02  # Part of the budget.

Text = TypeVar("Text")


def read_texts(path: Path) -> list[dict[str, Any]]:
    """The texts that `write_texts.py` wrote."""
    return [json.loads(line) for line in path.open()]


def law_of(row: dict[str, Any], place: int) -> dict[int, float]:
    """The target's law at a token of an output: its likeliest ids, and their probabilities.

    A token that was drawn, but is none of the likeliest, counts in full. So what the likeliest leave is there on
    average, where outputs are drawn at temperature 1.
    """
    law: dict[int, float] = dict(zip(*row["laws"][place], strict=True))
    law.setdefault(row["output"][place], 1.0)
    return law


def divided(texts: list[Text]) -> tuple[list[Text], list[Text]]:
    """The texts that are trained on, and those held out."""
    return [text for index, text in enumerate(texts) if index % HELD_OUT], texts[::HELD_OUT]


def fit(
    model: torch.nn.Module,
    loss: Callable[[float], torch.Tensor],
    evaluate: Callable[[], dict[str, float]],
    folder: Path,
    *,
    seconds: float,
    learning_rate: float,
    evaluations: int = 8,
) -> None:
    """Train with AdamW; the learning rate follows a cosine over the budget.

    What has been trained is kept in `folder/training.pt` at each evaluation, and a run that finds it goes on there.

    Args:
        model: What is trained, in place.
        loss: Of a new batch, each time that it is called, with the part of the budget that is spent.
        evaluate: Figures on held-out text.
        folder: Where state and `curve.json` are kept; the curve has `seconds` and each figure, point by point.
        seconds: The budget in processor time.
        learning_rate: At its peak.
        evaluations: How many points the curve has after the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    spent, curve = 0.0, []
    state_file = folder / "training.pt"
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        spent, curve = state["spent"], state["curve"]

    def note() -> None:
        model.eval()
        with torch.no_grad():
            curve.append({"seconds": round(spent), **{name: round(value, 4) for name, value in evaluate().items()}})
        model.train()
        print(json.dumps(curve[-1]), flush=True)
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "spent": spent, "curve": curve},
            state_file,
        )
        (folder / "curve.json").write_text(json.dumps(curve, indent=1) + "\n")

    if not curve:
        note()
    while spent < seconds:
        started = time.process_time()
        part = spent / seconds
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(part / WARM_UP + 0.01, 0.02 + 0.98 * (1 + math.cos(math.pi * part)) / 2)
        value = loss(part)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent += time.process_time() - started
        if spent >= seconds * len(curve) / evaluations:
            note()
