"""Watches at one layer of an adapter: hooks of forward passes, which happen between the steps.

Held by tests/guards/test_watches.py and tests/integrations/test_stack_trl_references.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.peft_layers import LoRAPair
from scalora.warning import warn

_SAMPLE = 4096  # elements per tensor that are looked at: adapters are exchanged as a whole
_ROUND_OFF = 16  # in units of the dtype's epsilon: what taking back an average may leave
_OUTWEIGHS = 1e30  # times any change of the base, more than any of the factors


class _Lineage:
    """Counts the re-basings of a model; the model and all its copies share one."""

    def __init__(self, moves: int = 0) -> None:
        self.moves = moves

    def __deepcopy__(self, memo: Any) -> _Lineage:
        return self


@dataclass(frozen=True)
class _Left:
    """Samples of the layer as the newest step has left it.

    Attributes:
        samples: (elements,) of P and Q, then of the base weight, where increments go into it.
        factors: how many are of P and Q.
        base: dtype and number of those of the base weight.
        versions: version counters of P and Q.
        moves: re-basings of the lineage so far.
        is_sharded: whether the samples are of the rows of one process.
    """

    samples: Tensor
    factors: int
    base: tuple[torch.dtype | None, int]
    versions: tuple[int, int]
    moves: int
    is_sharded: bool


class FactorWatch:
    """Warns when factors are used that are not those that the newest step has left.

    Re-basing moves part of what the factors hold into the base weight or a carry.  Factors from
    another moment (the best of a run, kept in memory; an average; another adapter) do not fit what
    is there now, and nothing in PyTorch or PEFT can tell.

    In copies of a model, which no step of its optimizer reaches, it raises if the model was
    re-based since: an average of factors alone, for example, is no model.

    Where all weights were replaced together, the base among them, it is silent: a whole state was
    put back, or whole models were averaged.  A carry is in no state dict of the model.

    Args:
        pair: one layer of the adapter, which stands for all.
    """

    def __init__(self, pair: LoRAPair) -> None:
        self.pair = pair
        self._folds = False
        self._lineage = _Lineage()
        self._count = 0
        self._left: _Left | None = None
        self._is_copy = self._told = self._trained_by_another = False
        # The largest excess so far, () on an accelerator, and what has arrived of it on the host.
        self._worst: Tensor | None = None
        self._arrived: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_is_copy": True, "_worst": None, "_arrived": None}

    def begin(self, folds: bool) -> None:
        """Note the factors with which a new optimizer begins.

        Args:
            folds: whether the layer's increments go into its base weight.
        """
        self._folds, self._count, self._told = folds, 0, False
        self.note(0)

    def kept_tensors(self) -> list[Tensor]:
        """Return the samples that are kept between steps."""
        return [] if self._left is None else [self._left.samples]

    def suspend(self) -> None:
        """Expect nothing until the step that begins now is done; it may fail half way."""
        self._left = None

    def forget(self) -> None:
        """Expect nothing until the next step is done: another state was loaded."""
        self._left = self._worst = self._arrived = None

    @torch.no_grad()
    def note(self, count: int) -> None:
        """Note the factors as a step has left them.

        Args:
            count: re-basings so far.
        """
        if self._is_copy:  # which is trained by an optimizer of its own
            self._is_copy, self._lineage = False, _Lineage(self._lineage.moves)
        if count != self._count:
            self._count, self._lineage.moves = count, self._lineage.moves + 1
        samples, factors, base = self._sampled()
        self._left = _Left(
            samples,
            factors,
            base,
            self._versions(),
            self._lineage.moves,
            sharding.is_sharded(self.pair.P_parameter),
        )
        self._trained_by_another = False
        if self._worst is None and samples.device.type == "cuda":
            dtype = torch.promote_types(samples.dtype, torch.float32)
            self._worst = torch.zeros((), dtype=dtype, device=samples.device)
            self._arrived = torch.zeros((), dtype=dtype, device="cpu", pin_memory=True)

    def __call__(self, layer: nn.Module, args: Any) -> None:
        """Check the factors where a model is evaluated; a forward pre-hook of the layer."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        pair, left = self.pair, self._left
        if left is None or not pair.exists or not pair.runs or pair.is_merged:
            return
        # Not within torch.func, nor while a sharded layer is gathered to compute.
        if left.is_sharded or not isinstance(pair.P_parameter, nn.Parameter):
            return
        rewritten = self._versions() != left.versions
        if layer.training and torch.is_grad_enabled():
            self._trained_by_another |= rewritten
        elif not self._trained_by_another:
            # A copy may be a reference model, which runs in every step and is not written to.
            self.check(wait=self._is_copy and rewritten)

    @torch.no_grad()
    def check(self, *, wait: bool) -> None:
        """Warn if the factors are others; raise where a copy cannot be right.

        Args:
            wait: whether to wait for an accelerator.  Otherwise what it finds is said at the next
                check.

        Raises:
            ValueError: in a copy, whose model was re-based since it was made.
        """
        left = self._left
        if left is None or self._told or self._lineage.moves == 0 or not self.pair.exists:
            return
        if not self._differs(left, wait):
            return
        if self._is_copy and self._lineage.moves > left.moves:
            raise ValueError(self._refusal())
        self._told = True
        warn(self._message())

    def _differs(self, left: _Left, wait: bool) -> bool:
        found, factors, base = self._sampled()
        kept = left.samples
        if found.is_meta or (found.dtype, found.device) != (kept.dtype, kept.device):
            return False  # converted or moved: what was kept does not tell
        if factors != left.factors:
            return True
        if base != left.base or not factors or (self._folds and not base[1]):
            return False
        excess = self._excess(found, kept, factors)
        if wait or self._worst is None or self._arrived is None:
            return bool(excess > 0)
        arrived = bool(self._arrived > 0)
        torch.fmax(self._worst, excess, out=self._worst)
        self._arrived.copy_(self._worst, non_blocking=True)
        return arrived

    def _excess(self, found: Tensor, kept: Tensor, factors: int) -> Tensor:
        """Return by how much the factors differ beyond round-off: (), negative if the base does."""
        changed = found - kept
        parts = [changed[:factors], kept[:factors]]
        if self._folds:
            parts.append(changed[factors:])
        dtype = torch.promote_types(found.dtype, torch.float32)
        difference, span, *of_base = torch._foreach_norm(parts, torch.inf, dtype)
        round_off = _ROUND_OFF * torch.finfo(self.pair.P_parameter.dtype).eps
        excess = torch.sub(difference, span, alpha=round_off)
        return torch.sub(excess, of_base[0], alpha=_OUTWEIGHS) if of_base else excess

    def _sampled(self) -> tuple[Tensor, int, tuple[torch.dtype | None, int]]:
        """Return the samples, and as `_Left` describes them."""
        factors = [_sample(self.pair.P_parameter), _sample(self.pair.Q_parameter)]
        count = sum(sample.numel() for sample in factors)
        if not self._folds:
            return torch.cat(factors), count, (None, 0)
        base = _sample(self.pair.base_weight)
        return torch.cat([*factors, base]), count, (base.dtype, base.numel())

    def _versions(self) -> tuple[int, int]:
        return self.pair.P_parameter._version, self.pair.Q_parameter._version

    @property
    def _place(self) -> str:
        return "the base weights" if self._folds else "a carry beside the base weights"

    def _message(self) -> str:
        whole = "model.state_dict()" if self._folds else "optimizer.state_dict()"
        return (
            f"the factors of the adapter {self.pair.adapter!r} are not those that ScaLoRA left "
            f"(seen at {self.pair.name!r}): they were put back, exchanged or averaged, and what "
            f"ScaLoRA has put into {self._place} since was not. Unless they are from after the "
            "newest re-basing, this is neither the model they were taken from nor the one in "
            f"training. Keep and put back {whole} as well, or use scalora.save_training_state and "
            "load_training_state; load another adapter on the pretrained model."
        )

    def _refusal(self) -> str:
        return (
            f"this copy of the model has other factors than it was made with (seen at "
            f"{self.pair.name!r}), but what ScaLoRA has put into {self._place} of the model in "
            "training since did not reach it: an average or a copy of the factors alone is no "
            "model. Average or copy all parameters, with accumulator='dense' (an AveragedModel "
            "does), or copy the model anew with copy.deepcopy."
        )


