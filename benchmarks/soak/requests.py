"""A request of the soak, and how its answer is judged."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FINISH, REFUSE, ANY = "finish", "refuse", "any"
PATHS = ("completions", "chat/completions")
BASE: dict[str, Any] = {"model": "target", "return_token_ids": True}


class Wrong(Exception):
    """An answer is not what it has to be."""


class Changed(Exception):
    """A request with a seed had another output before; counted, but no failure."""


class NearTie(Exception):
    """A greedy output leaves the expected one where two tokens are equally likely, but for rounding."""


@dataclass
class Choice:
    """One of the outputs in an answer; when a client hangs up, as far as it came."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    reason: str | None = None
    logprobs: dict[str, Any] | None = None


Check = Callable[[list[Choice]], None]


@dataclass(frozen=True)
class Reference:
    """A prompt of the greedy requests, and what plain decoding makes of it.

    Attributes:
        text: The prompt, or what the user says in a chat.
        prompt_ids: The prompt.
        chat: Whether it is a chat.
        ids: The output.
        margins: How far the second best token was behind, at each place, in nats.
        near_tie: Nats; within this, rounding in a batch of another shape decides which token is the likeliest.
    """

    text: str
    prompt_ids: list[int]
    chat: bool
    ids: list[int]
    margins: list[float]
    near_tie: float

    def compare(self, ids: list[int]) -> None:
        """Compare an output, or its beginning.

        Raises:
            Wrong: It is another one.
            NearTie: It is, for a reason.
        """
        for place, (found, wanted) in enumerate(zip(ids, self.ids, strict=False)):
            if found != wanted:
                error = NearTie if self.margins[place] < self.near_tie else Wrong
                raise error(f"token {place} is {found} and not {wanted}, margin {self.margins[place]:.2g}: {ids}")


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        kind: What it is counted as.
        body: JSON, or the bytes to send.
        expect: `FINISH`, `REFUSE` (an answer 4xx), or `ANY` of them.
        path: Below `/v1/`.
        check: Raises `Wrong` for a whole answer that is.
        hang_up: The client does so after so many pieces of a stream, or so many seconds without one.
        most: Tokens of each output, if not those asked for.
        reference: What a greedy output has to be.
    """

    kind: str
    body: dict[str, Any] | bytes
    expect: str = FINISH
    path: str = PATHS[False]
    check: Check = lambda _: None
    hang_up: float | None = None
    most: int | None = None
    reference: Reference | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return isinstance(self.body, dict) and self.body.get("stream") is True

    def data(self) -> bytes:
        """What is sent."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    def judge(self, choices: list[Choice], whole: bool) -> None:
        """Check an answer, or the part of it that the client waited for.

        Raises:
            Wrong: It is not what was asked for.
            NearTie: See there.
        """
        if whole and self.expect == FINISH:
            assert isinstance(self.body, dict)
            if len(choices) != self.body.get("n", 1):
                raise Wrong(f"{len(choices)} outputs")
            most = self.most or self.body["max_tokens"]
            for choice in choices:
                length = len(choice.ids)
                if not 0 < length <= most or (choice.reason, length) not in (("length", most), ("stop", length)):
                    raise Wrong(f"{length} tokens of {most}, ended by {choice.reason}")
            self.check(choices)
        if self.reference is not None and choices:
            self.reference.compare(choices[0].ids)
