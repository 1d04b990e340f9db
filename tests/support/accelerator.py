"""An accelerator that is not there: tensors that say they are elsewhere, and are computed on this processor.

As with a real one, an operation on tensors of both sides fails, but for copies, indices and single numbers; and each
time that the host must wait is counted. What is not like a real one: its kernels, its streams, its speed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # The one that every build of torch has besides the processor.
_COPIES = {"to", "_to_copy", "copy_"}
_INDICES = {"index", "index_put_"}
_RESULTS = {"item", "_local_scalar_dense", "nonzero", "masked_select", "equal"}  # That the host cannot go on without.


class _Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, data: torch.Tensor, waits: Counter[str]) -> _Elsewhere:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, data.size(), strides=data.stride(), dtype=data.dtype, device=DEVICE
        )

    def __init__(self, data: torch.Tensor, waits: Counter[str]) -> None:
        self.here, self._waits = data, waits

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of `Accelerator`")

    def tolist(self) -> Any:
        self._waits["tolist"] += 1
        return self.here.tolist()


class Accelerator(TorchDispatchMode):
    """Within it, tensors can be created on `DEVICE` and copied there and back.

    Attributes:
        waits: How often the host waited, by operation.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        create = torch.tensor  # Copies to its device without asking a mode.
        monkeypatch.setattr(
            torch, "tensor", lambda data, dtype=None, device="cpu": create(data, dtype=dtype).to(device)
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, _Elsewhere)]
        here = [tensor for tensor in tensors if not isinstance(tensor, _Elsewhere)]
        devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        goes_there = devices[-1] == DEVICE if devices else isinstance(tensors[0], _Elsewhere)
        if there and name not in _COPIES | _INDICES:
            assert all(tensor.dim() == 0 for tensor in here), f"{name} of tensors on both sides"
        # By a list or a tensor of the host's: it is copied each time, and that waits.
        assert not (there and name in _INDICES and here), f"{name} by what is on the host"
        if name in _COPIES:
            self.waits[name] += bool(here if goes_there else there) and not kwargs.get("non_blocking")
        elif there:
            by_mask = name in _INDICES and any(index is not None and index.dtype == torch.bool for index in args[1])
            self.waits[name] += name in _RESULTS or by_mask

        def bring(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            return leaf.here if isinstance(leaf, _Elsewhere) else leaf

        result = func(*tree_map(bring, args), **tree_map(bring, kwargs))
        if goes_there:
            return tree_map(lambda x: _Elsewhere(x, self.waits) if isinstance(x, torch.Tensor) else x, result)
        return result


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor holds, wherever it is."""
    return tensor.here if isinstance(tensor, _Elsewhere) else tensor
