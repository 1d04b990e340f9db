"""Tokenizers that exist as lists of byte strings only (tiktoken, and Mistral's tekken), as fast tokenizers.

In such a list the rank of a byte string is both its id and its priority: of all adjacent pieces whose concatenation is
in the list, the one with the lowest rank is merged first. As rules of a BPE that is every way to cut each byte string
into two that are in the list, in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from vllm_tokentiming.vocab.token_bytes import byte_alphabet


def tokenizer_of_ranks(ranks: Mapping[bytes, int], special: Mapping[str, int], pattern: str, offset: int = 0) -> Any:
    """Make a fast tokenizer that encodes as the list does.

    Args:
        ranks: Rank of each byte string; all 256 single bytes are among them.
        special: Id of each special token's text.
        pattern: What cuts a text into pieces, as a regular expression.
        offset: Of the ids of byte strings from their ranks.

    Returns:
        A ``tokenizers.Tokenizer``.
    """
    alphabet = byte_alphabet()

    def spelt(piece: bytes) -> str:
        return "".join(alphabet[byte] for byte in piece)

    merges = [
        (spelt(piece[:cut]), spelt(piece[cut:]))
        for piece, _ in sorted(ranks.items(), key=lambda item: item[1])
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    vocabulary = {spelt(piece): rank + offset for piece, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE({**vocabulary, **special}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def fast_tokenizer(tokenizer: Any) -> Any | None:
    """Return the fast tokenizer of one that vLLM has loaded, or one made from its list; ``None`` if it has neither.

    Args:
        tokenizer: With a ``backend_tokenizer``; Mistral's, as vLLM or transformers wraps it; or any that keeps a
            ``tiktoken.Encoding`` under the names that models with remote code use.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        return backend
    inner: Any = getattr(tokenizer, "tokenizer", None)
    inner = getattr(getattr(inner, "instruct_tokenizer", None), "tokenizer", inner)
    if type(inner).__name__ == "Tekkenizer":
        special = {inner.id_to_piece(token_id): token_id for token_id in range(inner.num_special_tokens)}
        return _of_encoding(inner._model, special, inner.num_special_tokens)
    encoding: Any
    for encoding in (inner, getattr(tokenizer, "model", None)):
        if type(encoding).__name__ == "Encoding" and hasattr(encoding, "_mergeable_ranks"):
            return _of_encoding(encoding, encoding._special_tokens, 0)
    return None


def _of_encoding(encoding: Any, special: Mapping[str, int], offset: int) -> Any:
    return tokenizer_of_ranks(encoding._mergeable_ranks, special, encoding._pat_str, offset)
