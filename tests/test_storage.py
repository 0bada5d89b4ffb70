"""The address by which tied weights are told."""

import torch
from torch import nn

from scalora.storage import storage_address


def test_tied_weights_have_one_address_and_copies_another() -> None:
    weight = nn.Parameter(torch.zeros(4, 3))
    tied = nn.Parameter(weight.data)
    assert storage_address(weight) == storage_address(tied) == storage_address(weight[1:])
    assert storage_address(weight) != storage_address(weight.clone())


class Wrapped(torch.Tensor):
    """A tensor made of another one, as torchao's quantized weights are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapped":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: object) -> "Wrapped":
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, *_: object, **__: object) -> torch.Tensor:
        raise NotImplementedError


def test_wrapper_has_the_address_of_what_is_inside() -> None:
    inner = torch.zeros(4, 3)
    assert storage_address(Wrapped(inner)) == storage_address(inner)
