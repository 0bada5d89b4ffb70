"""A CUDA device that is not there: tensors without memory, and what would be launched on it.

A fake tensor has a shape, a dtype and a device, and no elements.  Every operation on it is
dispatched as on a real one, so it can be counted; and code that asks for the value of an element,
for which a host waits until its device has done all that was launched before, cannot go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Hand out memory, or another view of it.
_WITHOUT_KERNEL = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
# Write in place and return nothing; torch has no fake of those that read a learning rate there.
_WITHOUT_RESULT = {"_fused_adam_", "_fused_adamw_"}
# Read an answer of the device on the host: a value, a number of elements, or if it has converged.
_READ_ON_HOST = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "linalg_eig",
    "masked_select",
    "nonzero",
}


class DeviceWaitError(RuntimeError):
    """Raised where a host would wait for its device."""


class FakeDevice(TorchDispatchMode):
    """Counts the operations that are dispatched to the device, of a call that it is given.

    Tensors on the host stay real, as an optimizer's step counters are; those on the device are
    fake.  `fake_device` makes and enters it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: Counter[str] | None = None  # of the call that runs now

    def operations(self, call: Callable[[], object]) -> Counter[str]:
        """Return how many operations of each name a call launches on the device.

        Raises:
            DeviceWaitError: it waits for the device.
        """
        found = self._operations = Counter()
        try:
            call()
        finally:
            self._operations = None
        return found

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run on the host for real; on the device count, or raise a `DeviceWaitError`."""
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        if not any(isinstance(t, FakeTensor) for t in given) and not _asks_for_device(kwargs):
            kwargs.pop("pin_memory", None)  # takes a driver
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if self._operations is not None and _waits(name, given, args, kwargs):
            raise DeviceWaitError(f"{name} waits for the device.")
        result = None if name in _WITHOUT_RESULT else func(*args, **kwargs)
        touched = [*given, *_tensors(result)]
        on_device = any(t.device.type == "cuda" for t in touched)
        if self._operations is not None and on_device and _launches(func):
            self._operations[name] += 1
        return result


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """Enter a device "cuda" on a machine that need not have one.

    Raises:
        RuntimeError: torch is not linked with CUDA.
    """
    if not torch.backends.cuda.is_built():
        raise RuntimeError(
            "this torch has no CUDA in it: `make device-trace` installs one that has."
        )
    device = FakeDevice()
    # A generator on a device takes a driver.  Any will do: nothing is drawn.
    generator = mock.patch.object(torch, "Generator", lambda device=None: _HOST_GENERATOR)
    wait = mock.patch.object(torch.cuda, "synchronize", _wait)
    with FakeTensorMode(allow_non_fake_inputs=True), generator, wait, device:
        yield device


def _wait(device: object = None) -> None:
    raise DeviceWaitError("torch.cuda.synchronize waits for the device.")


_HOST_GENERATOR = torch.Generator()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _asks_for_device(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cuda"


def _launches(func: Any) -> bool:
    no_kernel = func.is_view or func.namespace == "prim"
    return not no_kernel and func.overloadpacket.__name__ not in _WITHOUT_KERNEL


def _waits(name: str, given: Sequence[Tensor], args: Any, kwargs: Mapping[str, Any]) -> bool:
    places = {t.device.type for t in given}
    if _asks_for_device(kwargs):
        places.add("cuda")
    elif kwargs.get("device") is not None:
        places.add(torch.device(kwargs["device"]).type)
    if "cuda" not in places:
        return False
    if name in ("copy_", "_foreach_copy_", "_to_copy"):
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return blocking and len(places) > 1
    return name in _READ_ON_HOST
