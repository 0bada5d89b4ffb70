"""Forward hooks that estimate the mutual information of every LoRA layer's two paths."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from miub.estimators import ESTIMATORS, Estimate
from miub.estimators.bracket import bracket
from miub.estimators.crossfit import fewest_in_a_half
from miub.estimators.estimate import is_heavy
from miub.estimators.infonce import infonce
from miub.masks import Masks
from miub.paths import MOST_COORDINATES, adapter_code, learned_since
from miub.processes import gathered, process_rank
from miub.report.record import LayerRecord
from miub.report.report import MIUBReport
from miub.token_sample import Draw, draw
from scalora.peft_layers import (
    LoRAPair,
    adapter_names,
    lora_pairs,
    why_not_measured,
)
from scalora.saving.pretrained import Base, pretrained_weights
from scalora.transformers_models import decoder_of
from scalora.warning import warn

_FEWEST = 16
_ORDERS = {"tempered": 0.5, "gaussian": 1.0}
# Where the base does not compress, what it knows of the adapter's code is limited by the noise
# alone, and so is the penalty; elsewhere leaving one out chooses.
_NOISE_ALONE = (0.0,)
_FEW_PENALTIES = (0.0, 0.03, 0.3, 3.0)


@dataclass(frozen=True)
class _Measurement:
    """One layer at one step; numbers that are still on the device."""

    place: int
    layer: str
    adapter: str
    step: int
    rank: int
    numbers: Tensor  # value, stderr, lower, tokens, largest share of a sample
    rebased: bool


class MIUBMonitor:
    """Measures how much every LoRA layer leans on the frozen model, while the model runs.

    ::

        monitor = MIUBMonitor(model, every=50)
        with monitor:
            train(...)
        print(monitor.report())

    At every so manieth forward pass of ``model``, each LoRA layer's inputs and its base layer's
    outputs are sampled at random tokens, and the mutual information between the frozen path and the
    adapter's is bounded at once, on their device; only scalars are kept.  Between these passes no
    layer has a hook.  The script's random numbers and results are not touched, but for one thing: a
    compiled model runs uncompiled in the passes that are measured, so its results there are as
    exact, not the same bits.  Compiled blocks inside gradient checkpointing are not supported: the
    checkpoint would compare them with their uncompiled selves.

    Padding is left out by the ``attention_mask`` that the model is called with.  What an encoder's
    decoder reads is masked by ``decoder_attention_mask``, else by the labels that count (not -100
    and not padding), else by the padding among the decoder's inputs.

    Args:
        model: with a PEFT LoRA adapter; itself or a wrapper (DDP) that is called in its place.
        every: measure in every so many forward passes; the first is number ``every``.
        tokens: how many to draw, at least 16.
        estimator: a name of `miub.estimators.ESTIMATORS`, or a function of its kind:
            ``(u, v, *, noise) -> Estimate`` for u (N, d_u), v (N, r).
        noise: tau of the noise model (section 5 of the derivation).
        adapter_name: None: every adapter that is active when a layer runs.
        reference: the pretrained model, its state dict, its folder or hub id.  For layers into
            whose base increments were folded, the two paths are then the pretrained weight's and
            that of all that was learned since, in at most 64 coordinates; without it these layers
            are flagged in the report, since part of what was learned counts as frozen.  Weights on
            another device are copied at each measurement, which waits; a model is used where it is.
        seed: of the draw.

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
        if tokens < _FEWEST:
            raise ValueError(f"tokens must be at least {_FEWEST}, got {tokens}.")
        if not 0 <= noise < float("inf"):
            raise ValueError(f"noise must be finite and at least 0, got {noise}.")
        if not callable(estimator) and estimator not in ESTIMATORS:
            raise ValueError(
                f"estimator must be one of {sorted(ESTIMATORS)} or a function, got {estimator!r}."
            )
        self.model = model
        self.every = every
        self.tokens = tokens
        self.estimator = estimator
        self.noise = noise
        self.seed = seed
        self.step = 0
        self._pairs = _measured_pairs(model, adapter_name)
        self._reference = None if reference is None else pretrained_weights(model, reference)
        self._root_hooks: list[RemovableHandle] = []
        self._layer_hooks: list[RemovableHandle] = []
        self._eager = contextlib.ExitStack()
        self._once = False
        self._pending: list[_Measurement] = []
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
        if self._root_hooks:
            raise ValueError("this monitor is attached already; leave its with block first.")
        self._check_merged()
        self._root_hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        """Take all hooks off.  What was measured stays, and the monitor can be attached again."""
        self._leave_layers()
        for hook in self._root_hooks:
            hook.remove()
        self._root_hooks = []
        self._once = False

    def measure_next(self, step: int) -> None:
        """Measure in the next forward pass, whatever its number, and call it ``step``."""
        if not self._root_hooks:
            self.attach()
        self._once = True
        self.step = step - 1

    def reset(self) -> None:
        """Forget what was measured, and count from the beginning."""
        self.step = 0
        self._pending, self._records = [], []

    def report(self) -> MIUBReport:
        """What was measured so far.  The first moment that waits for the device.

        With several processes every one has to call it: the report is of all ranks' tokens.

        Raises:
            ValueError: nothing was measured.
        """
        fetched = _fetch(self._pending)
        self._warn_heavy([record for _, record, heaviest in fetched if heaviest])
        for place, record, _ in fetched:
            if record.tokens < _FEWEST:  # of a mask that could not be counted before
                self._warn_unmeasured(record.layer, record.tokens, _FEWEST)
            else:
                self._records.append((place, record))
        self._pending = []
        records = gathered(self._records)
        # Python's sort keeps the order of what is equal: by step within a layer.
        records.sort(key=lambda placed: placed[0])
        name = self.estimator if isinstance(self.estimator, str) else _name(self.estimator)
        return MIUBReport([record for _, record in records], estimator=name, noise=self.noise)

    def _check_merged(self) -> None:
        merged = [pair.name for pair in self._pairs if pair.is_merged]
        if merged:
            raise ValueError(
                f"the adapter of {merged[0]!r} is merged into its base weight, where the two paths "
                "cannot be told apart; call model.unmerge_adapter() first."
            )

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step += 1
        if not self._once and self.step % self.every:
            return
        self._check_merged()
        masks = Masks(model, args, kwargs)
        pass_ = _ForwardPass(self, masks)
        # A compiled model would not see hooks that were not there when it was compiled.
        self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        bases: dict[nn.Module, list[tuple[int, LoRAPair]]] = {}
        for place, pair in enumerate(self._pairs):
            bases.setdefault(pair.module.get_base_layer(), []).append((place, pair))
        self._layer_hooks = [
            base.register_forward_hook(pass_.hook(pairs)) for base, pairs in bases.items()
        ]
        decoder = decoder_of(model)
        if decoder is not None:
            begins = decoder.register_forward_pre_hook(masks.decoder_begins, with_kwargs=True)
            self._layer_hooks.append(begins)

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if not self._layer_hooks:
            return
        self._leave_layers()
        if self._once:
            self.detach()

    def _leave_layers(self) -> None:
        # A checkpointed layer runs again in the backward pass: by then its hook is gone.
        for hook in self._layer_hooks:
            hook.remove()
        self._layer_hooks = []
        self._eager.close()

    @property
    def _fits_on_halves(self) -> bool:
        """Whether the estimator may fit on one half of the samples; functions may as well."""
        return not isinstance(self.estimator, str) or self.estimator not in _ORDERS

    def _estimate(self, pair: LoRAPair, u: Tensor, v: Tensor) -> tuple[Estimate, Tensor]:
        if isinstance(self.estimator, str) and self.estimator in _ORDERS:
            compresses = u.shape[-1] < _inputs(pair) and u.shape[-1] >= u.shape[-2]
            upper, lower = bracket(
                u,
                v,
                noise=self.noise,
                order=_ORDERS[self.estimator],
                penalties=_FEW_PENALTIES if compresses else _NOISE_ALONE,
                overwrite=True,
            )
            return upper, lower.value
        function = ESTIMATORS[self.estimator] if isinstance(self.estimator, str) else self.estimator
        # Without its warning: the report gives it, for samples on any device.
        function = inspect.unwrap(function)
        upper = function(u, v, noise=self.noise)
        lower = upper if function is infonce else infonce(u, v, noise=self.noise)
        return upper, lower.value

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

    def _needed(self, coordinates: int) -> int:
        """How many tokens, for a learned path of so many coordinates."""
        if self._fits_on_halves and self.noise == 0:
            return max(_FEWEST, 2 * fewest_in_a_half(coordinates))
        return _FEWEST

    def _warn_unmeasured(self, layer: str, rows: int, needed: int) -> None:
        if layer not in self._unmeasured:
            self._unmeasured.add(layer)
            warn(
                f"{layer!r} had {rows} tokens in a forward pass; {needed} are needed, so it was "
                "not measured."
            )


