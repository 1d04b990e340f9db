"""Makes the drafter of a worker: the draft model, both vocabularies, and the strategy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_tokentiming.config import ATTRIBUTE, SettingsError, TokenTimingConfig, settings_in
from vllm_tokentiming.draft.length import FixedLength
from vllm_tokentiming.folders import check_writable
from vllm_tokentiming.vllm import patches
from vllm_tokentiming.vllm.vocabulary_loader import load_pair, startup_cache

if TYPE_CHECKING:
    from vllm_tokentiming.drafter import Drafter
    from vllm_tokentiming.vocab.pair import VocabularyPair

logger = init_logger(f"vllm.{__name__}")


def settings_of(vllm_config: VllmConfig) -> Mapping[str, Any]:
    """Our settings in a worker's configuration.

    Raises:
        SettingsError: There are none.
    """
    settings: Mapping[str, Any] | None = getattr(vllm_config.speculative_config, ATTRIBUTE, None)
    # Where our plugin is switched off, nobody has taken them out of where the user put them.
    return settings_in(vllm_config.additional_config) if settings is None else settings


def learned_weights_folder(settings: TokenTimingConfig) -> Path | None:
    """Return the folder that keeps what is learned; ``None`` if nothing does.

    Raises:
        SettingsError: It cannot be made, or not be written.
    """
    if settings.learned_weights_folder is None:
        return None
    folder = Path(settings.learned_weights_folder)
    try:
        check_writable(folder)
    except ValueError as error:
        raise SettingsError(
            f"tokentiming cannot write into the learned_weights_folder {str(folder)!r}; name a folder that it can make "
            f"or write, or leave learned_weights_folder out. The reason: {error}."
        ) from None
    return folder


def load_drafter(
    vllm_config: VllmConfig, settings: TokenTimingConfig, length: FixedLength, *, takes_q: bool, is_first_rank: bool
) -> tuple[Drafter, Callable[[], None]]:
    """Load the draft model and read both vocabularies.

    Args:
        vllm_config: The worker's configuration.
        settings: Our settings.
        length: Decides how much is drafted.
        takes_q: Whether this vLLM verifies with the probabilities of proposals.
        is_first_rank: Whether this rank learns for all. Only that one reads and writes what is kept of it.

    Returns:
        The drafter, and a function that makes its largest step (``rehearsal.py``).

    Raises:
        SettingsError: The draft cannot be used.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    from vllm_tokentiming.draft.learned_file import LearnedWeightsFile, file_name
    from vllm_tokentiming.drafter import Drafter
    from vllm_tokentiming.rehearsal import rehearse
    from vllm_tokentiming.transfer.proposals import ProposalBuilder
    from vllm_tokentiming.vllm.draft_model import PagedDraftModel

    patches.check()
    eager = settings.enforce_eager
    if eager is None:
        eager = vllm_config.model_config.enforce_eager
    logger.info(
        "TokenTiming: loading the draft model %s%s.", settings.model,
        "" if eager else "; compiling it takes minutes unless vLLM's cache has it",
    )  # fmt: skip
    num_proposals = vllm_config.speculative_config.num_speculative_tokens
    max_draft_tokens = settings.max_draft_tokens or 2 * num_proposals
    model = PagedDraftModel(vllm_config, settings, max_draft_tokens)
    logger.info("TokenTiming: reading both vocabularies, which takes seconds if they are large.")
    pair = load_pair(settings, vllm_config.model_config, model.model_config)
    logger.info(
        "TokenTiming: target vocabulary %d (%s), draft vocabulary %d (%s), %s alignment; special tokens "
        "(target to draft): %s; boundaries of chat messages that the draft reads in its own template: %d.",
        pair.target.token_bytes.size, pair.target.token_bytes.kind.value,
        pair.draft.token_bytes.size, pair.draft.token_bytes.kind.value,
        "byte-exact" if pair.exact else "lossy, warped", _describe_special_tokens(pair),
        len(pair.turns.texts),
    )  # fmt: skip
    # Made here, not in the first request: a kept vocabulary makes its encoder when something is to be encoded.
    _ = pair.target.encoder, pair.draft.encoder
    if not takes_q:
        logger.warning(
            "TokenTiming: this vLLM takes no proposal probabilities from a plugin, so sampled requests are "
            "verified as one-hot: exact as well, but fewer of their proposals will be accepted."
        )
    transducer = startup_cache().transducer(pair, one_to_one=settings.strategy == "tli")
    builder = ProposalBuilder(
        pair,
        transducer,
        settings.strategy,
        draft_size=model.vocab_size,
        target_size=vllm_config.model_config.get_vocab_size(),
        num_proposals=num_proposals,
        max_draft_tokens=max_draft_tokens,
        device=model.device,
        max_q_bytes=int(settings.q_memory_gib * (1 << 30)) if takes_q else 0,
        length=length,
        truncate=apply_top_k_top_p,
        verify_blocks=vllm_config.speculative_config.rejection_sample_method == "block",
        learns=settings.learns,
    )
    learned_file = None
    folder = learned_weights_folder(settings) if is_first_rank else None
    if folder is not None and builder.learned is not None:
        target = vllm_config.model_config
        models = (target.model, target.revision, settings.model, settings.revision)
        learned_file = LearnedWeightsFile(
            folder / file_name(pair, transducer, model.vocab_size, models),
            builder.learned,
            lambda what: logger.warning("TokenTiming: %s", what),
        )
        if learned_file.load():
            logger.info("TokenTiming: goes on with what was learned before, in %s.", learned_file.path)
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    return (
        Drafter(
            pair,
            model,
            builder,
            length,
            max_draft_tokens,
            copy_repeats=settings.copy_repeats,
            learned_file=learned_file,
        ),
        functools.partial(rehearse, model, builder, max_num_seqs, num_proposals),
    )


def _describe_special_tokens(pair: VocabularyPair) -> str:
    target, draft = pair.target.token_bytes.special, pair.draft.token_bytes.special
    shown = [f"{target[t]} = {draft[d]}" for t, d in sorted(pair.special.to_draft.items())]
    return ", ".join(shown[:8] + (["..."] if len(shown) > 8 else [])) or "none in common"
