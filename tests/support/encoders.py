"""Makes encoders of tokenizers, and encodes texts that grow part by part."""

import random

from tokenizers import Tokenizer

from vllm_tokentiming.vocab.encoder import Encoder, make_encoder
from vllm_tokentiming.vocab.token_bytes import TokenBytes


def made_from(tokenizer: Tokenizer) -> Encoder:
    return make_encoder(tokenizer, TokenBytes.from_tokenizer(tokenizer))


def assert_ordinary(encoder: Encoder, ids: list[int]) -> None:
    assert all(encoder.token_bytes.pieces[i] is not None for i in ids if i >= 0) and min(ids, default=0) >= 0


def in_parts(data: bytes, rng: random.Random, longest: int) -> list[bytes]:
    parts, start = [], 0
    while start < len(data):
        end = start + rng.randint(1, longest)
        parts.append(data[start:end])
        start = end
    return parts


class Growing:
    """A text that grows, of which only the unsettled end is encoded again."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.ids, self.settled, self.tail = encoder, [], 0, b""

    def grow(self, part: bytes) -> list[int]:
        self.tail += part
        encoded = self.encoder.encode_tail(self.tail)
        assert 0 <= encoded.settled_ids <= len(encoded.ids)
        assert 0 <= encoded.settled_bytes <= len(self.tail)
        self.ids[self.settled :] = encoded.ids
        self.settled += encoded.settled_ids
        self.tail = self.tail[encoded.settled_bytes :]
        return self.ids
