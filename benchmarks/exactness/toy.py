"""Toy pairs of models whose output law can be written down, cell by cell.

    python -m benchmarks.exactness.toy --out DIR

Random Llama models of one layer in Hugging Face folders, which vLLM loads as they are. A target writes only a
dozen tokens with any probability worth the name, so that the law of its first few tokens is a table
(`exact_law`), computed by transformers and plain arithmetic, with nothing of vLLM in it. Each token still has
*some* probability; what falls outside the dozen is one more cell of the table.

**Vocabularies.** Byte-level BPE over the letters a to d, the space, and `é` (two bytes). Between target and
draft occurs whatever makes translation hard: draft tokens that the target writes in two or three tokens,
target tokens that the draft writes in two, pieces that straddle (`ab` against `bc`), and a character whose
bytes are tokens of their own, so that drafted bytes have to wait for the rest of it.

**Pairs.** `full`: both sides have all 256 bytes, as real byte-level vocabularies do, most of them never
written. `small`: nothing but the dozen, so the encoders cannot spell every text and are the lossy ones.
`same`: the draft has the target's own vocabulary (that of `full`).
"""

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END = "<s>", "</s>"
BEGIN_ID, END_ID = 0, 1
HEAD_SIZE = 64  # One of those that vLLM's attention on the CPU supports.
PROMPT = "abcé d"

# In the alphabet of byte-level tokenizers: Ġ is the space, Ã and © are the two bytes of é.
_LETTERS = ("a", "b", "c", "d", "Ġ", "Ã", "©")
_TARGET_MERGES = (("a", "b"), ("c", "a"), ("Ġ", "b"), ("ab", "c"), ("Ã", "©"))
_DRAFT_MERGES = (("b", "c"), ("Ġ", "a"), ("d", "a"), ("Ġa", "bc"), ("da", "b"), ("d", "Ã"), ("©", "b"))


@dataclass(frozen=True)
class Pair:
    """Folders of two models, and the ids that the target writes with any probability worth the name."""

    target: Path
    draft: Path
    live: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """A law's parameters, by the names of vLLM's `SamplingParams`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


def make_pairs(folder: Path) -> dict[str, Pair]:
    """Write the toy models into a folder; the same ones every time.

    Args:
        folder: Will hold one folder for each model.

    Returns:
        The pairs, by name.
    """
    live = tuple(range(END_ID, 2 + len(_LETTERS) + len(_TARGET_MERGES)))  # All but the begin-of-text token.
    sides = {
        "target": (_TARGET_MERGES, True, 1),
        "draft": (_DRAFT_MERGES, True, 2),
        "same_draft": (_TARGET_MERGES, True, 3),
        "small_target": (_TARGET_MERGES, False, 4),
        "small_draft": (_DRAFT_MERGES, False, 5),
    }
    for name, (merges, all_bytes, seed) in sides.items():
        _write_model(folder / name, _tokenizer(merges, all_bytes), seed)
    pairs = {
        "full": ("target", "draft"),
        "same": ("target", "same_draft"),
        "small": ("small_target", "small_draft"),
    }
    return {name: Pair(folder / target, folder / draft, live) for name, (target, draft) in pairs.items()}


def _tokenizer(merges: tuple[tuple[str, str], ...], all_bytes: bool) -> Tokenizer:
    pieces = [*_LETTERS, *(left + right for left, right in merges)]
    if all_bytes:
        pieces += sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(_LETTERS))
    vocabulary = {piece: i for i, piece in enumerate([BEGIN, END, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN, END])
    return tokenizer


def _write_model(folder: Path, tokenizer: Tokenizer, seed: int) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=HEAD_SIZE, intermediate_size=HEAD_SIZE,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=HEAD_SIZE,
        max_position_embeddings=256, bos_token_id=BEGIN_ID, eos_token_id=END_ID, tie_word_embeddings=False,
        dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    _fill(model, [tokenizer.id_to_token(i) for i in range(config.vocab_size)], seed)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


@torch.no_grad()
def _fill(model: LlamaForCausalLM, pieces: list[str], seed: int) -> None:
    """Random weights, alike enough among models that they agree now and then on how a text goes on.

    What a token is when it is read depends on its last byte and on chance, and when it is written, on its
    first byte and on chance; the bytes' part and the layers are the same in all models.
    """
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for weight in model.model.layers.parameters():
        if weight.ndim == 2:
            weight.normal_(0, 1 / weight.shape[1] ** 0.5, generator=common)
        else:
            weight.fill_(1)
    model.model.norm.weight.fill_(1)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    reads, writes = torch.randn(2, 512, HEAD_SIZE, generator=common)
    for token_id, piece in enumerate(pieces):
        last, first = (token_id, token_id) if piece in (BEGIN, END) else (ord(piece[-1]), ord(piece[0]))
        embedding[token_id] = reads[last] + 0.5 * torch.randn(HEAD_SIZE, generator=own)
        head[token_id] = (writes[first] + 0.5 * torch.randn(HEAD_SIZE, generator=own)) * 1.8 / HEAD_SIZE**0.5
    # The first coordinate is the same at every position, and holds the ids down that shall not be written.
    embedding[:, 0] = 2
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    head[:, 0] = 0
    dead = torch.tensor([piece == BEGIN or (len(piece) == 1 and piece not in _LETTERS) for piece in pieces])
    head[dead] = 0
    head[dead, 0] = -30


def prompt_ids(pair: Pair) -> list[int]:
    """The prompt in the target's ids, after its begin-of-text token."""
    return [BEGIN_ID, *Tokenizer.from_file(str(pair.target / "tokenizer.json")).encode(PROMPT).ids]


