"""One adapter of one LoRA layer as the derivation's two matrices.

Held by tests/peft_layers/test_layers.py and tests/carry/test_carry.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layers
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from scalora import sharding
from scalora.carry import Carry
from scalora.peft_layers.carried import attach_carry, attached_carry
from scalora.peft_layers.unpacking import unpack

CONVOLUTIONS = (lora_layers.Conv1d, lora_layers.Conv2d, lora_layers.Conv3d)


@dataclass(frozen=True)
class LoRAPair:
    """One adapter of one LoRA layer, which looks tensors up in PEFT's module when asked.

    Attributes:
        name: the module's name in the model that the adapter was put on.
        module: PEFT's layer.
        adapter: the adapter's name.
    """

    name: str
    module: Any
    adapter: str

    @property
    def is_embedding(self) -> bool:
        """Return whether the layer is an embedding; its factors are parameters, not modules."""
        return isinstance(self.module, lora_layers.Embedding)

    @property
    def P_parameter(self) -> nn.Parameter:
        """``lora_B``: (m, r), followed by ones in a convolution; axis 1 is the rank's."""
        if self.is_embedding:
            return self.module.lora_embedding_B[self.adapter]
        return _weight(self.module._modules["lora_B"]._modules[self.adapter])

    @property
    def Q_parameter(self) -> nn.Parameter:
        """``lora_A``: (r, n), or (r, in, *kernel) in a convolution; axis 0 is the rank's."""
        if self.is_embedding:
            return self.module.lora_embedding_A[self.adapter]
        return _weight(self.module._modules["lora_A"]._modules[self.adapter])

    @property
    def factor_modules(self) -> list[nn.Module]:
        """Modules that hold the factors and compute with them; none in an embedding."""
        if self.is_embedding:
            return []
        return [self.module.lora_A[self.adapter], self.module.lora_B[self.adapter]]

    @property
    def carry(self) -> Carry | None:
        """Frozen increments beside the base, on the factors' device and sharded alike; or None."""
        carry = attached_carry(self.module, self.adapter)
        if carry is None:
            return None
        P = self.P_parameter
        return carry.on(P.device).among(sharding.rows_of(P))

    @property
    def has_carry(self) -> bool:
        """Return whether increments are in a carry."""
        carry = self.carry
        return carry is not None and carry.columns > 0

    def ensure_carry(self, capacity: int, dtype: torch.dtype) -> Carry:
        """Return the layer's carry, an empty one if it had none.

        Args:
            capacity: columns that it has room for, at least.
            dtype: what its factors are kept in, at least.
        """
        carry = self.carry
        if carry is None:
            P, (m, n) = self.P_parameter, self.shape
            carry = Carry(m, n, capacity, P.device, dtype, sharding.rows_of(P))
            attach_carry(self.module, self.adapter, carry)
        if carry.capacity < capacity:
            carry.grow(capacity)
        carry.widen(dtype)
        return carry

    @property
    def learned_P(self) -> Tensor:
        """P and the carry's columns, (m, r + columns), float32 at least.

        With a sharded carry, call it on every process.
        """
        P, carry = _wide(self.P_parameter).flatten(1), self.carry
        if carry is None:
            return P
        return torch.cat([P, carry.whole_up()[:, : carry.columns].to(P.dtype)], dim=1)

    @property
    def learned_Q(self) -> Tensor:
        """Q transposed and the carry's rows, (r + columns, n), likewise."""
        Q, carry = _wide(self.Q_parameter).flatten(1), self.carry
        if carry is None:
            return Q
        return torch.cat([Q, carry.whole_down()[: carry.columns].to(Q.dtype)])

    def on_all_processes(self, flag: bool) -> bool:
        """Return whether a flag is true on all processes that share the carry; call it on each."""
        carry = self.carry
        if carry is None or carry.rows.processes == 1:
            return flag
        return bool(carry.rows.sum(torch.tensor(float(not flag), device=carry.cut.device)) == 0)

    @property
    def base_weight(self) -> Tensor:
        """Frozen weight as its layer stores it."""
        return _weight(self._innermost)

    @property
    def stored_weight(self) -> Tensor | None:
        """`base_weight`, or None where the layer keeps it in tensors of other names."""
        layer = self._innermost
        weight = layer._parameters.get("weight")
        return getattr(layer, "weight", None) if weight is None else weight

    @property
    def _innermost(self) -> Any:
        layer = self.module
        while (inner := layer._modules.get("base_layer")) is not None:
            layer = inner
        return layer

    @property
    def base_is_transposed(self) -> bool:
        """Return whether the frozen weight is stored as (n, m): GPT-2's Conv1D, and embeddings."""
        return self.is_embedding or bool(getattr(self.module, "fan_in_fan_out", False))

    @property
    def scaling(self) -> float:
        """PEFT's factor s in front of ``P Q^T``."""
        return float(self.module.scaling[self.adapter])

    @property
    def rank(self) -> int:
        """Rank r of the adapter."""
        return int(self.module.r[self.adapter])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the weight as a matrix."""
        return self.P_parameter.shape[0], self.Q_parameter.shape[1:].numel()

    @property
    def learned_rank(self) -> int:
        """Rank r plus the number of the carry's columns."""
        carry = self.carry
        return self.rank if carry is None else self.rank + carry.columns

    @property
    def has_variant(self) -> bool:
        """Return whether the layer computes more than a weight plus a low-rank product (DoRA)."""
        return self.adapter in self.module.lora_variant

    @property
    def is_merged(self) -> bool:
        """Return whether an adapter is merged into the base, which then is not the frozen one."""
        return bool(self.module.merged)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """Return the weight that the layer computes with, shaped as stored, float32 at least.

        A quantized base is dequantized.
        """
        base = self._wide_base()
        if self.is_merged:
            return base.clone()
        if self.has_variant:
            merged = self.module.lora_variant[self.adapter].merge_safe(
                self.module, self.adapter, base.clone()
            )
            self.module._caches.clear()
            return merged
        return base + self._product().to(base.dtype)

    @torch.no_grad()
    def learned_change(self) -> Tensor:
        """Return what adapter and carry add to the base weight, as stored, float32 at least."""
        if self.has_variant:
            return self.effective_weight() - self._wide_base()
        return self._product()

    def _wide_base(self) -> Tensor:
        """Return the base weight as stored, dequantized, float32 at least."""
        return _wide(dequantized(self.base_layer))

    def _product(self) -> Tensor:
        """Return ``s P Q^T``, carry included, as the base weight is stored.

        PEFT's own product is rounded to the factors' dtype; this one is not.
        """
        product = self.scaling * (self.learned_P @ self.learned_Q)
        if self.base_is_transposed:
            return product.T
        return product.view(self.P_parameter.shape[0], *self.Q_parameter.shape[1:])

    @property
    def runs(self) -> bool:
        """Return whether the layer's output has this adapter's contribution in it now."""
        return not self.is_switched_off and self.adapter in self.module.active_adapters

    @property
    def is_switched_off(self) -> bool:
        """Return whether all adapters of the layer are disabled."""
        return bool(self.module.disable_adapters)

    @property
    def base_layer(self) -> Any:
        """Layer of the model that PEFT's layer is around."""
        return self.module.get_base_layer()

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the base layer's outputs as (positions, m), with a convolution's channels last."""
        if isinstance(self.module, CONVOLUTIONS):
            outputs = outputs.movedim(1, -1)
        return outputs.flatten(0, -2)

    def code(self, inputs: Tensor, index: Tensor) -> Tensor:
        """Return ``learned_Q`` times the inputs at some positions, without dropout, in float32.

        Args:
            inputs: the layer's inputs.
            index: (k,), the positions.

        Returns:
            (k, c) with c the learned rank.
        """
        if isinstance(self.module, CONVOLUTIONS):
            # Not `mapped`: where the base is dilated or grouped, the adapter is not.
            convolution = self.module.lora_A[self.adapter]
            codes = self.rows(convolution(inputs.to(convolution.weight.dtype)))
            codes = codes[..., : self.learned_Q.shape[0]]
            return codes.index_select(0, index).float()
        return self.mapped(self.learned_Q.float(), inputs, index)

    def mapped(self, matrix: Tensor, inputs: Tensor, index: Tensor) -> Tensor:
        """Return a matrix times the inputs at some positions, in float32.

        Args:
            matrix: (d, n).
            inputs: the layer's inputs; a convolution's are the patches that its base layer sees.
            index: (k,), the positions.

        Returns:
            (k, d).
        """
        if isinstance(self.module, CONVOLUTIONS):
            base = self.base_layer
            kernel = matrix.reshape(-1, *base.weight.shape[1:])
            images = base._conv_forward(inputs.float(), kernel, None)
            return self.rows(images).index_select(0, index)
        if self.is_embedding:
            return matrix.T[inputs.flatten().index_select(0, index)]
        return inputs.flatten(0, -2).index_select(0, index).float() @ matrix.T

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a stored base weight as a matrix (m, n)."""
        return weight.T if self.base_is_transposed else weight.flatten(1)

    def mark_rebased(self) -> None:
        """Note on PEFT's layer that this adapter's increments were folded into the base weight."""
        folded = folded_adapters(self.module)
        if self.adapter not in folded:
            self.module.scalora_folded = folded | {self.adapter}

    @property
    def was_rebased(self) -> bool:
        """Return whether increments of any adapter were folded into the base weight."""
        return bool(folded_adapters(self.module))

    @property
    def exists(self) -> bool:
        """Return whether the layer still has the adapter."""
        return self.adapter in self.module.r

    def claim(self, owner: object) -> None:
        """Note on PEFT's layer who re-bases the adapter from now on."""
        owners = getattr(self.module, "scalora_owners", {})
        self.module.scalora_owners = {**owners, self.adapter: owner}

    def belongs_to(self, owner: object) -> bool:
        """Return whether ``owner`` was the last to claim the adapter."""
        return getattr(self.module, "scalora_owners", {}).get(self.adapter) is owner


