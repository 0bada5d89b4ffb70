"""ScaLoRA in a transformers Trainer: attached, checkpointed, resumed, logged."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from scalora import sharding
from scalora.arguments import check_folder
from scalora.integrations.reference_model import options_beside_base, refers_to_base
from scalora.integrations.trainer_logs import ProgressLogs, closing, opening, say
from scalora.optimizer import ScaLoRA
from scalora.options import RebasingKeywords, RebasingOptions, option_parameters, options_of
from scalora.peft_layers import complete_checkpoints
from scalora.saving.sharded_checkpoint import load_sharded, save_sharded
from scalora.saving.training_state import load_training_state, save_training_state
from scalora.saving.training_state_file import STATE_FILE

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OPTIMIZER_FILE = "optimizer.pt"


class ScaLoRACallback(TrainerCallback):
    """Turns the optimizer of any ``transformers.Trainer`` into ScaLoRA when training begins.

    ::

        trainer = Trainer(model, args, callbacks=[scalora.ScaLoRACallback()])

    It wraps the optimizer that the Trainer made (or takes the ScaLoRA it was given), completes the
    Trainer's checkpoints with the base weights, restores them on
    ``trainer.train(resume_from_checkpoint=...)``, and with ``load_best_model_at_end`` brings back
    the base that belongs to the best adapter.

    The Trainer's logs of training have ``scalora/rank``, ``scalora/rebased``,
    ``scalora/step_factor`` and ``scalora/frozen_norm`` (`scalora.ScaLoRA.progress`), so TensorBoard
    and the like have them too.  A line is printed when training begins, with what will be re-based
    and when, and one when it ends, with how to save; ``log_level="warning"`` keeps both back.

    TRL's trainers with a reference model switch the adapter off to get it, and expect the
    pretrained model.  With their arguments (``DPOConfig``, ``KTOConfig``, ``GRPOConfig``,
    ``RLOOConfig``, ``OnlineDPOConfig``, ``SDFTConfig``, ``SDPOConfig``) ``accumulator="auto"`` is
    ``"carry"``, which is switched off too.

    Args:
        resume_from: the checkpoint's folder, needed only when a run is resumed from a folder that
            is neither ``output_dir/checkpoint-<step>`` nor ``args.resume_from_checkpoint``.
        options: the options of `scalora.ScaLoRA`: ``interval``, ``rule``, and so on.

    Raises:
        TypeError, ValueError: as `scalora.ScaLoRA` does; those about ``options`` at once.
            ValueError also when training begins and increments would change a trainer's reference
            model, or its teacher is an average of the adapter's parameters.
    """

    restores_rebasing = True  # what `scalora.resuming.in_file` looks for
    # What `help` shows: type checkers read the options from RebasingKeywords instead.
    __signature__ = inspect.Signature(
        [
            inspect.Parameter(
                "resume_from",
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=str | None,
            ),
            *option_parameters(),
        ]
    )

    def __init__(
        self, *, resume_from: str | None = None, **options: Unpack[RebasingKeywords]
    ) -> None:
        self._options = options_of(options, "ScaLoRACallback")
        self.resume_from = resume_from
        self.options = options
        self.optimizer: ScaLoRA | None = None
        self._everything = False
        self._sharded = False
        self._resumable = True
        self._completed = ""
        self._completed_sharded: tuple[str, list[float]] | None = None
        self._logs: ProgressLogs | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Attach to the Trainer's optimizer and logs, and restore a resumed run's base weights."""
        beside_base = refers_to_base(args)
        options = options_beside_base(self._options) if beside_base else self._options
        self.optimizer = _attach(kwargs["optimizer"], kwargs["model"], options)
        if beside_base:
            _check_places(self.optimizer)
        # At the end the model in training goes back to the best, and its base with it.
        self._everything = args.load_best_model_at_end
        self._completed, self._completed_sharded = "", None
        self._sharded = any(map(sharding.is_sharded, self.optimizer.model.parameters()))
        # Without an optimizer's state nothing can be resumed: then the adapter itself is whole.
        self._resumable = not args.save_only_model or args.load_best_model_at_end
        completing = _completed_elsewhere if self._sharded else self._completing
        complete_checkpoints(self.optimizer.model, completing if self._resumable else None)
        if state.global_step > 0:
            self._resume(self._checkpoint(args, state))
        ends = state.global_step, state.max_steps
        say(opening(self.optimizer, *ends, self._sharded), args)
        if self._logs is not None:  # of a run that was interrupted
            self._logs.detach()
        self._logs = ProgressLogs(self.optimizer)
        self._logs.attach()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Complete a sharded model's checkpoint before the Trainer deletes older ones.

        The Trainer will save now, unless it evaluates first, which may still fail.
        """
        if self._saves_early(state, control) and not control.should_evaluate:
            self._complete_sharded(_checkpoint_folder(args, state))

    on_epoch_end = on_step_end

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Do what `on_step_end` has put off for this evaluation."""
        if self._saves_early(state, control):
            self._complete_sharded(_checkpoint_folder(args, state))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Complete the checkpoint where saving the model has not done so.

        A model without ``save_pretrained`` is saved as its state dict, which has no carry.  Of a
        sharded model the Trainer saves the adapter alone, so all else is written here.
        """
        folder = _saved_checkpoint(args, state)
        if self._sharded:
            self._complete_sharded(folder)
        elif args.should_save and self.optimizer is not None:
            self.optimizer.state_is_in_file = False
            if self._resumable and self._completed != folder.name:
                self._complete(folder)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Say how to save; with ``load_best_model_at_end``, bring back the best adapter's base."""
        if self._logs is not None:
            self._logs.detach()
        if self.optimizer is not None:
            complete_checkpoints(self.optimizer.model, None)
            self.optimizer.state_is_in_file = False
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and self.optimizer is not None:
            load = load_sharded if self._sharded else load_training_state
            load(self.optimizer, best)
        if self.optimizer is not None:
            say(closing(self.optimizer, self._sharded), args)

    @contextmanager
    def _completing(self, folder: Path) -> Iterator[None]:
        """Complete a checkpoint right after its adapter is written, while entered.

        The Trainer writes its own state last, and deletes older checkpoints after that.  So a
        checkpoint with a Trainer's state is whole, and the old state goes first.
        """
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        yield
        self._complete(folder)
        self._completed = folder.name
        assert self.optimizer is not None
        self.optimizer.state_is_in_file = True  # the optimizer's own is still to be written

    def _complete(self, folder: Path) -> None:
        assert self.optimizer is not None
        save_training_state(self.optimizer, folder, all_base_weights=self._everything)

    def _complete_sharded(self, folder: Path) -> None:
        assert self.optimizer is not None
        # A schedule may have looked at the evaluation since.
        completed = folder.name, [float(group["lr"]) for group in self.optimizer.param_groups]
        if self._completed_sharded != completed:
            save_sharded(self.optimizer, folder)
            self._completed_sharded = completed

    def _saves_early(self, state: TrainerState, control: TrainerControl) -> bool:
        """Return whether a checkpoint's shards are written now: its folder is known."""
        return self._sharded and control.should_save and not state.is_hyper_param_search

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        if self.resume_from is not None:
            check_folder(
                Path(self.resume_from), "it was passed as ScaLoRACallback(resume_from=...)"
            )
        candidates = [
            self.resume_from,
            args.resume_from_checkpoint,
            _checkpoint_folder(args, state),
        ]
        folders = [Path(c) for c in candidates if c is not None and Path(c).is_dir()]
        if not folders:
            raise ValueError(
                f"training resumes at step {state.global_step} from a checkpoint that is not in "
                f"{args.output_dir!r}: pass its folder as ScaLoRACallback(resume_from=...)."
            )
        return folders[0]

    def _resume(self, folder: Path) -> None:
        assert self.optimizer is not None
        if self._sharded:
            load_sharded(self.optimizer, folder)
        elif (folder / STATE_FILE).exists():
            load_training_state(self.optimizer, folder)
        elif _is_of_scalora(folder / _OPTIMIZER_FILE):
            raise ValueError(
                f"{folder} is incomplete: its optimizer state is ScaLoRA's, but {STATE_FILE}, "
                "which completes it, is missing. Resume from an earlier checkpoint."
            )


