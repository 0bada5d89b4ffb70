"""The optimizer wrapper: an inner optimizer that re-bases LoRA layers as it steps."""

# Annotations are not strings here: `help` shows the values that an option takes.
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalora import peft_layers
from scalora.arguments import described
from scalora.autocast import without_autocast
from scalora.guards.guard import Guard
from scalora.moments import moments_of
from scalora.optimizer_hooks import (
    calls_global_hooks_once,
    calls_load_state_dict_hooks,
    calls_state_dict_hooks,
)
from scalora.options import Accumulator, RebasingOptions, Rounding, Rule, WhenFull
from scalora.peft_layers import LoRAPair
from scalora.rebasing.rebaser import Rebaser
from scalora.rebasing.report import RebasingReport, progress, rebasing_report
from scalora.rebasing.selection import places_of_layers
from scalora.resuming.encoding import packed, unpacked
from scalora.resuming.in_file import InFile
from scalora.resuming.run_state import RunState
from scalora.step_length.rates import highest_rate
from scalora.warning import warn


class ScaLoRA(torch.optim.Optimizer):
    """Steps an optimizer over LoRA parameters, and re-bases the LoRA layers while it trains.

    To re-base a layer is to freeze part of the adapter's product ``lora_B lora_A`` into the weight
    and to train on what is left.  The model's function does not change, and the optimizer's moments
    are carried into the new coordinates exactly.  The frozen increments add up to a rank far above
    the adapter's (ScaLoRA, arXiv 2510.23818; docs/mathematics.md).

    By default ``lora_B`` decays into the weight: once in ``interval`` steps, what the adapter
    learned more than about ``memory`` steps ago is frozen.  The first steps find how long a step
    should be.  The paper's rules scale the columns of both factors instead, by the amounts that
    bring the coming step closest to the step of full fine-tuning.  Increments are folded into the
    base weight, or kept beside it (in a carry) where the base is quantized.

    One line of a training script changes::

        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)                         # before
        optimizer = scalora.ScaLoRA(torch.optim.AdamW(model.parameters(), lr=2e-4), model)  # after

    ``param_groups``, ``state`` and ``defaults`` are the inner optimizer's own, so schedulers,
    ``accelerate`` and ``GradScaler`` treat this as any optimizer.  Parameters of no LoRA layer are
    stepped as the inner optimizer would alone.  A step with a gradient that is not finite is
    skipped whole where that takes no wait for the device (on CPU, and with a fused inner
    optimizer); the base weights never take part in such a step.

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
        rule: ``"leak"`` (which ``"auto"`` is): every step leaves a share 1/K of ``lora_B`` to the
            weight, where K is the memory.  Two others scale ``lora_B`` alone, for ablations:
            ``"age"``, which bounds every column at the length of K steps, and ``"expected"``, which
            shares those lengths out by the theorem's optimum in expectation over batches.  The rest
            scale the columns of both factors: ``"exact"``, the theorem's objective, solved
            for its non-negative optimum; ``"paper"``, the theorem as published, ``H^-1 lambda``
            where that is non-negative and two scalars elsewhere; ``"scalar"``, always two scalars;
            ``"direction"``, the inner optimizer's own direction in place of the gradient.
            ``"none"``: never re-base (plain LoRA).
        lipschitz: for ``"paper"``, ``"exact"`` and ``"scalar"``: the smoothness constant L of the
            theorem, or ``"auto"`` (as None): L times the learning rate is calibrated at a layer's
            first re-basing, so that the inner optimizer's coming step is predicted to be as long as
            plain LoRA's, and held from then on.  With a number, the optimum answers a smaller
            learning rate with a larger scaling, which undoes a schedule.  ``"direction"`` holds the
            step at plain LoRA's length at every re-basing, and takes none.
        accumulator: where the frozen increments go.  ``"dense"``: into the base weight, in place.
            ``"carry"``: into low-rank factors beside it, which the forward pass adds like a second,
            frozen adapter; the base is never touched.  ``"auto"``: dense where the base is a plain
            float weight that nothing else shares, carry elsewhere (quantized, tied, offloaded).
        adapter_name: which adapter to re-base.
        rounding: for bfloat16 and float16 base weights: ``"stochastic"`` (unbiased),
            ``"compensated"`` (keeps what was cut, a byte per weight) or ``"nearest"`` (loses
            nearly all of a small increment; for comparison).
        bound: columns are scaled by factors within ``[1/bound, bound]``.
        seed: of the stochastic rounding; use the same on every replica.
        carry_rank: the most columns that the carry of one layer may hold.  ``"auto"``: it begins
            with room for four re-basings, and grows by half, up to 32 times the adapter's rank,
            whenever a compression would cut more than ``carry_tolerance``.
        when_full: ``"compress"``: a full carry keeps its largest singular values, in three quarters
            of its columns.  That is due once in several re-basings, and is the one thing that waits
            for the device on a GPU.  ``"hold"``: the layer is plain LoRA from then on.
        carry_tolerance: the energy (squared Frobenius norm) that may be cut from a carry over all
            compressions, relative to that of what the layer has learned; beyond it, one warning.
        calibration: steps after the learning rate's peak during which the length of a step is
            calibrated.  All layers' steps grow while they are short beside a lower bound on the
            distance to go, and shrink where the next gradient says that the last one was too long.
            The factor is then held, so that a schedule keeps its meaning.  0: never.  ``"auto"``:
            100 with ``rule="auto"``, else 0.
        memory: for the rules that scale ``lora_B`` alone: K, the number of steps that the adapter
            remembers, counted at the highest learning rate; ``"auto"``: 100, and 15 for ``"age"``
            and ``"expected"``.

    Raises:
        TypeError: an optimizer whose state is not known, or an argument of the wrong type.
        ValueError: a model without the adapter, an argument out of range, or with
            ``accumulator="dense"`` a tied base weight.
    """

    inner: torch.optim.Optimizer
    model: nn.Module
    options: RebasingOptions
    state_is_in_file: bool
    _rebaser: Rebaser
    _run: RunState
    _guard: Guard

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
        _check_inner(optimizer, model)
        moments = moments_of(optimizer)
        if options.resolved_rule in ("direction", "age", "expected") and moments.direction is None:
            raise ValueError(
                f"rule={options.rule!r} needs to know which way {type(optimizer).__name__} will "
                "step; register it with a direction, or use rule='auto'."
            )
        places = places_of_layers(model, optimizer, options)
        rebaser = Rebaser(places, options, moments)
        run = RunState(options, rebaser)
        guard = Guard(optimizer, model, places, options, moments, run.expected, rebaser.layers)
        # As torch's own unpickling does it: hooks are set up, groups and state are not copied.
        self.__setstate__(
            {
                "inner": optimizer,
                "model": model,
                "options": options,
                "state_is_in_file": False,
                "_rebaser": rebaser,
                "_run": run,
                "_guard": guard,
            }
        )

    @property
    def rebase_count(self) -> int:
        """Re-basings so far; one step is one at most."""
        return self._run.rebase_count

    @property
    def next_rebasing(self) -> int | None:
        """Steps until the next re-basing, the one that re-bases included; None for never."""
        return self._run.next_rebasing

    @property
    def last_scaling(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name -> (alpha, beta), each (r,), of the newest re-basing; empty before it."""
        return self._rebaser.last_scaling

    @property
    def step_factor(self) -> Tensor | None:
        """Length of a step over plain LoRA's, as calibration has found it; (), None before that."""
        return self._run.calibration.factor

    @property
    def rebased_pairs(self) -> list[LoRAPair]:
        """The layers that are re-based; the others stay plain LoRA."""
        return self._rebaser.pairs

    @property
    def places(self) -> dict[str, str]:
        """Layer name -> where its increments go, ``"dense"`` or ``"carry"``."""
        return dict(self._rebaser.places)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite.  Waits for the device."""
        return 0 if self._guard.skipped is None else int(self._guard.skipped)

    @without_autocast()
    def report(self) -> RebasingReport:
        """Return what was frozen of every layer, what is trainable, and when more will be frozen.

        It prints as a table.  Waits for the device.  Of a sharded model, call it on every process.
        """
        return rebasing_report(
            self._rebaser, self.inner, self.step_factor, self.rebase_count, self.next_rebasing
        )

    @without_autocast()
    def progress(self) -> dict[str, float]:
        """Return the run's progress in a few numbers for a log.  Waits for the device once.

        Returns:
            ``rebased``: re-basings so far.  ``step_factor``: as the property.  ``rank``: mean over
            the layers of the effective rank of the whole change, a lower bound where that is high
            (`scalora.rebasing.sketch`).  ``frozen_norm``: Frobenius norm of all that was frozen,
            over that of what is trainable, all layers together.  What is not known is left out:
            the factor before it is calibrated; the last two of a sharded model, and of one that is
            not finite.
        """
        return progress(self._rebaser.frozen, self.step_factor, self.rebase_count)

    def kept_tensors(self) -> list[Tensor]:
        """Return what re-basing keeps between steps, besides the inner optimizer's state."""
        kept = (self._rebaser, self._run.calibration, self._rebaser.frozen, self._guard)
        return [tensor for part in kept for tensor in part.kept_tensors()]

    # Traced by torch.compile, what a step leaves in this object would be lost without a word.
    @torch.compiler.disable
    @calls_global_hooks_once
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the inner optimizer, and re-base before it once in ``interval`` steps.

        Args:
            closure: re-evaluates the model and returns the loss; called once, before all else.

        Returns:
            What the closure returned.

        Raises:
            ValueError: the step would not be what it seems (docs/faults.md); nothing has changed.
        """
        # Evaluate: the gradients of this step.
        loss = None if closure is None else _evaluated(closure)
        # All else in the dtypes that it chooses, which autocast would change.
        try:
            with without_autocast():
                self._step()
        finally:
            # Casts of the factors as they were would not go with the base as it is.
            torch.clear_autocast_cache()
        return loss

    def _step(self) -> None:
        """Take the step whose gradients are there."""
        # Guard: refuse, warn or skip before anything has changed.
        checked = self._guard.check()
        self.state_is_in_file = False
        if checked is None:
            return
        run, factors = self._run, checked.factors
        # Observe: the gradient of a new batch tells if the last step was too long or too short.
        run.calibration.observe(factors, highest_rate(self.param_groups, factors))
        # Re-base: freeze part of what the adapter holds; the function of the model stays.
        if run.is_due:
            self._rebase()
        run.steps += 1
        # Step: the inner optimizer's own, as long as calibration has found.
        linear = self._rebaser.moments.linear_in_rate
        with run.calibration.scaled(factors, self.param_groups, linear):
            self._guard.step_inner(checked.overflow)
        # Afterwards: count how far the step went, and note the factors that it has left.
        self._rebaser.learned.count(self.param_groups)
        self._guard.note_step(run.rebase_count)

    def _rebase(self) -> None:
        """Re-base every layer that has gradients."""
        if self.rebase_count == 0:
            peft_layers.complete_what_is_saved(self.model)
        # Counted first: a step that is tried again after a failure draws other noise.
        self._run.rebase_count += 1
        self._rebaser.rebase(self.inner, self.rebase_count)

    @calls_state_dict_hooks
    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's, and under ``"scalora"`` what a resumed run needs besides.

        The base weights are the model's: save those with the model's own ``state_dict``, or with
        `scalora.save_training_state`.  Carries are here, and nowhere in the model's.  Of a sharded
        model, call it on every process.

        Where `scalora.ScaLoRACallback` has just written all that to the file of a Trainer's
        checkpoint (``state_is_in_file``, until the next step), only what must agree to resume the
        run is repeated here.

        Raises:
            ValueError: the adapter was deleted.
        """
        self._guard.check_adapters()
        state = self.inner.state_dict()
        if self.state_is_in_file or self._run.expected.in_file:
            in_file = InFile() if self.state_is_in_file else True
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
                accumulator, set of layers or rank; or the adapter was deleted; nothing is loaded
                then.
        """
        self._guard.check_adapters()  # nothing else does, where the state is a plain one
        own, state = unpacked(state_dict)
        if own is not None:
            self.check_same_run(own)
        elif state["state"]:
            warn(
                "this optimizer state holds nothing of re-basing, which begins anew: carries and "
                "the calibrated length of the step are not restored."
            )
        self.inner.load_state_dict(state)
        self._guard.reshard()
        self._guard.forget_factors()
        self._run.forget()
        self._run.expected.expect(own)
        if own is not None and not self._run.expected.in_file:
            self.load_rebasing_state(own)

    def rebasing_state(self) -> dict[str, Any]:
        """Return what re-basing itself remembers: numbers and small tensors.

        Raises:
            ValueError: the adapter was deleted.
        """
        self._guard.check_adapters()
        self._guard.reshard()
        self._guard.check_factors()
        return self._run.saved()

    def load_rebasing_state(self, own: dict[str, Any]) -> None:
        """Take up what `rebasing_state` returned.

        Raises:
            ValueError: as `load_state_dict` does; nothing is loaded then.
        """
        self._guard.check_adapters()
        self._guard.reshard()
        self._run.load(own)
        self._guard.forget_factors()
        if self.rebase_count:
            peft_layers.complete_what_is_saved(self.model)

    def check_same_run(self, own: dict[str, Any]) -> None:
        """Raise a ValueError that says what differs if this run cannot continue a saved one.

        Args:
            own: what `rebasing_state` returned.
        """
        self._guard.check_adapters()
        self._run.check_same_run(own)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the inner optimizer does."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the inner optimizer."""
        self.inner.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # Not all of __dict__: schedulers and accelerate leave methods bound to this object there.
        return {name: self.__dict__[name] for name in ScaLoRA.__annotations__}

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.resolved().items())
        places = list(self._rebaser.places.values())
        where = ", ".join(f"{places.count(p)} {p}" for p in ("dense", "carry") if p in places)
        return f"ScaLoRA({self.inner!r}, {given}, layers: {where or 'none'})"


def _evaluated(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return closure()


def _check_inner(optimizer: Any, model: Any) -> None:
    """Raise a TypeError if these are no optimizer to wrap and the model that it trains."""
    if isinstance(optimizer, nn.Module) and isinstance(model, torch.optim.Optimizer):
        raise TypeError("optimizer and model are swapped: ScaLoRA(optimizer, model) takes both.")
    if isinstance(optimizer, ScaLoRA):
        raise TypeError("optimizer is a ScaLoRA already; pass the optimizer it wraps.")
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        name = optimizer.__name__
        raise TypeError(
            f"optimizer is the class {name}: pass one that was made, {name}(parameters, lr=...), "
            f"or call scalora.create_scalora_optimizer(model, {name}, lr=...)."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is {described(optimizer)}, not a torch.optim.Optimizer.")
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} around another: wrap the innermost "
            "one, before accelerator.prepare."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {described(model)}, not a torch.nn.Module.")
