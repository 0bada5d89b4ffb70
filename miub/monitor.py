"""Forward hooks that estimate the mutual information of each LoRA layer's two paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from miub.bounds import FEWEST_TOKENS, Bounds
from miub.estimators import Estimate
from miub.forward_pass import ForwardPass
from miub.layers import measured_pairs, refuse_merged
from miub.masks import Masks
from miub.measurement import Measurement, fetched
from miub.processes import gathered, process_rank
from miub.report.report import MIUBReport
from miub.report.rows import LayerRecord
from scalora.saving.pretrained import Base, pretrained_weights
from scalora.warning import warn


class MIUBMonitor:
    """Measures how much each LoRA layer leans on the frozen model, while the model runs.

    ::

        monitor = MIUBMonitor(model, every=50)
        with monitor:
            train(...)
        print(monitor.report())

    On every ``every``-th forward pass of ``model``, each LoRA layer's inputs and its base layer's
    outputs are sampled at random tokens, and the mutual information between the frozen path and the
    adapter's is bounded at once, on their device; only scalars are kept.  Between these passes no
    layer has a hook.  The script's random numbers and results stay as they are, with one exception:
    a compiled model runs uncompiled in the passes that are measured, so its results there are as
    exact, not the same bits.  Compiled blocks inside gradient checkpointing are not supported: the
    checkpoint would compare them with their uncompiled selves.

    Padding is left out by the ``attention_mask`` that the model is called with.  The decoder of an
    encoder is masked by ``decoder_attention_mask``, else by the labels that count (not -100 and not
    padding), else by the padding among the decoder's inputs.

    Args:
        model: with a PEFT LoRA adapter; itself or a wrapper (DDP) that is called in its place.
        every: measure on every ``every``-th forward pass; the first is number ``every``.
        tokens: the number of tokens to sample, at least 16.
        estimator: a name of `miub.estimators.ESTIMATORS`, or a function of its kind:
            ``(u, v, *, noise) -> Estimate`` for u (N, d_u), v (N, coordinates).
        noise: tau of the noise model, see docs/miub.md, "What is measured".
        adapter_name: None: every adapter that is active when a layer runs.
        reference: the pretrained model, its state dict, its folder or hub id.  For layers into
            whose base increments were folded, the two paths are then the pretrained weight's and
            that of all that was learned since, in at most 64 coordinates; without it these layers
            are flagged in the report, since part of what was learned counts as frozen.  Weights on
            another device are copied at each measurement, which waits; a model is used where it is.
        seed: of the sample.

    Attributes:
        step: the number of the last forward pass.

    Raises:
        ValueError: an argument out of range, an unknown estimator, no LoRA layer that can be
            measured, or an adapter that is merged into the base.
        TypeError: a model or an estimator of another type.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        tokens: int = 512,
        estimator: str | Callable[..., Estimate] = "tempered",
        noise: float = 0.01,
        *,
        adapter_name: str | None = None,
        reference: Base | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch module, got {type(model).__name__}.")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        if tokens < FEWEST_TOKENS:
            raise ValueError(f"tokens must be at least {FEWEST_TOKENS}, got {tokens}.")
        self.model = model
        self.every = every
        self.tokens = tokens
        self.estimator = estimator
        self.noise = noise
        self.seed = seed
        self.step = 0
        self._bounds = Bounds(estimator, noise)
        self._pairs = measured_pairs(model, adapter_name)
        self._reference = None if reference is None else pretrained_weights(model, reference)
        self._hooks: list[RemovableHandle] = []
        self._pass: ForwardPass | None = None
        self._once = False
        self._pending: list[Measurement] = []
        self._records: list[tuple[int, LayerRecord]] = []
        self._unmeasured: set[str] = set()
        self._heavy: set[str] = set()

    def __enter__(self) -> MIUBMonitor:
        self.attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def attach(self) -> None:
        """Begin to count the model's forward passes; ``with monitor:`` does it.

        Raises:
            ValueError: it does already, or an adapter is merged.
        """
        if self._hooks:
            raise ValueError("this monitor is attached already; leave its with block first.")
        refuse_merged(self._pairs)
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        """Take all hooks off; measurements stay, and the monitor can be attached again."""
        self._end_pass()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._once = False

    def measure_next(self, step: int) -> None:
        """Measure in the next forward pass, whatever its number, and call it ``step``."""
        if not self._hooks:
            self.attach()
        self._once = True
        self.step = step - 1

    def reset(self) -> None:
        """Forget all measurements, and count from the beginning."""
        self.step = 0
        self._pending, self._records = [], []

    def report(self) -> MIUBReport:
        """Return the report on all measurements so far; the first moment to wait for the device.

        With several processes each of them has to call it: the report is of all ranks' tokens.

        Raises:
            ValueError: nothing was measured.
        """
        return self._report_of(self._gathered())

    def report_if_any(self) -> MIUBReport | None:
        """Return what `report` does, or None if nothing was measured on any process."""
        records = self._gathered()
        return self._report_of(records) if records else None

    def _report_of(self, records: Sequence[LayerRecord]) -> MIUBReport:
        return MIUBReport(records, estimator=self._bounds.name, noise=self.noise)

    def _gathered(self) -> list[LayerRecord]:
        """Return the records of all processes, each layer's together and in the order of steps."""
        new = fetched(self._pending)
        self._warn_heavy([record for _, record, heaviest in new if heaviest])
        for place, record, _ in new:
            if record.tokens < FEWEST_TOKENS:  # of a mask that could not be counted before
                self._warn_unmeasured(record.layer, record.tokens, FEWEST_TOKENS)
            else:
                self._records.append((place, record))
        self._pending = []
        records = gathered(self._records)
        # Python's sort keeps the order of what is equal: by step within a layer.
        records.sort(key=lambda placed: placed[0])
        return [record for _, record in records]

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step += 1
        if not self._once and self.step % self.every:
            return
        refuse_merged(self._pairs)
        self._pass = ForwardPass(
            Masks(model, args, kwargs),
            self._bounds,
            tokens=self.tokens,
            step=self.step,
            seed=hash((self.seed, process_rank(), self.step)) % 2**63,
            reference=self._reference,
        )
        self._pass.begin(model, self._pairs)

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._pass is None:
            return
        self._end_pass()
        if self._once:
            self.detach()

    def _end_pass(self) -> None:
        if self._pass is None:
            return
        ended, self._pass = self._pass, None
        ended.end()
        self._pending += ended.measurements
        for layer, tokens, needed in ended.too_few:
            self._warn_unmeasured(layer, tokens, needed)

    def _warn_heavy(self, records: Sequence[LayerRecord]) -> None:
        layers = list(dict.fromkeys(record.layer for record in records))
        layers = [layer for layer in layers if layer not in self._heavy]
        self._heavy.update(layers)
        if layers:
            warn(
                f"in {len(layers)} layers, {layers[0]!r} for one, a single token holds more than a "
                "tenth of the variance of the samples; estimates from their moments mean little "
                "there, and bound nothing."
            )

    def _warn_unmeasured(self, layer: str, tokens: int, needed: int) -> None:
        if layer not in self._unmeasured:
            self._unmeasured.add(layer)
            warn(
                f"{layer!r} had {tokens} tokens in a forward pass; {needed} are needed, so it was "
                "not measured."
            )