def _attach(optimizer: Any, model: nn.Module, options: RebasingOptions) -> ScaLoRA:
    if isinstance(optimizer, ScaLoRA):
        return optimizer
    if type(optimizer) is not AcceleratedOptimizer:
        raise TypeError(
            f"ScaLoRACallback cannot attach to {type(optimizer).__name__}; it works where "
            "accelerate drives a torch.optim optimizer. DeepSpeed's ZeRO takes parameters apart: "
            "use FSDP2 (fsdp_version=2) or DDP instead."
        )
    if isinstance(optimizer.optimizer, ScaLoRA):
        return optimizer.optimizer
    optimizer.optimizer = ScaLoRA(optimizer.optimizer, model, **asdict(options))
    optimizer.__setstate__(optimizer.__getstate__())  # it keeps bound methods of the one it wraps
    return optimizer.optimizer


def _check_places(optimizer: ScaLoRA) -> None:
    """Raise a ValueError if one that was passed to the Trainer folds into the base."""
    folds = "dense" in optimizer.places.values()
    options_beside_base(replace(optimizer.options, accumulator="dense" if folds else "carry"))


@contextmanager
def _completed_elsewhere(folder: Path) -> Iterator[None]:
    """Do nothing while an adapter is written: its checkpoint is completed by other means."""
    yield


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _saved_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return where the Trainer has just saved; a hyper-parameter search has a folder per run."""
    folder = _checkpoint_folder(args, state)
    if not state.is_hyper_param_search:
        return folder
    written = [path / TRAINER_STATE_NAME for path in Path(args.output_dir).glob(f"*/{folder.name}")]
    return max(filter(Path.is_file, written), key=lambda path: path.stat().st_mtime_ns).parent


def _is_of_scalora(path: Path) -> bool:
    if not path.exists():
        return False
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return any("scalora" in entries for entries in (saved, *saved["param_groups"]))
