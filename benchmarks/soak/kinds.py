"""Makes the requests of the soak, of every kind, from a seed and a number; each knows what may come back."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.soak.requests import ANY, BASE, FINISH, PATHS, REFUSE, Changed, Choice, Reference, Request, Wrong

REGEX = r"[a-f]{4,20}(-[0-9]{2,6}){1,4}"
CHOICES = ["a red house", "a red horse", "маяк", "灯台", "no"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "ages"],
}  # fmt: skip


class Requests:
    """Makes requests."""

    def __init__(
        self, seed: int, tokenizer: Any, texts: list[str], references: list[Reference], max_len: int,
        speculative: bool, seeds: bool,
    ) -> None:  # fmt: skip
        """Take what requests are made of.

        Args:
            seed: Of everything.
            tokenizer: The target's, of the library `tokenizers`.
            texts: Parts of them are prompts.
            references: Greedy requests are these.
            max_len: Tokens that a prompt and its output may have.
            speculative: Whether the server refuses what vLLM does not do together with speculative decoding.
            seeds: Whether requests may have some. On CPUs, one whose prompt comes in chunks kills vLLM 0.32 with any
                method or none (`_bookkeeping_sync` in `gpu_model_runner.py` takes back the numbers that it drew for a
                chunk, and the random generators of CPUs cannot).
        """
        self._seeds = seeds
        self._seed, self._tokenizer, self._texts = seed, tokenizer, texts
        self._references, self._max_len, self._speculative = references, max_len, speculative
        self._size = tokenizer.get_vocab_size()
        self._kinds: dict[str, tuple[float, Callable[[random.Random], Request]]] = {
            "greedy": (32, self._greedy),
            "sampled": (20, self._sampled),
            "stop": (8, self._stop),
            "minimum": (4, self._minimum),
            "words": (6, self._words),
            "structured": (9, self._structured),
            "chat": (6, self._chat),
            "full": (4, self._full),
            "too long": (3, self._too_long),
            "unsupported": (3, self._unsupported),
            "malicious": (5, self._malicious),
        }
        if seeds:
            self._kinds["seeded"] = (10, self._seeded)
        self._weights = [weight for weight, _ in self._kinds.values()]
        self._outputs: dict[int, list[list[int]]] = {}  # Of requests with seeds.

    def make(self, number: int) -> Request:
        """A request, always the same one for the same number."""
        rng = random.Random(f"{self._seed}/{number}")
        name = rng.choices(list(self._kinds), self._weights)[0]
        request = self._kinds[name][1](rng)
        if request.expect == FINISH and rng.random() < 0.1:
            return replace(request, hang_up=rng.randint(1, 8) if request.streams else rng.uniform(0, 4))
        return request

    def _text(self, rng: random.Random, most: int) -> str:
        text = rng.choice(self._texts)
        start = rng.randrange(len(text))
        text = text[start : start + rng.randint(1, most)]
        while len(self._tokenizer.encode(text).ids) > most:
            text = text[: len(text) // 2]
        return text or "?"

    def _ids(self, rng: random.Random, length: int) -> list[int]:
        """No tokenizer would produce them, and some are special."""
        return [rng.randrange(self._size) for _ in range(length)]

    def _body(self, rng: random.Random, **given: Any) -> dict[str, Any]:
        """A request whose output depends on chance; what is given goes before."""
        body = {**BASE, "max_tokens": rng.randint(1, 64), "temperature": rng.choice([0, 0.3, 0.7, 1, 1, 1.5, 2])}
        prompts: list[Callable[[], str | list[int]]] = [
            lambda: self._text(rng, 40),
            lambda: self._text(rng, self._max_len - 80),
            lambda: self._tokenizer.encode(self._text(rng, 200)).ids,
            lambda: self._ids(rng, rng.choice([1, 1, rng.randint(2, 60), rng.randint(60, self._max_len - 80)])),
        ]
        body["prompt"] = rng.choice(prompts)()
        some = {
            "top_p": rng.uniform(0.05, 1),
            "top_k": rng.choice([-1, 1, 2, 20, self._size, self._size * 2]),
            "presence_penalty": rng.uniform(-2, 2),
            "frequency_penalty": rng.uniform(-2, 2),
            "repetition_penalty": rng.uniform(0.5, 2),
            "seed": rng.choice([0, -1, 2**63 - 1, -(2**63), rng.randrange(1000)]),
            "logprobs": rng.randint(0, 5),
            "ignore_eos": True,
            "stream": True,
            "cache_salt": rng.choice(["a", "b"]),
            "prompt_logprobs": 1,
            "request_id": rng.choice(["one", "another"]),  # Many have the same one at the same time.
        }
        body |= {name: value for name, value in some.items() if rng.random() < 0.2}
        if not self._seeds:
            body.pop("seed", None)
        if body["temperature"] and rng.random() < 0.1:
            body["n"] = rng.randint(2, 4)
        if body.get("stream"):
            body.pop("prompt_logprobs", None)  # vLLM refuses them together.
        return body | given

    def _greedy(self, rng: random.Random) -> Request:
        """One of those whose output is known; with `top_k` of 1 it goes the way of sampled ones and is the same."""
        reference = rng.choice(self._references)
        sampled = {"temperature": rng.choice([0.5, 1, 2]), "top_k": 1} if rng.random() < 0.4 else {}
        length = rng.randint(1, len(reference.ids))
        body = {**BASE, "temperature": 0, "max_tokens": length, "ignore_eos": True, **sampled}
        if rng.random() < 0.4:
            body["stream"] = True
        if reference.chat:
            body["messages"] = [{"role": "user", "content": reference.text}]
        else:
            body["prompt"] = rng.choice([reference.text, reference.prompt_ids])
            if rng.random() < 0.1:
                body["logprobs"] = rng.randint(0, 5)
        kind = ("top-1" if sampled else "greedy") + (" chat" if reference.chat else "")
        return Request(kind, body, path=PATHS[reference.chat], reference=reference)

    def _sampled(self, rng: random.Random) -> Request:
        return Request("sampled", self._body(rng))

    def _seeded(self, rng: random.Random) -> Request:
        """One of few, which come again and again."""
        index = rng.randrange(20)

        def check(choices: list[Choice]) -> None:
            found = [choice.ids for choice in choices]
            if found != (first := self._outputs.setdefault(index, found)):
                raise Changed(f"{found} was {first}")

        rng = random.Random(f"{self._seed}/seeded/{index}")
        return Request("seeded", self._body(rng, seed=index, temperature=1, max_tokens=32), check=check)

    def _stop(self, rng: random.Random) -> Request:
        if rng.random() < 0.5:
            stop = rng.sample(["\n", " ", ".", "the", "о", "的", "e", "self.", "\n\n"], rng.randint(1, 4))
            include = rng.random() < 0.3

            def check(choices: list[Choice]) -> None:
                for choice in choices:
                    if not include and any(string in choice.text for string in stop):
                        raise Wrong(f"{choice.text!r} has one of {stop}")

            body = self._body(rng, stop=stop, include_stop_str_in_output=include, prompt=self._text(rng, 60))
            return Request("stop string", body, check=check)
        stop_ids = rng.sample(range(self._size), rng.choice([1, 100, self._size // 2]))

        def check_ids(choices: list[Choice]) -> None:
            for choice in choices:
                if set(choice.ids[:-1]) & set(stop_ids):
                    raise Wrong(f"{choice.ids} goes on after a stop id")

        return Request("stop id", self._body(rng, stop_token_ids=stop_ids), check=check_ids)

    def _minimum(self, rng: random.Random) -> Request:
        length = rng.randint(1, 40)

        def check(choices: list[Choice]) -> None:
            if any(len(choice.ids) < length for choice in choices):
                raise Wrong(f"fewer than {length} tokens")

        stop = rng.choice([{}, {"stop_token_ids": rng.sample(range(self._size), 500)}])
        return Request("min_tokens", self._body(rng, min_tokens=length, max_tokens=40, **stop), check=check)

    def _words(self, rng: random.Random) -> Request:
        if rng.random() < 0.5:
            allowed = rng.sample(range(self._size), rng.choice([1, 1, 3, 100, self._size // 2]))
            if len(allowed) == 1:  # What reads one place before a row of probabilities, finds a 1 there.
                allowed = [self._size - 1]

            def check(choices: list[Choice]) -> None:
                if any(set(choice.ids) - set(allowed) for choice in choices):
                    raise Wrong("tokens that are not allowed")

            body = self._body(rng, allowed_token_ids=allowed)
            return Request("allowed ids", body, check=check)
        words = rng.sample(["the", "and", "a", "he", "was", "self", "и", "в", "的", ".", ","], rng.randint(1, 8))
        # vLLM forbids some of the forms with a space before, too.
        bad = [self._tokenizer.encode(word, add_special_tokens=False).ids for word in words]

        def check_words(choices: list[Choice]) -> None:
            for choice in choices:
                for ids in bad:
                    if any(choice.ids[i : i + len(ids)] == ids for i in range(len(choice.ids))):
                        raise Wrong(f"{choice.ids} has the bad word {ids}")

        return Request("bad words", self._body(rng, bad_words=words), check=check_words)

    def _structured(self, rng: random.Random) -> Request:
        def is_json(text: str) -> bool:
            try:
                return isinstance(json.loads(text), dict)
            except ValueError:
                return False

        ways: list[tuple[str, dict[str, Any], Callable[[str], object]]] = [
            ("regex", {"structured_outputs": {"regex": REGEX}}, lambda text: re.fullmatch(REGEX, text)),
            ("choice", {"structured_outputs": {"choice": CHOICES}}, CHOICES.__contains__),
            ("JSON schema", {"structured_outputs": {"json": SCHEMA}}, is_json),
            ("JSON object", {"response_format": {"type": "json_object"}}, is_json),
        ]
        name, asked, fits = rng.choice(ways)

        def check(choices: list[Choice]) -> None:
            # vLLM's text begins with the whole prompt if that ends within a character, as random ids may.
            for text in (self._tokenizer.decode(choice.ids) for choice in choices if choice.reason == "stop"):
                if not fits(text):
                    raise Wrong(f"{text!r} does not fit")

        body = self._body(rng, max_tokens=rng.randint(10, 80), **asked)
        # A grammar ends an output by its end token.
        body.pop("ignore_eos", None)
        return Request(f"structured, {name}", body, check=check)

    def _chat(self, rng: random.Random) -> Request:
        body = self._body(rng)
        del body["prompt"]
        if "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        body["messages"] = [
            {"role": role, "content": self._text(rng, 100)}
            for role in rng.choice([["user"], ["system", "user"], ["user", "assistant", "user"]])
        ]
        return Request("chat", body, path=PATHS[True])

    def _full(self, rng: random.Random) -> Request:
        """A prompt that leaves little room; vLLM cuts an output that would be longer."""
        room = rng.choice([1, 2, 7, 30])
        length = rng.choice([rng.randint(1, room), room + 20])
        body = self._body(rng, prompt=self._ids(rng, self._max_len - room), max_tokens=length)
        return Request("full length", body, most=min(room, length))

    def _too_long(self, rng: random.Random) -> Request:
        length = self._max_len + rng.choice([0, 1, 2 * self._max_len])
        return Request("too long", self._body(rng, prompt=self._ids(rng, length)), REFUSE)

    def _unsupported(self, rng: random.Random) -> Request:
        asked: dict[str, Any] = rng.choice([{"logit_bias": {"17": 5.0}}, {"min_p": 0.1}])
        # vLLM ignores `min_p` of greedy requests.
        return Request("unsupported", self._body(rng, temperature=1, **asked), REFUSE if self._speculative else FINISH)

    def _malicious(self, rng: random.Random) -> Request:
        name, given = rng.choice(list(MALICIOUS.items()))
        body = given if isinstance(given, bytes) else self._body(rng, **given)
        return Request(f"malicious: {name}", body, ANY)


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


# What vLLM 0.32 answers with 500 without us, too, is not here: surrogates in stop strings and bad words and a
# `top_k` of 2**70, which `msgspec` cannot encode; the schema {"$ref": "#"} and the grammar "root ::= ",
# noticed in the engine only.
SOME, NAN = {"max_tokens": 4, "temperature": 1}, float("nan")
MALICIOUS: dict[str, dict[str, Any] | bytes] = {
    "huge text": {"prompt": "a b " * 500_000},
    "huge word": {"prompt": "a" * 1_000_000},
    "huge ids": {"prompt": [5] * 300_000},
    "many prompts": {"prompt": ["a"] * 64, "max_tokens": 2},
    "no prompt": {"prompt": ""},
    "no ids": {"prompt": []},
    "null": {"prompt": None},
    "nulls": {"prompt": "\x00" * 50},
    "surrogates": {"prompt": "a\ud800b"},
    "surrogate salt": {"cache_salt": "\ud800"},
    "surrogate choice": {"structured_outputs": {"choice": ["\ud800", "a"]}},
    "no UTF-8": b'{"model": "target", "prompt": "\xff\xfe\x80", "max_tokens": 4}',
    "no UTF-8 in stop": b'{"model": "target", "prompt": "a", "max_tokens": 4, "stop": ["\xc3\x28"]}',
    "no JSON": b"{" * 1000,
    "deep JSON": b'{"model": "target", "prompt": ' + b"[" * 100_000,
    "many stops": {"stop": [f"s{i}" for i in range(5000)]},
    "long stop": {"stop": ["never " * 10_000]},
    "empty stop": {"stop": [""]},
    "many bad words": {"bad_words": [f"w{i}" for i in range(5000)]},
    "empty bad word": {"bad_words": ["", " "]},
    "negative length": {"max_tokens": -5},
    "no length": {"max_tokens": 0},
    "huge length": {"max_tokens": 2**62},
    "minimum over maximum": {"min_tokens": 50, "max_tokens": 5},
    "negative minimum": {"min_tokens": -1},
    "negative n": {"n": -1},
    "huge n": {"n": 1_000_000},
    "large n": {"n": 100, "max_tokens": 2, "temperature": 1},
    "negative temperature": {"temperature": -1},
    "NaN temperature": {"temperature": NAN},
    "infinite temperature": {"temperature": float("inf")},
    "tiny temperature": {"temperature": 1e-300},
    "NaN top_p": {"top_p": NAN},
    "tiny top_p": {"top_p": 1e-300, **SOME},
    "negative top_k": {"top_k": -7},
    "huge top_k": {"top_k": 2**40, **SOME},
    "NaN penalty": {"presence_penalty": NAN},
    "tiny penalty": {"repetition_penalty": 1e-300, **SOME},
    "huge penalty": {"repetition_penalty": 1e300, **SOME},
    "huge seed": {"seed": 2**70},
    "many logprobs": {"logprobs": 100_000},
    "negative logprobs": {"logprobs": -3},
    "ids out of range": {"prompt": [5, 10**6]},
    "huge ids out of range": {"prompt": [5, 2**70]},
    "negative ids": {"prompt": [5, -1]},
    "stop ids out of range": {"stop_token_ids": [10**6]},
    "negative stop ids": {"stop_token_ids": [-1]},
    "allowed ids out of range": {"allowed_token_ids": [3, 10**6]},
    "no allowed ids": {"allowed_token_ids": []},
    "negative allowed ids": {"allowed_token_ids": [-3]},
    "nothing allowed": {"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 1, "max_tokens": 4},
    "deep schema": {"structured_outputs": {"json": _nested(60)}},
    "deeper schema": {"structured_outputs": {"json": _nested(400)}},
    "schema of nonsense": {"structured_outputs": {"json": {"type": "nonsense", "minimum": "x"}}},
    "broken regex": {"structured_outputs": {"regex": "(((["}},
    "empty regex": {"structured_outputs": {"regex": ""}},
    "huge regex": {"structured_outputs": {"regex": "(a{1,300}b{1,300}){1,30}"}},
    "no choice": {"structured_outputs": {"choice": []}},
    "unlike structures": {"structured_outputs": {"regex": "a", "choice": ["a"]}},
    "wrong types": {"max_tokens": "many", "temperature": [1], "stop": {"a": 1}},
    "another model": {"model": "no such model"},
    "priority": {"priority": 5},
    "beams": {"use_beam_search": True, "n": 2, "max_tokens": 5},
    "echo": {"echo": True, "logprobs": 1, "max_tokens": 4},
    "embeddings": {"prompt_embeds": "AAAA", "prompt": None},
    "truncated": {"truncate_prompt_tokens": 3},
    "cut too much": {"truncate_prompt_tokens": 10**9},
    "no salt": {"cache_salt": ""},
}
