"""The optimizer wrapper: an inner optimizer that re-bases LoRA layers as it steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalora import peft_layers, sharding
from scalora.guards.base_watch import BaseWatch, watch_base
from scalora.guards.empty_step import only_makes_state
from scalora.guards.engines import check_engine, check_processes
from scalora.guards.factor_watch import FactorWatch
from scalora.guards.gradients import can_skip, not_finite, step_unless
from scalora.guards.reference_model import check_reference
from scalora.guards.stale_layers import checked_factors, warn_without_gradients, watched_factors
from scalora.moments import moments_of
from scalora.optimizer_wrapper import (
    OptimizerWrapper,
    calls_global_hooks_once,
    calls_load_state_dict_hooks,
    calls_state_dict_hooks,
    check_inner,
)
from scalora.options import Accumulator, RebasingOptions, Rounding, Rule, WhenFull
from scalora.peft_layers import LoRAPair
from scalora.rebasing.rebaser import Rebaser
from scalora.rebasing.report import RebasingReport, rebasing_report
from scalora.rebasing.selection import places_of_layers
from scalora.resuming.encoding import packed, unpacked
from scalora.resuming.run_state import RunState
from scalora.resuming.same_run import ExpectedWeights
from scalora.step_length.calibration import StepCalibration
from scalora.step_length.rates import highest_rate
from scalora.warning import warn


class ScaLoRA(OptimizerWrapper):
    """Steps an optimizer over LoRA parameters and re-bases the LoRA layers while it trains.

    By default ``lora_B`` decays into the weight: before a step in every ``interval``, what the
    adapter has learned more than ``memory`` steps ago is frozen, and the optimizer's moments are
    carried into the new coordinates exactly (`scalora.scaling.memory`).  The first steps find how
    long a step should be (`scalora.step_length.calibration`).  The paper's rules rescale the
    columns of both factors by the amounts that bring the coming step closest to the full
    fine-tuning step.

    Whatever is frozen is folded into the base weight, or kept beside it where that is quantized, so
    the model's function does not change.  The frozen increments add up to a rank far above the
    adapter's (ScaLoRA, arXiv 2510.23818; docs/mathematics.md).

    One line of a training script changes::

        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)                         # before
        optimizer = scalora.ScaLoRA(torch.optim.AdamW(model.parameters(), lr=2e-4), model)  # after

    ``param_groups``, ``state`` and ``defaults`` are the inner optimizer's own, so schedulers,
    ``accelerate`` and ``GradScaler`` treat this as any optimizer.  Parameters of no LoRA layer are
    stepped as the inner optimizer would alone.  A step whose gradients are not all finite is
    skipped whole where that can be done without waiting for the device (on CPU, and with a fused
    inner optimizer); the base weights never take part in such a step.

    What was learned is then not in the adapter alone: save with `scalora.save_merged` or
    `scalora.save_adapter`.

    Args:
        optimizer: the inner optimizer: Adam, AdamW, NAdam, RAdam, Adamax, SGD, RMSprop, Adagrad,
            Adafactor of ``torch.optim``; Adam, AdamW, Lion, AdEMAMix, SGD, RMSprop, Adagrad of
            ``bitsandbytes.optim``, 8-bit and paged too; or a class given to
            `scalora.register_moments`.
        model: the PEFT model (or a module around it).
        interval: re-base once every ``interval`` steps (the paper's ScaLoRA-I), or ``"auto"``: a
            tenth of the memory for the rules that have one, else 1.
        rule: ``"leak"``, what ``"auto"`` is: every step leaves a share 1/K of ``lora_B`` to the
            weight, K being the memory.  ``"age"``: the same as a bound on the age of every column.
            By scaling the columns of both factors: ``"exact"``: the theorem's objective, solved for
            its non-negative optimum; ``"paper"``: the theorem as published, ``H^-1 lambda`` where
            that is non-negative and two scalars elsewhere; ``"scalar"``: always two scalars;
            ``"direction"``: the inner optimizer's own direction in place of the gradient.
            ``"none"``: never re-base (plain LoRA).
        lipschitz: for ``"paper"``, ``"exact"`` and ``"scalar"``: the smoothness constant L of the
            theorem, or ``"auto"`` (the default): L times the learning rate is calibrated at a
            layer's first re-basing, so that the inner optimizer's coming step is predicted to be as
            long as plain LoRA's, and held from then on.  With a number, the optimum answers a
            smaller learning rate with a larger scaling, which undoes a schedule.  ``"direction"``
            holds the step at plain LoRA's length at every re-basing and takes none.
        accumulator: where the frozen increments go.  ``"dense"``: into the base weight, in place.
            ``"carry"``: into low-rank factors beside it, which the forward pass adds like a second,
            frozen adapter; the base is never touched.  ``"auto"``: dense where the base is a plain
            float weight that nothing else shares, carry elsewhere (quantized, tied, offloaded).
        adapter_name: which adapter to re-base.
        rounding: for bfloat16 and float16 base weights: ``"stochastic"`` (unbiased),
            ``"compensated"`` (keeps what was cut, 2 bytes a weight) or ``"nearest"`` (loses nearly
            all of a small increment; for comparison).
        bound: every scaling is by factors within ``[1/bound, bound]``.
        seed: of the stochastic rounding; use the same on every replica.
        carry_rank: the most columns a layer's carry may hold, or ``"auto"``: 8 times the adapter's
            rank at first, doubled up to 32 times whenever a compression would cut more than
            ``carry_tolerance``.  A compression keeps three quarters.  It is due once in several
            re-basings, and is the one thing that waits for the device on a GPU.
        when_full: ``"compress"``; ``"hold"``: the layer is plain LoRA from then on; ``"fold"``:
            into the base weight, which must be a plain float weight.
        carry_tolerance: the energy (squared Frobenius norm) that may be cut from a carry over all
            compressions, relative to that of what the layer has learned.  Beyond it a warning is
            given, once.
        calibration: for how many steps after the learning rate's peak the length of a step is
            calibrated.  All layers' steps grow while they are short beside a lower bound of the
            distance there is to go, and shrink where the next gradient says that the last one was
            too long.  The factor is then held, so a schedule keeps its meaning.  0: never.
            ``"auto"``: 100 with ``rule="auto"``, else 0.
        memory: for ``"auto"``, ``"leak"`` and ``"age"``: K, how many steps the adapter remembers,
            counted at the highest learning rate; ``"auto"``: 100, and 15 for ``"age"``.

    Raises:
        TypeError: an optimizer whose state is not known, or an argument of the wrong type.
        ValueError: a model without the adapter, an argument out of range, or with
            ``accumulator="dense"`` a tied base weight.
    """

    inner: torch.optim.Optimizer
    model: nn.Module
    options: RebasingOptions
    _skipped: Tensor | None
    _checked: bool
    _sharded: list[Any]
    _made_state: Any
    state_is_in_file: Any
    _rebaser: Rebaser
    _calibration: StepCalibration
    _run: RunState
    _owner: object
    _watch: BaseWatch | None
    _factors: FactorWatch | None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        interval: int | Literal["auto"] = "auto",
        rule: Rule = "auto",
        lipschitz: float | Literal["auto"] | None = None,
        accumulator: Accumulator = "auto",
        adapter_name: str = "default",
        rounding: Rounding = "stochastic",
        bound: float = RebasingOptions.bound,
        seed: int = 0,
        carry_rank: int | Literal["auto"] = "auto",
        when_full: WhenFull = "compress",
        carry_tolerance: float = RebasingOptions.carry_tolerance,
        calibration: int | Literal["auto"] = "auto",
        memory: float | Literal["auto"] = "auto",
    ) -> None:
        options = RebasingOptions(
            interval=interval,
            rule=rule,
            lipschitz=lipschitz,
            accumulator=accumulator,
            adapter_name=adapter_name,
            rounding=rounding,
            bound=bound,
            seed=seed,
            carry_rank=carry_rank,
            when_full=when_full,
            carry_tolerance=carry_tolerance,
            calibration=calibration,
            memory=memory,
        )
        check_inner(optimizer, model)
        moments = moments_of(optimizer)
        if options.resolved_rule in ("direction", "age") and moments.direction is None:
            raise ValueError(
                f"rule={options.rule!r} needs to know which way {type(optimizer).__name__} will "
                "step; register it with a direction, or use rule='auto'."
            )
        places = places_of_layers(model, optimizer, options)
        rebaser = Rebaser(places, options, moments)
        length = StepCalibration(options.calibration_steps)
        owner = object()
        self.__setstate__(
            {
                "inner": optimizer,
                "model": model,
                "options": options,
                "_skipped": None,
                "_checked": False,
                "_sharded": [],
                "_made_state": None,
                "state_is_in_file": False,
                "_rebaser": rebaser,
                "_calibration": length,
                "_run": RunState(options, rebaser, length),
                "_owner": owner,
                "_watch": watch_base(rebaser.pairs[0]) if rebaser.folds else None,
                "_factors": watched_factors(places),
            }
        )
        for pair in places:
            pair.claim(owner)

    @property
    def rebase_count(self) -> int:
        """How often layers were re-based; one step is one time at most."""
        return self._run.rebase_count

    @property
    def last_scaling(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name -> (alpha, beta), each (r,), of the newest re-basing; empty before it."""
        return self._rebaser.last_scaling

    @property
    def step_factor(self) -> Tensor | None:
        """What calibration has found: steps are that many times plain LoRA's; () or None."""
        return self._calibration.factor

    @property
    def rebased_pairs(self) -> list[LoRAPair]:
        """The layers that are re-based; the others stay plain LoRA."""
        return self._rebaser.pairs

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because a gradient was not finite.  Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    def report(self) -> RebasingReport:
        """Of every layer: where its increments went, and what was cut.  Waits for the device.

        Of a sharded model, call it on every process.
        """
        return rebasing_report(self._rebaser.pairs, self._rebaser.places)

    def kept_tensors(self) -> list[Tensor]:
        """Tensors that re-basing keeps between steps, besides the inner optimizer's state."""
        watched = [] if self._factors is None else self._factors.kept_tensors()
        return [*self._rebaser.kept_tensors(), *self._calibration.kept_tensors(), *watched]

    # Traced by torch.compile, what a step leaves in this object would be lost without a word.
    @torch.compiler.disable
    @calls_global_hooks_once
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the inner optimizer, and re-base if it is time to.

        Args:
            closure: re-evaluates the model and returns the loss; called once, before all else.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._checked:
            check_engine(self.model)
        self._drop_made_state()
        self._reshard()
        factors = checked_factors(self._rebaser.pairs, self.inner, self._owner)
        if only_makes_state(self.inner):
            self.inner.step()
            self._made_state = self.inner.state
            return loss
        check_reference(self._watch)
        self._check_processes()
        self._run.expected.check(self._rebaser.pairs)
        self._run.expected, self.state_is_in_file = ExpectedWeights(), False
        overflow = not_finite(self.param_groups)
        if overflow is None:
            warn_without_gradients(self.param_groups)
        if overflow is not None and overflow.device.type == "cpu" and bool(overflow):
            self._count_skipped(overflow)
            warn("a gradient is not finite: this step was skipped, and nothing was changed.")
            return loss
        if self._factors is not None:
            self._factors.check(wait=False)
            self._factors.suspend()
        self._calibration.observe(factors, highest_rate(self.param_groups, factors))
        due = (self._run.steps + 1) % self.options.interval_steps == 0
        if due and self._rebaser.pairs:
            if self.rebase_count == 0:
                peft_layers.complete_what_is_saved(self.model)
            # Counted first: a step that is tried again after a failure draws other noise.
            self._run.rebase_count += 1
            self._rebaser.rebase(self.inner, self.rebase_count)
        self._run.steps += 1
        linear = self._rebaser.moments.linear_in_rate
        with self._calibration.scaled(factors, self.param_groups, linear):
            self._step_inner(overflow)
        self._rebaser.learned.count(self.param_groups)
        if self._factors is not None:
            self._factors.note(self.rebase_count)
        return loss

    @calls_state_dict_hooks
    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, and under ``"scalora"`` what a resumed run needs besides.

        The base weights are the model's: save those with the model's own ``state_dict``, or with
        `scalora.save_training_state`.  Carries are here, and nowhere in the model's.  Of a sharded
        model, call it on every process.

        Where `scalora.ScaLoRACallback` has just written all that to the file of a Trainer's
        checkpoint (``state_is_in_file``, until the next step), it is not written twice: only what
        kind of run it is of.
        """
        state = self.inner.state_dict()
        if self.state_is_in_file or self._run.expected.in_file:
            in_file = self.state_is_in_file or True
            return {**state, "scalora": {**self._run.kind(), "in_file": in_file}}
        own = self.rebasing_state()
        if not torch.distributed.is_initialized():
            return {**state, "scalora": own}
        # torch.distributed.checkpoint keeps what is in a group and drops all else.
        first, *others = state["param_groups"]
        return {**state, "param_groups": [{**first, "scalora": packed(own)}, *others]}

    @calls_load_state_dict_hooks
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where another ScaLoRA stopped, once the model's weights are loaded too.

        The next step raises a ValueError if the base weights are not those that the state was
        saved with.  A state dict of the plain inner optimizer is taken as well: re-basing then
        begins anew.

        Raises:
            ValueError: another version, rule, memory, calibration, rounding, seed,
                accumulator, set of layers or rank; nothing is loaded then.
        """
        own, state = unpacked(state_dict)
        if own is not None:
            self.check_rebasing_state(own)
        elif state["state"]:
            warn(
                "this optimizer state holds nothing of re-basing, which begins anew: carries and "
                "the calibrated length of the step are not restored."
            )
        self.inner.load_state_dict(state)
        self._reshard()
        if self._factors is not None:
            self._factors.forget()
        self._run.forget()
        self._run.expected = ExpectedWeights.of(own)
        if own is not None and not self._run.expected.in_file:
            self.load_rebasing_state(own)

    def rebasing_state(self) -> dict[str, Any]:
        """What re-basing itself remembers: numbers and small tensors."""
        self._reshard()
        if self._factors is not None:
            self._factors.check(wait=True)
        return self._run.saved()

    def load_rebasing_state(self, own: dict[str, Any]) -> None:
        """Take up what `rebasing_state` returned.

        Raises:
            ValueError: another version, rule, memory, calibration, rounding, seed,
                accumulator, set of layers or rank; nothing is loaded then.
        """
        self._reshard()
        self._run.load(own)
        if self._factors is not None:
            self._factors.forget()
        if self.rebase_count:
            peft_layers.complete_what_is_saved(self.model)

    def __getstate__(self) -> dict[str, Any]:
        # Not all of __dict__: schedulers and accelerate leave methods bound to this object there.
        return {name: self.__dict__[name] for name in ScaLoRA.__annotations__}

    def __repr__(self) -> str:
        return f"ScaLoRA({self.inner!r}, {self.options!r}, layers={len(self._rebaser.pairs)})"

    def check_rebasing_state(self, own: dict[str, Any]) -> None:
        """Raise a ValueError, which says what differs, if ``own`` is not of this kind of run."""
        self._run.check(own)

    def _reshard(self) -> None:
        """Let a sharded model hold its shards, whatever a forward pass left whole."""
        if not self._checked:  # a wrapper may still shard it
            self._sharded = sharding.sharded_modules(self.model)
        for module in self._sharded:
            module.reshard()

    def _check_processes(self) -> None:
        """Once, for a wrapper may have sharded the parameters since this was made."""
        if not self._checked:
            rebaser = self._rebaser
            check_processes(
                self.inner, rebaser.pairs, rebaser.places, self.options, rebaser.moments
            )
            self._checked = True

    def _step_inner(self, overflow: Tensor | None) -> None:
        """Step the inner optimizer; a fused one leaves the step out by itself on overflow."""
        first = not self.inner.state
        try:
            if overflow is None or overflow.device.type == "cpu" or not can_skip(self.inner):
                self.inner.step()
                return
            self._count_skipped(overflow)
            step_unless(overflow, self.inner)
        except BaseException:
            # The first step allocates, so it is where memory runs out.  What torch has made half of
            # by then it takes for whole the next time, and finds no moments in it.
            if first:
                self.inner.state.clear()
            raise

    def _drop_made_state(self) -> None:
        """Begin without the state that a step of zeros made, which counts that step."""
        made, self._made_state = self._made_state, None
        if made is not None and made is self.inner.state:  # none was loaded since
            made.clear()

    def _count_skipped(self, overflow: Tensor) -> None:
        one = overflow.to(torch.int64)
        self._skipped = one if self._skipped is None else self._skipped + one
