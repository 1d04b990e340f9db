"""Commits texts and tokens to a draft's context by any schedule, and checks what the draft has read after each step."""

import random

import numpy as np

from vllm_tokentiming.align.retokenize import retokenize
from vllm_tokentiming.context import DraftContext, Drafted
from vllm_tokentiming.vocab.pair import VocabularyPair

CODE = '''\
def merge(self, *others: "Counts", depth=0) -> dict[str, int]:
    """Adds up; keeps 'zero' entries."""
\tif not others or depth > 1_000:\t# tabs, too
        return {**self.items, "naïve": -1.5e-3}
    return sum((o.items[k]["x"] for o in others for k in o), start=0x41)\r\n\n\n
'''
EMOJI = (
    "🙂👩‍👩‍👧‍👦 ok 🏳️‍🌈🇫🇷!! \u200b\ufeff x\u00a0y 👍🏽… cafe\u0301 and café ▁▁ "
    "<s></s><|endoftext|> <tool_call> \x00\x7f 𝔘𝔫𝔦 "
)
MIXED = "The cat sat, and then: Привет, мир! 世界人权宣言。 हिन्दी العربية ไทย 한국어 12345 words\n\n"


def common_prefix(left: list[int], right: list[int]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length


def canonical(pair: VocabularyPair, target_ids: list[int]) -> list[int]:
    """What an exact draft should read for some target tokens: all at once between special tokens."""
    ids: list[int] = []
    data = b""
    for target_id in target_ids:
        special = pair.target.token_bytes.special.get(target_id)
        if special is None:
            data += pair.target.token_bytes[target_id]
        elif target_id in pair.special.to_draft:
            counterpart = pair.special.to_draft[target_id]
            ids += pair.draft.encoder.encode(data)
            data = b""
            if not ids == pair.draft_prefix == [counterpart]:
                ids.append(counterpart)
        elif pair.special.unmapped == "text" and target_id not in pair.special.dropped:
            data += special.encode()
    ids += pair.draft.encoder.encode(data)
    prefix = pair.draft_prefix
    if not target_ids or ids[: len(prefix)] == prefix or (prefix == [pair.draft.separator] and pair.is_chat(ids)):
        return ids
    return prefix + ids


def standing_by_offsets(pair: VocabularyPair, drafted: Drafted, num_accepted: int) -> int:
    """Drafted tokens up to the last that ends where an accepted target token ends; none of them special."""
    accepted = drafted.proxy.target_ids[:num_accepted]
    target_ends = {len(pair.target.token_bytes.decode(accepted[:n])) for n in range(num_accepted + 1)}
    draft_ids = drafted.draft_ids
    draft_ends = [len(pair.draft.token_bytes.decode(draft_ids[:n])) for n in range(len(draft_ids) + 1)]
    return max(n for n, end in enumerate(draft_ends) if end in target_ends)


class Follower:
    """A draft's context beside everything that its target committed; each commit is checked."""

    def __init__(self, pair: VocabularyPair) -> None:
        self.pair, self.context, self.committed = pair, DraftContext(pair), []

    def commit(self, target_ids: list[int], drafted: Drafted | None = None) -> int:
        context, pair = self.context, self.pair
        read = list(context.draft_ids)
        kept = context.commit(target_ids, drafted)
        self.committed += target_ids
        assert context.num_target == len(self.committed)
        read += [] if drafted is None else drafted.draft_ids
        assert 0 <= kept <= len(context.draft_ids)
        assert context.draft_ids[:kept] == read[:kept]
        token_bytes, mapped = pair.draft.token_bytes, {*pair.draft_prefix, *pair.special.to_draft.values()}
        assert all(token_bytes.pieces[i] is not None or i in mapped for i in context.draft_ids)
        if pair.draft.encoder.exact:
            assert context.draft_ids == canonical(pair, self.committed)
        return kept


def draft_next(pair: VocabularyPair, data: bytes, rng: random.Random) -> Drafted | None:
    """What a draft might write before `data`: right, right up to some token, or nothing."""
    draft_ids = pair.draft.encoder.encode(data[:60])[: rng.randint(1, 8)]
    if rng.random() < 0.5:
        ordinary = np.flatnonzero(pair.draft.token_bytes.lengths)
        right = rng.randint(0, len(draft_ids))
        draft_ids = draft_ids[:right] + [int(rng.choice(ordinary)) for _ in range(rng.randint(0, 3))]
    return Drafted(draft_ids, retokenize(pair, draft_ids)) if draft_ids else None


def target_next(
    pair: VocabularyPair, data: bytes, drafted: Drafted | None, rng: random.Random
) -> tuple[list[int], int]:
    """What a target might commit: some of what was proposed, and one token of its own.

    Returns:
        The tokens, and how many of them are proposals.
    """
    proposed = [] if drafted is None else drafted.proxy.target_ids
    num_accepted = len(proposed) if rng.random() < 0.5 else rng.randint(0, len(proposed))
    accepted = pair.target.token_bytes.decode(proposed[:num_accepted])
    own = pair.target.encoder.encode(data[len(accepted) :][:60] if data.startswith(accepted) else data[:60])[:1]
    if not own or rng.random() < 0.1:
        own = [int(rng.choice(np.flatnonzero(pair.target.token_bytes.lengths)))]
    return proposed[:num_accepted] + own, num_accepted


def follow(pair: VocabularyPair, data: bytes, rng: random.Random) -> Follower:
    """Commit a text by a random schedule, and check every step."""
    follower = Follower(pair)
    while data:
        drafted = None if rng.random() < 0.1 else draft_next(pair, data, rng)
        target_ids, num_accepted = target_next(pair, data, drafted, rng)
        read = list(follower.context.draft_ids)
        kept = follower.commit(target_ids, drafted)
        if pair.exact:
            if drafted is not None:
                num_accepted = common_prefix(target_ids, drafted.proxy.target_ids)
                read += drafted.draft_ids[: standing_by_offsets(pair, drafted, num_accepted)]
            assert kept == common_prefix(read, follower.context.draft_ids)
        written = pair.target.token_bytes.decode(target_ids)
        data = data[len(written) :] if written and data.startswith(written) else data[rng.randint(1, 6) :]
    return follower
