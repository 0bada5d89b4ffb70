"""One forward pass that is measured.

Held by tests/miub/test_monitor.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from miub.bounds import Begun, Bounds, together
from miub.masks import Masks
from miub.measurement import Measurement
from miub.paths import MOST_COORDINATES, adapter_code, learned_since
from miub.token_sample import TokenSample, sample_tokens
from scalora.autocast import without_autocast
from scalora.peft_layers import LoRAPair
from scalora.transformers_models import decoder_of


@dataclass
class _Group:
    """Layers whose bounds are begun and that are evaluated together, as they have one shape."""

    layers: list[tuple[int, LoRAPair, bool]] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)


class ForwardPass:
    """Hooks on the layers of a model for one forward pass, and their measurements.

    All layers with the same positions share one sample of tokens.  A layer's samples are let go
    when its hook returns; what is left of them is evaluated together with that of other layers.

    Args:
        masks: of the pass.
        bounds: of each layer.
        tokens: the number to sample.
        step: the number of the pass.
        seed: of the sample.
        reference: name -> pretrained weight, for layers into whose base increments were folded.

    Attributes:
        measurements: complete once the pass has ended.
        too_few: of each layer that was not measured its name, its tokens and the fewest it needs.
    """

    def __init__(
        self,
        masks: Masks,
        bounds: Bounds,
        *,
        tokens: int,
        step: int,
        seed: int,
        reference: Mapping[str, Tensor] | None,
    ) -> None:
        self.measurements: list[Measurement] = []
        self.too_few: list[tuple[str, int, int]] = []
        self._masks = masks
        self._bounds = bounds
        self._tokens = tokens
        self._step = step
        self._seed = seed
        self._reference = reference
        self._generators: dict[torch.device, torch.Generator] = {}
        self._samples: dict[tuple[str, torch.Size, torch.device], TokenSample] = {}
        self._groups: dict[tuple[int, int, torch.device], _Group] = {}
        self._hooks: list[RemovableHandle] = []
        self._eager = contextlib.ExitStack()

    def begin(self, model: nn.Module, pairs: Sequence[LoRAPair]) -> None:
        """Put hooks on the base layers of the pairs."""
        # A compiled model would not see hooks that were not there when it was compiled.
        self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        bases: dict[nn.Module, list[tuple[int, LoRAPair]]] = {}
        for place, pair in enumerate(pairs):
            bases.setdefault(pair.module.get_base_layer(), []).append((place, pair))
        self._hooks = [base.register_forward_hook(self._hook(own)) for base, own in bases.items()]
        decoder = decoder_of(model)
        if decoder is not None:
            begins = self._masks.decoder_begins
            self._hooks.append(decoder.register_forward_pre_hook(begins, with_kwargs=True))

    def end(self) -> None:
        """Take the hooks off, and complete the measurements.

        A checkpointed layer runs again in the backward pass: by then its hook is gone.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._eager.close()
        for key in list(self._groups):
            with _aside():
                self._finish(key)

    def _hook(self, pairs: Sequence[tuple[int, LoRAPair]]) -> Callable[..., None]:
        def measure(base: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            with _aside():
                for place, pair in pairs:
                    if pair.runs:
                        self._measure(place, pair, args[0].detach(), output.detach())

        return measure

    def _measure(self, place: int, pair: LoRAPair, inputs: Tensor, output: Tensor) -> None:
        positions = pair.rows(output)
        outputs = positions.shape[-1]
        leading = output.shape[:-1] if outputs == output.shape[-1] else positions.shape[:1]
        sample = self._sample(inputs, leading, output.device)
        index = sample.index
        since = self._reference if pair.was_rebased else None
        coordinates = pair.learned_rank if since is None else MOST_COORDINATES
        needed = self._bounds.fewest_tokens(coordinates)
        if not pair.on_all_processes(len(index) >= needed):
            self.too_few.append((pair.name, len(index), needed))
            return
        if since is None:
            v = sample.fill(adapter_code(pair, inputs, index))
            columns = sample.columns_of(positions)
        else:
            u = positions.index_select(0, index).float()
            generator = self._generator(output.device)
            u, v = learned_since(pair, since, inputs, u, index, generator)
            u, v = sample.fill(u), sample.fill(v)
            columns = _slices(u)
        coordinates = v.shape[-1]  # fewer than were learned where the layer has fewer outputs
        # Filled on the device: a copy from the host would wait for it.
        count = sample.count if isinstance(sample.count, Tensor) else v.new_full((), sample.count)
        key = (len(index), coordinates, output.device)
        group = self._groups.setdefault(key, _Group())
        group.layers.append((place, pair, pair.was_rebased and since is None))
        group.begun.append(self._bounds.begun(columns, outputs, pair.shape[1], v))
        group.counts.append(count.float())
        if len(group.begun) >= together(coordinates):
            self._finish(key)

    def _finish(self, key: tuple[int, int, torch.device]) -> None:
        group = self._groups.pop(key)
        upper, lower = self._bounds.finished(group.begun)
        count = torch.stack(group.counts)
        heaviest = torch.zeros_like(count) if upper.heaviest is None else upper.heaviest
        columns = (upper.value, upper.stderr, lower.value, count, heaviest)
        numbers = torch.stack([column.float() for column in columns], -1)
        for (place, pair, rebased), own in zip(group.layers, numbers.unbind(), strict=True):
            self.measurements.append(
                Measurement(
                    place=place,
                    layer=pair.name,
                    adapter=pair.adapter,
                    step=self._step,
                    coordinates=key[1],
                    numbers=own,
                    rebased=rebased,
                )
            )

    def _sample(self, inputs: Tensor, leading: torch.Size, device: torch.device) -> TokenSample:
        whose, mask = self._masks.of(inputs, leading)
        key = (whose, leading, device)
        if key not in self._samples:
            generator = self._generator(device)
            sample = sample_tokens(mask, leading.numel(), self._tokens, device, generator)
            halves = self._bounds.fits_on_halves
            self._samples[key] = sample.interleaved() if halves else sample
        return self._samples[key]

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Compute beside the script: in full precision, without gradients, unseen by its modes.

    In the script's own precision the samples would be rounded.  Selective checkpointing is a
    dispatch mode: it would keep our products and give them to the backward pass.
    """
    with torch.no_grad(), without_autocast(), _disable_current_modes():
        yield


def _slices(u: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, end: u[:, start:end]
