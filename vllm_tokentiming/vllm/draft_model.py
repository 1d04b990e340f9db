"""The draft model: weights, private KV cache, and one batched forward pass.

vLLM does all of the work: its model classes, its weight loading, its attention backends, its KV cache layout. What is
here is only what its model runner would do around them for a second model whose sequences are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.gpu.attn_utils import (
    build_attn_metadata,
    build_slot_mappings_by_layer,
    get_kv_cache_spec,
    init_attn_backend,
    init_kv_cache,
)
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from vllm_tokentiming.config import SettingsError, TokenTimingConfig
from vllm_tokentiming.draft.kv_pool import KVPool
from vllm_tokentiming.draft.kv_size import kv_size
from vllm_tokentiming.draft.protocol import Span
from vllm_tokentiming.vllm import compat
from vllm_tokentiming.vllm.draft_config import draft_vllm_config
from vllm_tokentiming.vllm.memory import available_bytes, kv_budget_bytes

logger = init_logger(f"vllm.{__name__}")

_GIB = 1 << 30
_CPU_WARM_UP_TOKENS = 64


class PagedDraftModel:
    """The draft model of one worker.

    Attributes:
        model_config: vLLM's description of it.
        device: Where it runs.
        max_model_len: Longest sequence in draft tokens.
        max_batch_tokens: Most tokens in one pass.
        vocab_size: Columns of the logits.
        pool: Blocks of its KV cache.
    """

    def __init__(self, vllm_config: VllmConfig, settings: TokenTimingConfig, max_draft_tokens: int) -> None:
        """Load the weights and allocate the KV cache.

        Args:
            vllm_config: The worker's configuration.
            settings: Our settings.
            max_draft_tokens: Most draft tokens written for a request in a step.

        Raises:
            SettingsError: The draft does not fit.
        """
        self._config = draft_vllm_config(vllm_config, settings)
        self.device = torch.device(vllm_config.device_config.device)
        self.model_config = self._config.model_config
        self.max_model_len = self.model_config.max_model_len
        self.vocab_size = self.model_config.get_vocab_size()
        self.max_batch_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        with set_current_vllm_config(self._config), set_model_tag("tokentiming_draft"):
            try:
                self._model = get_model(vllm_config=self._config, prefix="tokentiming_draft")
            except torch.cuda.OutOfMemoryError as error:
                raise SettingsError(
                    f"tokentiming: the weights of the draft model {settings.model!r} do not fit into memory beside the "
                    "target's; choose a smaller draft model or quantize it."
                ) from error
            self.pool = self._allocate(settings, max_draft_tokens, vllm_config)
        num_rows = len(self.pool.tables)
        self._input_ids = self._buffer(self.max_batch_tokens, torch.int32)
        self._positions = self._buffer(self.max_batch_tokens, torch.int64)
        self._slots = self._buffer(self.max_batch_tokens, torch.int64)
        self._query_start = self._buffer(num_rows + 1, torch.int32)
        self._seq_lens = self._buffer(num_rows, torch.int32)
        self._block_table = self._buffer(self.pool.tables.size, torch.int32)
        # The host buffers are written again in the next pass; on an accelerator they must have been read by then.
        self._uploaded: torch.Event | None = None

        self._warm_up()

    def _warm_up(self) -> None:
        """Run a large pass first and then the smallest, so that everything is compiled when the engine starts.

        The first pass is the one that vLLM compiles for all others. It must have more than one token: the compiler
        takes the size 1 for a constant, and vLLM drops the guards that would notice (vllm/compilation/wrapper.py).
        On an accelerator it is the largest that there can be, as in vLLM's own profile run. On a CPU that would take
        minutes, and no memory is measured by it.
        """
        row = self.pool.open_row()
        if row is None:
            raise RuntimeError("the KV pool of the draft has no row although no request is there")
        most = min(self.max_batch_tokens, self.max_model_len)
        if self.device.type == "cpu":
            most = min(most, _CPU_WARM_UP_TOKENS)
        for num_tokens in (most, 1):
            self.pool.grow(row, num_tokens)
            self.forward([Span(row, 0, [0] * num_tokens)])
        self.pool.close_row(row)

    def _buffer(self, size: int, dtype: torch.dtype) -> CpuGpuBuffer:
        buffer = CpuGpuBuffer(size, dtype=dtype, device=self.device)
        if self.device.type == "cpu":
            buffer.gpu = buffer.cpu
        return buffer

    def _allocate(self, settings: TokenTimingConfig, max_draft_tokens: int, vllm_config: VllmConfig) -> KVPool:
        # As vLLM does for the target once it is loaded: the draft may have another attention backend.
        current_platform.update_block_size_for_backend(self._config)
        specs = get_kv_cache_spec(self._config)
        planning = compat.kv_cache_planning()
        groups = planning.get_kv_cache_groups(self._config, specs)
        if len(groups) != 1:
            raise SettingsError(
                f"tokentiming cannot draft with {settings.model!r}: its layers need {len(groups)} kinds of KV cache; "
                "choose a draft model with ordinary attention."
            )
        context = self._config.compilation_config.static_forward_context
        layouts = get_supported_kv_cache_layouts([context[name].get_attn_backend() for name in specs])
        resolve_kv_cache_layout(self._config, [[layout.name for layout in layouts]], specs.values())

        block_size = groups[0].kv_cache_spec.block_size
        block_bytes = sum(spec.page_size_bytes for spec in specs.values())
        size = kv_size(
            draft_max_len=self.max_model_len,
            target_max_len=vllm_config.model_config.max_model_len,
            max_draft_tokens=max_draft_tokens,
            max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
            block_size=block_size,
            block_bytes=block_bytes,
            budget_bytes=kv_budget_bytes(self.device, vllm_config),
            kv_memory_gib=settings.kv_memory_gib,
        )
        if size.num_bytes > (free := available_bytes(self.device)):
            raise SettingsError(
                f"tokentiming: the draft's KV cache needs {size.num_bytes / _GIB:.2f} GiB and {free / _GIB:.2f} GiB "
                "are free; lower kv_memory_gib or max_model_len, or choose a smaller draft model."
            )
        self.max_model_len = size.max_model_len
        kv_config: KVCacheConfig = planning.get_kv_cache_config_from_groups(self._config, groups, size.num_bytes)
        self._attn_groups, _, kernel_block_sizes = init_attn_backend(kv_config, self._config, self.device)
        init_kv_cache(context, kv_config, self.device, kernel_block_sizes, self._config)
        self._kv_config = kv_config
        self._kv_caches = [context[name].kv_cache for name in specs]
        # A backend may divide vLLM's blocks into smaller ones; the cache is ours alone, so ours are those.
        block_size, divided = kernel_block_sizes[0], block_size // kernel_block_sizes[0]
        self._num_blocks = kv_config.num_blocks * divided
        logger.info(
            "TokenTiming: draft model %s, %s, %s; its KV cache has %.2f GiB for %d draft tokens; a request with more "
            "than %d draft tokens goes on without proposals.",
            settings.model, str(self.model_config.dtype).removeprefix("torch."),
            "eager" if self.model_config.enforce_eager else "compiled",
            size.num_bytes / _GIB, self._num_blocks * block_size, self.max_model_len,
        )  # fmt: skip
        cache_prefixes = settings.enable_prefix_caching
        if cache_prefixes is None:
            cache_prefixes = vllm_config.cache_config.enable_prefix_caching
        num_rows = 2 * vllm_config.scheduler_config.max_num_seqs
        return KVPool(self._num_blocks, block_size, num_rows, self.max_model_len, cache_prefixes)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """Run one pass.

        Args:
            spans: At most ``max_batch_tokens`` tokens, shortest spans first (some attention backends want decodes
                before prefills). Each row has room for its tokens. A span may build on what another one writes in
                this pass: in each layer, all entries are written before any are read.

        Returns:
            Logits after each span's last token, ``[len(spans), vocab_size]``, on the device.
        """
        if self._uploaded is not None:
            self._uploaded.synchronize()
        self._copy_blocks()
        lengths = np.array([len(span.draft_ids) for span in spans], dtype=np.int32)
        starts = np.array([span.start for span in spans], dtype=np.int32)
        rows = np.array([span.row for span in spans], dtype=np.int32)
        num_seqs, num_tokens = len(spans), int(lengths.sum())
        ends = np.cumsum(lengths, dtype=np.int32)
        self._query_start.np[1 : num_seqs + 1] = ends
        self._seq_lens.np[:num_seqs] = starts + lengths
        self._input_ids.np[:num_tokens] = [i for span in spans for i in span.draft_ids]
        positions = np.arange(num_tokens, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
        self._positions.np[:num_tokens] = positions
        self._slots.np[:num_tokens] = self._slots_of(np.repeat(rows, lengths), positions)
        max_seq_len = int(self._seq_lens.np[:num_seqs].max())
        table = self.pool.tables[rows, : -(-max_seq_len // self.pool.block_size)]
        self._block_table.np[: table.size] = table.ravel()

        block_table = self._upload(self._block_table, table.size).view(table.shape)
        slots = self._upload(self._slots, num_tokens)
        metadata = build_attn_metadata(
            attn_groups=self._attn_groups,
            num_reqs=num_seqs,
            num_tokens=num_tokens,
            query_start_loc_gpu=self._upload(self._query_start, num_seqs + 1),
            query_start_loc_cpu=self._query_start.cpu[: num_seqs + 1],
            max_query_len=int(lengths.max()),
            seq_lens=self._upload(self._seq_lens, num_seqs),
            seq_lens_cpu_upper_bound=self._seq_lens.cpu[:num_seqs],
            max_seq_len=max_seq_len,
            block_tables=[block_table],
            slot_mappings=slots.unsqueeze(0),
            kv_cache_config=self._kv_config,
        )
        input_ids, device_positions = (
            self._upload(self._input_ids, num_tokens),
            self._upload(self._positions, num_tokens),
        )
        if self.device.type != "cpu":
            self._uploaded = self._uploaded or torch.Event(self.device.type)
            self._uploaded.record()
        slots_by_layer = build_slot_mappings_by_layer(slots.unsqueeze(0), self._kv_config)
        with set_forward_context(metadata, self._config, num_tokens=num_tokens, slot_mapping=slots_by_layer):
            hidden = self._model(input_ids=input_ids, positions=device_positions)
        last = self._query_start.gpu[1 : num_seqs + 1] - 1
        logits: torch.Tensor = self._model.compute_logits(hidden[last.long()])
        return logits[:, : self.vocab_size]

    def _copy_blocks(self) -> None:
        if self.pool.copies:
            copies = [(source, block) for block, source in self.pool.copies.items()]
            copy_kv_cache_blocks_inplace(self._kv_caches, self._num_blocks, copies)
            self.pool.copies.clear()

    def _slots_of(self, rows: npt.NDArray[np.int32], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        block, offset = np.divmod(positions, self.pool.block_size)
        slots: npt.NDArray[np.int64] = self.pool.tables[rows, block].astype(np.int64) * self.pool.block_size + offset
        return slots

    def _upload(self, buffer: Any, size: int) -> torch.Tensor:
        if self.device.type == "cpu":
            return buffer.cpu[:size]
        return buffer.copy_to_gpu(size)