class _ForwardPass:
    """One forward pass that is measured: all layers of one shape share the draw of tokens."""

    def __init__(self, monitor: MIUBMonitor, masks: Masks) -> None:
        self.monitor = monitor
        self.masks = masks
        self.seed = (monitor.seed, process_rank(), monitor.step).__hash__() % 2**63
        self.generators: dict[torch.device, torch.Generator] = {}
        self.draws: dict[tuple[str, torch.Size, torch.device], Draw] = {}

    def hook(self, pairs: Sequence[tuple[int, LoRAPair]]) -> Callable[..., None]:
        def measure(base: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # In the script's own precision the samples would be rounded.  Selective checkpointing
            # is a dispatch mode: it would keep our products and give them to the backward pass.
            precise = torch.autocast(output.device.type, enabled=False)
            with torch.no_grad(), precise, _disable_current_modes():
                for place, pair in pairs:
                    if pair.runs:
                        self.measure(place, pair, args[0].detach(), output.detach())

        return measure

    def measure(self, place: int, pair: LoRAPair, inputs: Tensor, output: Tensor) -> None:
        monitor = self.monitor
        rows = pair.rows(output)
        leading = output.shape[:-1] if rows.shape[-1] == output.shape[-1] else rows.shape[:1]
        drawn = self.draw(inputs, leading, output.device)
        index = drawn.index
        since = monitor._reference is not None and pair.was_rebased
        needed = monitor._needed(MOST_COORDINATES if since else pair.learned_rank)
        if not pair.on_all_processes(len(index) >= needed):
            monitor._warn_unmeasured(pair.name, len(index), needed)
            return
        # The code first: its inputs are let go before the outputs' samples take their place.
        v = output if since else adapter_code(pair, inputs, index)
        u = rows.index_select(0, index).float()
        if since:
            assert monitor._reference is not None
            generator = self.generator(output.device)
            u, v = learned_since(pair, monitor._reference, inputs, u, index, generator)
        upper, lower = monitor._estimate(pair, drawn.fill(u), drawn.fill(v))
        # Filled on the device: a copy from the host would wait for it.
        count = drawn.count if isinstance(drawn.count, Tensor) else u.new_full((), drawn.count)
        heaviest = u.new_zeros(()) if upper.heaviest is None else upper.heaviest
        numbers = (upper.value, upper.stderr, lower, count, heaviest)
        monitor._pending.append(
            _Measurement(
                place=place,
                layer=pair.name,
                adapter=pair.adapter,
                step=monitor.step,
                rank=v.shape[-1] if since else pair.learned_rank,
                numbers=torch.stack([number.float() for number in numbers]),
                rebased=pair.was_rebased and not since,
            )
        )

    def draw(self, inputs: Tensor, leading: torch.Size, device: torch.device) -> Draw:
        whose, mask = self.masks.of(inputs, leading)
        key = (whose, leading, device)
        if key not in self.draws:
            generator = self.generator(device)
            drawn = draw(mask, leading.numel(), self.monitor.tokens, device, generator)
            self.draws[key] = drawn.dealt() if self.monitor._fits_on_halves else drawn
        return self.draws[key]

    def generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


def _measured_pairs(model: nn.Module, adapter_name: str | None) -> list[LoRAPair]:
    names = sorted(adapter_names(model)) if adapter_name is None else [adapter_name]
    every = [pair for name in names for pair in lora_pairs(model, name)]
    if not every:
        what = "no LoRA layer" if adapter_name is None else f"no LoRA adapter {adapter_name!r}"
        raise ValueError(f"the model has {what}; make it with peft.get_peft_model.")
    reasons = {pair.name: why_not_measured(pair) for pair in every}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    pairs = [pair for pair in every if pair.name not in left_out]
    if not pairs:
        name, reason = next(iter(left_out.items()))
        raise ValueError(f"no LoRA layer can be measured, {name!r} for one: {reason}.")
    if left_out:
        name, reason = next(iter(left_out.items()))
        warn(f"{len(left_out)} LoRA layers are not measured, {name!r} for one: {reason}.")
    return pairs


def _inputs(pair: LoRAPair) -> int:
    return pair.Q_parameter[0].numel()


def _name(estimator: Callable[..., Estimate]) -> str:
    return getattr(estimator, "__name__", type(estimator).__name__)


def _fetch(pending: Sequence[_Measurement]) -> list[tuple[int, LayerRecord, bool]]:
    """With the place of each layer in the model, and whether a single token decides its moments.

    One transfer for each device.
    """
    devices = {measurement.numbers.device for measurement in pending}
    numbers: dict[int, list[float]] = {}
    for device in devices:
        there = [i for i, m in enumerate(pending) if m.numbers.device == device]
        fetched = torch.stack([pending[i].numbers for i in there]).tolist()
        numbers.update(zip(there, fetched, strict=True))
    return [
        (
            m.place,
            LayerRecord(
                layer=m.layer,
                adapter=m.adapter,
                step=m.step,
                rank=m.rank,
                value=numbers[i][0],
                stderr=numbers[i][1],
                lower=numbers[i][2],
                tokens=int(numbers[i][3]),
                rebased=m.rebased,
            ),
            is_heavy(numbers[i][4], max(int(numbers[i][3]), 1)),
        )
        for i, m in enumerate(pending)
    ]