class ReferenceWatch:
    """Notes forward passes in training mode that leave an adapter out.

    They look at the base alone.  One look may have any reason; the reference model of DPO is looked
    at before every step.

    Args:
        pair: a layer of the adapter, which is switched off where all are.
    """

    def __init__(self, pair: LoRAPair) -> None:
        self.pair = pair
        self._seen = self._seen_before = False

    def __call__(self, layer: nn.Module, args: Any) -> None:
        """Note one forward pass; a forward pre-hook of the layer."""
        if not layer.training or not self.pair.exists or self.pair.runs:
            return
        # With another adapter in its place, and gradients, that one is being trained.
        if self.pair.is_switched_off or not torch.is_grad_enabled():
            self._seen = True

    def check(self) -> None:
        """Raise a ValueError if there were such passes before this step and the one before it."""
        repeated = self._seen and self._seen_before
        self._seen, self._seen_before = False, self._seen and not repeated
        if repeated:
            raise ValueError(
                f"before this step and the one before it the model computed in training mode "
                f"without its adapter {self.pair.adapter!r}, as for the reference model of DPO. "
                "ScaLoRA folds increments into the base weights, so that reference would move. Use "
                "accumulator='carry', which is switched off with the adapter (in TRL's trainers "
                "ScaLoRACallback takes it by itself). To look at the base for another purpose, "
                "call model.eval() before. Nothing was changed in this step."
            )


