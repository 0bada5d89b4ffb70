"""The forward pass: an adapter's two modules, each computing with the carry's columns as well.

Held by tests/carry/test_carry.py and test_carry_transforms.py.

One product over the adapter's and the carry's columns together costs less than two
(docs/quantized.md has the measurement), and whatever calls the adapter's modules (dropout, DoRA)
sees both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from scalora.carry.carry import Carry
from scalora.sharding.rows import Rows


class _Joined(torch.autograd.Function):
    """Compute ``x @ cat([weight, frozen])^T``, whose frozen half takes no gradient.

    For the backward pass ``frozen`` is kept as it is stored, in its own dtype, and where the layer
    is sharded the share that is held here alone.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, frozen: Tensor, axis: int, rows: Rows) -> Tensor:
        return functional.linear(x, _cat(weight, frozen, axis, rows))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, frozen, ctx.axis, ctx.rows = inputs
        ctx.save_for_backward(x, weight, frozen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, frozen = ctx.saved_tensors
        [grad] = grads
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _cat(weight, frozen, ctx.axis, ctx.rows)
        if ctx.needs_input_grad[1]:
            rows, columns = weight.shape
            # Not slices: of a whole axis these are aliases, which a vmap over gradients refuses.
            grad = grad.narrow(-1, 0, rows).reshape(-1, rows)
            grad_weight = grad.mT @ x.narrow(-1, 0, columns).reshape(-1, columns)
        return grad_x, grad_weight, None, None, None


def _cat(weight: Tensor, frozen: Tensor, axis: int, rows: Rows) -> Tensor:
    """Return both along ``axis``, in the weight's dtype."""
    whole = rows.gathered(frozen, 1 - axis, weight.shape[1 - axis])
    return torch.cat([weight, whole.to(weight.dtype)], dim=axis)


def _joined(x: Tensor, weight: Tensor, frozen: Tensor, axis: int, rows: Rows) -> Tensor:
    """Compute as ``functional.linear`` would under autocast: both passes in one dtype."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return _product(x, weight, frozen, axis, rows)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return _product(x.to(dtype), weight.to(dtype), frozen, axis, rows)


def _product(x: Tensor, weight: Tensor, frozen: Tensor, axis: int, rows: Rows) -> Tensor:
    """Return `_Joined`'s product, which has rules for the backward pass alone.

    Under the transforms of ``torch.func`` and in forward mode all of the product is differentiated,
    the frozen half too: rules of one's own for those are what torch.compile cannot trace.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return functional.linear(x, _cat(weight, frozen, axis, rows))
    return _Joined.apply(x, weight, frozen, axis, rows)


class _Carrying:
    """A module of the adapter that has a carry, which moves with it and keeps its dtype."""

    carry: Carry

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module: nn.Module = super()._apply(fn, recurse)  # type: ignore[misc]
        device = next(module.parameters()).device
        if device.type != "meta":
            self.carry.on(device)
        return module


class DownLinear(_Carrying, nn.Linear):
    """``lora_A``: (..., n) -> (..., r + capacity)."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the codes of the adapter, then those of the carry."""
        carry = self.carry
        return _joined(input, self.weight, carry.down.to(input.device), 0, carry.rows)


class UpLinear(_Carrying, nn.Linear):
    """``lora_B``: (..., r + capacity) -> (..., m)."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the sum of the adapter's output and the carry's: (..., m)."""
        carry = self.carry
        output = _joined(input, self.weight, carry.up.to(input.device), 1, carry.rows)
        return output if self.bias is None else output + self.bias


class _DownConv(_Carrying):
    def forward(self, input: Tensor) -> Tensor:
        this: Any = self
        down = self.carry.whole_down(this.weight.dtype).to(this.weight.device)
        down = down.view(-1, *this.weight.shape[1:])
        return this._conv_forward(input, torch.cat([this.weight, down]), None)


class _UpConv(_Carrying):
    def forward(self, input: Tensor) -> Tensor:
        this: Any = self
        up = self.carry.whole_up(this.weight.dtype).to(this.weight.device)
        up = up.view(-1, self.carry.capacity, *this.weight.shape[2:])
        weight = torch.cat([this.weight, up], dim=1)
        return this._conv_forward(input, weight, this.bias)


class DownConv1d(_DownConv, nn.Conv1d):
    """``lora_A`` of a convolution: more output channels."""


class DownConv2d(_DownConv, nn.Conv2d):
    """``lora_A`` of a convolution: more output channels."""


class DownConv3d(_DownConv, nn.Conv3d):
    """``lora_A`` of a convolution: more output channels."""


class UpConv1d(_UpConv, nn.Conv1d):
    """``lora_B`` of a convolution: more input channels."""


class UpConv2d(_UpConv, nn.Conv2d):
    """``lora_B`` of a convolution: more input channels."""


class UpConv3d(_UpConv, nn.Conv3d):
    """``lora_B`` of a convolution: more input channels."""


_DOWN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: DownLinear,
    nn.Conv1d: DownConv1d,
    nn.Conv2d: DownConv2d,
    nn.Conv3d: DownConv3d,
}
_UP: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: UpLinear,
    nn.Conv1d: UpConv1d,
    nn.Conv2d: UpConv2d,
    nn.Conv3d: UpConv3d,
}


def put_carry(down: nn.Module, up: nn.Module, carry: Carry) -> None:
    """Let an adapter's two modules compute with a carry, from now on or in another's place.

    The modules become of another class, as torch's own parametrizations do it: parameters, hooks
    and whoever holds the modules stay what they are.

    Raises:
        TypeError: they are no linear layers or convolutions.
    """
    for module, classes in ((down, _DOWN), (up, _UP)):
        if not isinstance(module, _Carrying):
            if type(module) not in classes:
                raise TypeError(f"a {type(module).__name__} of the adapter cannot have a carry.")
            module.__class__ = classes[type(module)]
        module.carry = carry  # type: ignore[assignment]