def load(folder: Path) -> LlamaForCausalLM:
    """A toy model, as transformers runs it."""
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def next_token_laws(
    model: LlamaForCausalLM, prompt: list[int], outputs: npt.NDArray[np.int64], sampling: Sampling
) -> npt.NDArray[np.float64]:
    """The law of the next token after each of some outputs.

    Args:
        model: From `load`.
        prompt: Its ids.
        outputs: `[n, length]`, what follows the prompt.
        sampling: The law's parameters.

    Returns:
        `[n, vocabulary]`; each row sums to 1.
    """
    ids = torch.cat([torch.tensor(prompt).expand(len(outputs), -1), torch.from_numpy(outputs)], dim=1)
    with torch.inference_mode():
        logits = model(ids).logits[:, -1].double()
    logits = _penalised(logits, ids, outputs, sampling)
    if sampling.temperature == 0:
        certain: npt.NDArray[np.float64] = (
            torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).double().numpy()
        )
        return certain
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits[logits < logits.topk(sampling.top_k).values[:, -1:]] = -torch.inf
    if sampling.top_p < 1:
        # The likeliest tokens, up to the one that takes their sum to `top_p`.
        probs, order = logits.softmax(-1).sort(descending=True)
        excluded = probs.cumsum(-1) - probs >= sampling.top_p
        logits[torch.zeros_like(excluded).scatter(1, order, excluded)] = -torch.inf
    law: npt.NDArray[np.float64] = logits.softmax(-1).numpy()
    return law


def _penalised(
    logits: torch.Tensor, ids: torch.Tensor, outputs: npt.NDArray[np.int64], sampling: Sampling
) -> torch.Tensor:
    ones = torch.ones(outputs.shape, dtype=torch.float64)
    counts = torch.zeros_like(logits).scatter_add_(1, torch.from_numpy(outputs), ones)
    seen = torch.zeros_like(logits).scatter_(1, ids, 1).bool()
    penalty = sampling.repetition_penalty
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)


def conditional_laws(
    model: LlamaForCausalLM, live: tuple[int, ...], prompt: list[int], depth: int, sampling: Sampling
) -> list[npt.NDArray[np.float64]]:
    """The laws of the first tokens after a prompt, each given those before it.

    Args:
        model: From `load`.
        live: Ids that have a cell of their own.
        prompt: Ids.
        depth: How many tokens.
        sampling: The laws' parameters.

    Returns:
        For each token an array whose last axis sums to 1: `[cells]`, `[cells, cells]` and so on. The cell of
        a token is its place in `live`; the last one is for all other tokens, and for whatever follows one of
        them.
    """
    ids, other = np.array(live), len(live)
    laws = []
    for length in range(depth):
        prefixes = np.array(list(itertools.product(live, repeat=length)), dtype=np.int64)
        rows = next_token_laws(model, prompt, prefixes.reshape(other**length, length), sampling)[:, ids]
        rows = np.concatenate([rows, 1 - rows.sum(-1, keepdims=True).clip(max=1)], axis=1)
        law = np.zeros((other + 1,) * (length + 1))
        law[..., other] = 1
        law[(slice(other),) * length] = rows.reshape(*(other,) * length, other + 1)
        laws.append(law)
    return laws


def exact_law(pair: Pair, prompt: list[int], depth: int, sampling: Sampling) -> npt.NDArray[np.float64]:
    """The law of the target's first tokens after a prompt, `[cells] * depth`; see `conditional_laws`."""
    law = np.ones(())
    for conditional in conditional_laws(load(pair.target), pair.live, prompt, depth, sampling):
        law = law[..., None] * conditional
    return law


def cells(pair: Pair, outputs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The cell of each token of some outputs `[n, depth]`, in the table that `exact_law` returns."""
    other = len(pair.live)
    place = np.full(max(*pair.live, int(outputs.max())) + 1, other)
    place[list(pair.live)] = np.arange(other)
    found = place[outputs]
    return np.where(np.logical_or.accumulate(found == other, axis=1), other, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, pair in make_pairs(parser.parse_args().out).items():
        law = exact_law(pair, prompt_ids(pair), 1, Sampling())
        entropy = -float((law * np.log(law.clip(min=1e-300))).sum())
        print(json.dumps({"pair": name, "target": str(pair.target), "draft": str(pair.draft), "entropy": entropy}))


if __name__ == "__main__":
    main()
