"""Runs that can be killed and resumed: a bare loop, accelerate, a Trainer, as a user writes them.

Each begins where its newest whole checkpoint is, if there is one, and writes down every loss.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import models
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import scalora

STEPS, SAVE_EVERY, BATCH = 12, 3, 4


@dataclass(frozen=True)
class Kind:
    """What is trained, and when it is killed.

    Attributes:
        options: of ScaLoRA.
        dtype: of the base.
        kill_at: the step after which the process kills itself; None: never.
        kill_in: the name of the file of a checkpoint in which it does, half-written, once the
            checkpoint of ``kill_at`` is being written.
    """

    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    kill_at: int | None = None
    kill_in: str | None = None


def losses(folder: Path) -> list[tuple[int, str]]:
    """Step and loss, to the bit, in the order in which they were taken."""
    lines = (folder / "losses").read_text().splitlines()
    return [(int(step), loss) for step, loss in (line.split() for line in lines)]


def pretrained(kind: Kind) -> Any:
    torch.manual_seed(0)
    return models.llama(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, attention_dropout=0.1
    ).to(kind.dtype)


def with_adapter(kind: Kind) -> Any:
    base = pretrained(kind)
    return models.with_lora(base, r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])


def bare(folder: Path, kind: Kind) -> None:
    """Adapter, optimizer and `scalora.save_training_state`, which comes last."""
    whole = [path.parent for path in folder.glob("step-*/scalora.safetensors")]
    begin = max((int(path.name[5:]) for path in whole), default=0)
    if begin:
        newest = folder / f"step-{begin}"
        model = PeftModel.from_pretrained(pretrained(kind), newest, is_trainable=True)
    else:
        model = with_adapter(kind)
    optimizer = _optimizer(model, kind)
    schedule = _schedule(optimizer)
    if begin:
        saved = torch.load(newest / "run.pt", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        scalora.load_training_state(optimizer, newest)
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["generator"])
    for step in range(begin + 1, STEPS + 1):
        loss = models.language_loss(model, _ids(step))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        _after(step, loss, folder, kind)
        if step % SAVE_EVERY == 0:
            into = folder / f"step-{step}"
            model.save_pretrained(into)
            state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save({**state, "generator": torch.get_rng_state()}, into / "run.pt")
            scalora.save_training_state(optimizer, into)
    _at_the_end(model, folder)


def accelerated(folder: Path, kind: Kind) -> None:
    """``save_state`` under another name, which is then changed."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = with_adapter(kind)
    optimizer = _optimizer(model, kind)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, _schedule(optimizer))
    begin = max((int(path.name[5:]) for path in folder.glob("step-*")), default=0)
    if begin:
        accelerator.load_state(str(folder / f"step-{begin}"))
    for step in range(begin + 1, STEPS + 1):
        loss = models.language_loss(model, _ids(step))
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        _after(step, loss, folder, kind)
        if step % SAVE_EVERY == 0:
            accelerator.save_state(str(folder / "half-written"))
            os.replace(folder / "half-written", folder / f"step-{step}")
    _at_the_end(model, folder)


def trained(folder: Path, kind: Kind) -> None:
    """A Trainer with `scalora.ScaLoRACallback`."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        warmup_steps=2,
        logging_steps=1,
        save_steps=SAVE_EVERY,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    watch = _Watch(folder, kind)
    trainer = Trainer(
        with_adapter(kind),
        arguments,
        train_dataset=_Examples(),
        callbacks=[scalora.ScaLoRACallback(**kind.options), watch],
    )
    trainer.model.register_forward_hook(watch.see)
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(whole, key=lambda path: int(path.name[11:]), default=None)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    _at_the_end(trainer.model, folder)


class _Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2 * BATCH * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = _ids(index)[0]
        return {"input_ids": ids, "labels": ids}


class _Watch(TrainerCallback):
    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder, self.kind = folder, kind

    def see(self, model: Any, inputs: Any, outputs: Any) -> None:
        self.loss = outputs.loss

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _after(state.global_step, self.loss, self.folder, self.kind)


def _optimizer(model: Any, kind: Kind) -> scalora.ScaLoRA:
    inner = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    return scalora.ScaLoRA(inner, model, **kind.options)


def _schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 3, 1 - step / (2 * STEPS))
    )


def _ids(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(1, models.VOCABULARY, (BATCH, 8), generator=generator)


def _at_the_end(model: Any, folder: Path) -> None:
    """What the last step has led to."""
    with torch.no_grad():
        _write_down(STEPS + 1, models.language_loss(model.eval(), _ids(0)), folder)


def _write_down(step: int, loss: Tensor, folder: Path) -> None:
    with (folder / "losses").open("a") as file:
        file.write(f"{step} {loss.item().hex()}\n")


def _after(step: int, loss: Tensor, folder: Path, kind: Kind) -> None:
    _write_down(step, loss, folder)
    if step == kind.kill_at:
        if kind.kill_in is None:
            os.kill(os.getpid(), signal.SIGKILL)
        _kill_in_the_middle_of(kind.kill_in)


def _kill_in_the_middle_of(name: str) -> None:
    """From now on, writing a file of that name (also under a temporary one) ends half-way."""

    def half(write: Callable[..., None]) -> Callable[..., None]:
        def wrapper(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            write(content, path, *args, **kwargs)
            if Path(path).name.startswith(name):
                os.truncate(path, Path(path).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapper

    torch.save = half(torch.save)
    safetensors.torch.serialize_file = half(safetensors.torch.serialize_file)
