"""Address of a tensor's memory, by which tied weights are recognised.

Held by tests/test_storage.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storage_address(tensor: Tensor) -> int:
    """Return the address of a tensor's storage, which is equal for tied weights.

    A tensor that wraps others (torchao's quantized weights) has no storage of its own; the first
    inner tensor's address is returned.  A fake tensor has no memory at all; its storage object's
    address is returned.
    """
    inner: Any = tensor
    while is_traceable_wrapper_subclass(inner):
        inner = getattr(inner, inner.__tensor_flatten__()[0][0])
    storage = inner.untyped_storage()
    return int(storage._cdata if isinstance(inner, FakeTensor) else storage.data_ptr())
