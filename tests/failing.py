"""A step that fails where a test wants it to."""

from torch.utils._python_dispatch import TorchDispatchMode


class FailAt(TorchDispatchMode):
    """Raises instead of the k-th operation."""

    def __init__(self, k: int, error: type[BaseException]) -> None:
        super().__init__()
        self.k, self.error, self.count = k, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.k:
            raise self.error(f"injected at operation {self.k}: {func}")
        return func(*args, **(kwargs or {}))
