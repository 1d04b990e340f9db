"""The memory of a device: the one thing about the draft that differs between devices."""

from __future__ import annotations

import sys

import psutil
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a device."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.accelerator.get_memory_info(device)[0])


def most_bytes() -> int:
    """More memory than any worker on this machine can have for the draft, as a process without a device can tell."""
    if current_platform.is_cpu():
        return int(psutil.virtual_memory().total)
    try:
        return int(current_platform.get_device_total_memory())
    except Exception:  # A front end may be on a machine without a device, and not every platform can tell.
        return sys.maxsize


def kv_budget_bytes(device: torch.device, vllm_config: VllmConfig) -> int:
    """Most memory that the draft's KV cache takes unless the user sets ``kv_memory_gib``.

    A quarter of the target's KV cache where its size is set, else a tenth of the memory that vLLM may use. On an
    accelerator it is allocated before vLLM measures what is left for the target, so it is never promised twice.
    """
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes is not None:
        return int(cache.kv_cache_memory_bytes) // 4
    on_cpu = device.type == "cpu"
    total = psutil.virtual_memory().total if on_cpu else torch.accelerator.get_memory_info(device)[1]
    return int(total * cache.gpu_memory_utilization) // 10