def folded_adapters(module: nn.Module) -> set[str]:
    """Return the adapters whose increments were folded into a layer's base, deleted ones too."""
    return set(getattr(module, "scalora_folded", ()))


def dequantized(base: Any) -> Tensor:
    """Return the weight of a base layer as it computes with it; the very weight if it is a float.

    Raises:
        ValueError: PEFT cannot dequantize layers of this kind.
    """
    weight = base._parameters.get("weight")
    unpack(base)
    try:
        found = dequantize_module_weight(base).detach()
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise ValueError(_cannot_dequantize(base)) from error
    finally:
        # On a CPU PEFT replaces an 8-bit layer's parameter by one without scales.
        if weight is not None and base.weight is not weight:
            base.weight = weight
    if not found.is_floating_point():
        raise ValueError(_cannot_dequantize(base))
    return found


def _cannot_dequantize(base: Any) -> str:
    return (
        f"the weight of a {type(base).__name__} cannot be dequantized by PEFT: pass base=, the "
        "pretrained model in full precision."
    )


def _weight(layer: nn.Module) -> Any:
    """Return ``layer.weight`` without the search of ``nn.Module.__getattr__``, which is slow.

    The search is for weights that are not plain parameters.  Every step asks this of every layer.
    """
    weight = layer._parameters.get("weight")
    return layer.weight if weight is None else weight


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor detached, in float32 or in its own dtype if that is wider."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