def watch_factors(places: Mapping[LoRAPair, str]) -> FactorWatch | None:
    """Watch the factors of an adapter at one of its layers.

    Args:
        places: layer -> "dense" or "carry", where its increments go.

    Returns:
        The watch; None if no layer is re-based.
    """
    if not places:
        return None
    # A carry tells more: it is left behind even where a model's whole state is put back.  And of
    # an embedding, some columns may never change.
    pair = min(places, key=lambda pair: (places[pair] != "carry", pair.is_embedding))
    watch = _watch_at(pair, FactorWatch)
    watch.begin(places[pair] == "dense")
    return watch


def watch_reference(places: Mapping[LoRAPair, str]) -> ReferenceWatch | None:
    """Watch for looks at an adapter's base, if any increments go into base weights.

    Args:
        places: as for `watch_factors`.
    """
    return _watch_at(next(iter(places)), ReferenceWatch) if "dense" in places.values() else None


def check_factors(model: nn.Module) -> None:
    """Check every adapter of a model that is to be saved, as `FactorWatch.check` does."""
    for module in model.modules():
        for watch in _watches(module, FactorWatch):
            watch.check(wait=True)


_Watch = TypeVar("_Watch", FactorWatch, ReferenceWatch)


def _watch_at(pair: LoRAPair, kind: type[_Watch]) -> _Watch:
    """Return the watch of an adapter at a layer; all optimizers of that adapter share one."""
    for watch in _watches(pair.module, kind):
        if watch.pair.adapter == pair.adapter:
            return watch
    watch = kind(pair)
    pair.module.register_forward_pre_hook(watch)
    return watch


def _watches(module: nn.Module, kind: type[_Watch]) -> list[_Watch]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kind)]


def _sample(tensor: Tensor) -> Tensor:
    """Return the first elements held here, (elements,); a view where the memory allows it."""
    held = sharding.local(tensor).detach()
    width = max(1, held.shape[1:].numel())
    return held[: -(-_SAMPLE // width)].flatten()[:_SAMPLE]  # few rows: some have no flat view
