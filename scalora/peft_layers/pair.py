"""One adapter of one LoRA layer as the derivation's two matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layers
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from scalora import sharding
from scalora.carry import Carry
from scalora.peft_layers.carried import attach_carry, carry_of
from scalora.peft_layers.unpacking import unpack

CONVOLUTIONS = (lora_layers.Conv1d, lora_layers.Conv2d, lora_layers.Conv3d)


@dataclass(frozen=True)
class LoRAPair:
    """One adapter of one LoRA layer.  It holds the module and looks tensors up when asked.

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
        """Whether the layer is an embedding, whose factors PEFT keeps elsewhere."""
        return isinstance(self.module, lora_layers.Embedding)

    @property
    def P_parameter(self) -> nn.Parameter:
        """``lora_B``: (m, r) followed by ones (convolutions); axis 1 is the rank's."""
        if self.is_embedding:
            return self.module.lora_embedding_B[self.adapter]
        return _weight(self.module._modules["lora_B"]._modules[self.adapter])

    @property
    def Q_parameter(self) -> nn.Parameter:
        """``lora_A``: (r, n), or (r, in, *kernel) for convolutions; axis 0 is the rank's."""
        if self.is_embedding:
            return self.module.lora_embedding_A[self.adapter]
        return _weight(self.module._modules["lora_A"]._modules[self.adapter])

    @property
    def factor_modules(self) -> list[nn.Module]:
        """Those that hold and compute with the factors; an embedding has none of its own."""
        if self.is_embedding:
            return []
        return [self.module.lora_A[self.adapter], self.module.lora_B[self.adapter]]

    @property
    def carry(self) -> Carry | None:
        """The frozen increments beside the base, where the factors are; None before the first."""
        carry = carry_of(self.module, self.adapter)
        if carry is None:
            return None
        P = self.P_parameter
        return carry.on(P.device).among(sharding.rows_of(P))

    def ensure_carry(self, capacity: int) -> Carry:
        """The layer's carry with room for that many columns; an empty one if it has none."""
        carry = self.carry
        if carry is None:
            P, Q = self.P_parameter, self.Q_parameter
            dtype = torch.promote_types(torch.promote_types(P.dtype, Q.dtype), torch.float32)
            m, n = self.shape
            carry = Carry(m, n, capacity, P.device, dtype, sharding.rows_of(P))
            attach_carry(self.module, self.adapter, carry)
        if carry.capacity < capacity:
            carry.grow(capacity)
        return carry

    @property
    def learned_P(self) -> Tensor:
        """(m, r + columns of the carry): all that is learned beside the base, float32 at least.

        Of a carry that is dealt out, call it on every process.
        """
        P, carry = _wide(self.P_parameter).flatten(1), self.carry
        if carry is None:
            return P
        return torch.cat([P, carry.whole_up()[:, : carry.columns].to(P.dtype)], dim=1)

    @property
    def learned_Q(self) -> Tensor:
        """(r + columns of the carry, n): likewise."""
        Q, carry = _wide(self.Q_parameter).flatten(1), self.carry
        if carry is None:
            return Q
        return torch.cat([Q, carry.whole_down()[: carry.columns].to(Q.dtype)])

    def on_all_processes(self, flag: bool) -> bool:
        """Whether a flag is true on all processes that share the carry; they must all ask."""
        carry = self.carry
        if carry is None or carry.rows.processes == 1:
            return flag
        return bool(carry.rows.sum(torch.tensor(float(not flag), device=carry.cut.device)) == 0)

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight as its layer stores it."""
        layer = self.module
        while (inner := layer._modules.get("base_layer")) is not None:
            layer = inner
        return _weight(layer)

    @property
    def base_is_transposed(self) -> bool:
        """Whether the frozen weight is stored (n, m): GPT-2's Conv1D, and embeddings."""
        return self.is_embedding or bool(getattr(self.module, "fan_in_fan_out", False))

    @property
    def scaling(self) -> float:
        """PEFT's ``s``."""
        return float(self.module.scaling[self.adapter])

    @property
    def rank(self) -> int:
        """The adapter's r."""
        return int(self.module.r[self.adapter])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight, as a matrix."""
        return self.P_parameter.shape[0], self.Q_parameter.shape[1:].numel()

    @property
    def learned_rank(self) -> int:
        """r, and the columns of the carry."""
        carry = self.carry
        return self.rank if carry is None else self.rank + carry.columns

    @property
    def has_variant(self) -> bool:
        """Whether the layer computes more than a weight plus a low-rank product (DoRA)."""
        return self.adapter in self.module.lora_variant

    @property
    def is_merged(self) -> bool:
        """Whether an adapter is merged into the base, which then is not W0."""
        return bool(self.module.merged)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The weight the layer computes with, as stored, float32 at least.

        Of a quantized base: dequantized.
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
        """What the adapter and its carry add to the base weight, as stored, float32 at least."""
        if self.has_variant:
            return self.effective_weight() - self._wide_base()
        return self._product()

    def _wide_base(self) -> Tensor:
        return _wide(dequantized(self.module.get_base_layer()))

    def _product(self) -> Tensor:
        """As the base weight is stored.  PEFT's own product is rounded to the factors' dtype."""
        product = self.scaling * (self.learned_P @ self.learned_Q)
        if self.base_is_transposed:
            return product.T
        return product.view(self.P_parameter.shape[0], *self.Q_parameter.shape[1:])

    @property
    def runs(self) -> bool:
        """Whether the layer's output has this adapter's contribution in it now."""
        module = self.module
        return not module.disable_adapters and self.adapter in module.active_adapters

    def rows(self, outputs: Tensor) -> Tensor:
        """The base layer's outputs as (positions, m): a convolution's have the channels inside."""
        if isinstance(self.module, CONVOLUTIONS):
            outputs = outputs.movedim(1, -1)
        return outputs.flatten(0, -2)

    def code(self, inputs: Tensor, index: Tensor) -> Tensor:
        """(k, c): what ``learned_Q`` makes of the inputs there, without dropout, float32."""
        if isinstance(self.module, CONVOLUTIONS):
            # Not `mapped`: where the base is dilated or grouped, the adapter is not.
            convolution = self.module.lora_A[self.adapter]
            codes = self.rows(convolution(inputs.to(convolution.weight.dtype)))
            codes = codes[..., : self.learned_Q.shape[0]]
            return codes.index_select(0, index).float()
        return self.mapped(self.learned_Q.float(), inputs, index)

    def mapped(self, matrix: Tensor, inputs: Tensor, index: Tensor) -> Tensor:
        """(k, d): a matrix (d, n) times the inputs at those positions, float32.

        A convolution's inputs are the patches that its base layer sees.
        """
        if isinstance(self.module, CONVOLUTIONS):
            base = self.module.get_base_layer()
            kernel = matrix.reshape(-1, *base.weight.shape[1:])
            images = base._conv_forward(inputs.float(), kernel, None)
            return self.rows(images).index_select(0, index)
        if self.is_embedding:
            return matrix.T[inputs.flatten().index_select(0, index)]
        return inputs.flatten(0, -2).index_select(0, index).float() @ matrix.T

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A stored base weight as (m, n)."""
        return weight.T if self.base_is_transposed else weight.flatten(1)

    def mark_rebased(self) -> None:
        """Note on the layer itself that its base has taken in increments."""
        noted = getattr(self.module, "scalora_folded", ())
        if self.adapter not in noted:
            self.module.scalora_folded = {*noted, self.adapter}

    @property
    def was_rebased(self) -> bool:
        """Whether increments have been folded into the layer's base."""
        return bool(getattr(self.module, "scalora_folded", ()))

    @property
    def exists(self) -> bool:
        """Whether the layer still has the adapter."""
        return self.adapter in self.module.r

    def claim(self, owner: object) -> None:
        """Note on the layer itself who re-bases it from now on."""
        owners = getattr(self.module, "scalora_owners", {})
        self.module.scalora_owners = {**owners, self.adapter: owner}

    def belongs_to(self, owner: object) -> bool:
        """Whether nobody else has claimed it since."""
        return getattr(self.module, "scalora_owners", {}).get(self.adapter) is owner


def dequantized(base: Any) -> Tensor:
    """The weight of a base layer as it computes with it; the very weight where it is a float.

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
        # On a CPU PEFT leaves an 8-bit layer with another parameter, which has lost its scales.
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
    """``layer.weight``, without the search of ``nn.Module.__getattr__``: every layer's every step.

    One that is not a plain parameter is found by that search.
    """
    weight = layer._parameters.get("weight")
    return layer.weight if weight is None else weight


def _wide(tensor: Tensor) -> Tensor:
    """Float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
