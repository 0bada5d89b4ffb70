import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

from scalora.ablation import Task
from scalora.ablation.tasks import EMBEDDED, domain_shift, task_of
from scalora.ablation.tasks.byte_llama import ByteLlama, pretrained_once, windows
from scalora.ablation.tasks.domain_shift import DomainShift
from scalora.ablation.tasks.regression import Regression

TINY = ByteLlama(width=16, intermediate=16, layers=1, heads=2)

OWN = """
import torch
from torch import nn

from scalora.ablation import Task


class Mean(Task):
    name, steps, short_steps, learning_rates, rank = "mean", 4, 2, (0.1,), 1

    def __init__(self, spread=1.0):
        self.spread = spread

    def model(self, seed):
        return nn.Linear(2, 1)

    def batches(self, seed, steps):
        yield from torch.zeros(steps, 3, 2)

    def loss(self, model, batch):
        return model(batch).square().mean() * self.spread

    def score(self, model, split, *, quick=False):
        return {"loss": 0.0}

    def probes(self):
        return []


class Half(Task):
    pass


class Stranger:
    pass
"""


@pytest.fixture
def shift(tmp_path, monkeypatch):
    """The task with a model that is pretrained in no time."""
    monkeypatch.setattr(domain_shift, "_SHAPE", TINY)
    monkeypatch.setattr(DomainShift, "pretraining_steps", 3)
    task = task_of("domain-shift")
    task.prepare(tmp_path / "cache")
    return task


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN, encoding="utf-8")
    return path


def trained(task, steps, learning_rate):
    """The adapted model after some plain steps of AdamW."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=task.rank, target_modules=task.targets, task_type=task.task_type)
    model = get_peft_model(task.model(seed=0), adapter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0)
    for batch in task.batches(seed=0, steps=steps):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("task", EMBEDDED.values())
def test_every_task_says_how_it_is_run(task):
    assert issubclass(task, Task)
    assert EMBEDDED[task.name] is task
    assert 0 < task.short_steps < task.steps
    assert len(task.learning_rates) >= 4
    assert list(task.learning_rates) == sorted(task.learning_rates)
    assert task.learning_rates[-1] / task.learning_rates[0] >= 29.9


def test_no_file_of_the_standard_library_is_on_two_sides():
    files = domain_shift.python_files()
    every = [path for split in ("train", "validation", "test") for path in files[split]]
    assert len(set(every)) == len(every)
    assert min(len(paths) for paths in files.values()) >= 5
    assert len(domain_shift.python_text("test")) > 100_000
    assert len(domain_shift.english_text("train")) > 10 * len(domain_shift.english_text("test"))


def test_the_same_seed_gives_the_same_batches(shift):
    for task in (shift, Regression(noise=1.0)):
        first, again, other = (list(task.batches(seed, 3)) for seed in (4, 4, 5))
        assert all(torch.equal(*map(_flat, pair)) for pair in zip(first, again, strict=True))
        assert not torch.equal(_flat(first[0]), _flat(first[1]))
        assert not torch.equal(_flat(first[0]), _flat(other[0]))
        # A longer run begins as a shorter one does.
        assert torch.equal(_flat(next(task.batches(4, 1))), _flat(first[0]))


def _flat(batch):
    return batch if isinstance(batch, torch.Tensor) else torch.cat(batch)


def test_domain_shift_learns_and_measures_without_changing_the_model(shift):
    base = shift.model(seed=0)
    before = shift.score(base, "validation", quick=True)
    assert shift.score(base, "validation", quick=True) == before
    assert base.training
    assert before.keys() == {"loss"}
    model = trained(shift, steps=30, learning_rate=3e-2)
    assert shift.score(model, "validation", quick=True)["loss"] < before["loss"] - 0.05
    assert shift.source_loss(base) != shift.source_loss(model)
    assert [probe.shape for probe in shift.probes()] == [(16, 96)] * 4


def test_a_model_is_a_new_copy(shift):
    one, other = shift.model(seed=0), shift.model(seed=0)
    with torch.no_grad():
        one.lm_head.weight.zero_()
    assert other.lm_head.weight.any()
    assert shift.model(seed=0).lm_head.weight.any()


def test_regression_is_measured_in_closed_form():
    task = Regression()
    model = task.model(seed=0)
    expected = task.score(model, "test")["loss"]
    assert expected == pytest.approx(209, rel=1e-5)
    sampled = [task.loss(model, batch).item() for batch in task.batches(seed=0, steps=400)]
    assert sum(sampled) / len(sampled) == pytest.approx(expected, rel=0.05)
    assert task.score(trained(task, 150, 0.1), "test")["loss"] < 0.7 * expected
    assert task.source_loss(model) is None


def test_pretraining_is_kept_and_not_done_again(tmp_path, monkeypatch):
    batches = [windows(torch.arange(200), 2, 16, torch.Generator().manual_seed(0))] * 2
    weights = pretrained_once(tmp_path, TINY, batches, 1e-3)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(ByteLlama, "build", lambda self: pytest.fail("pretrained again"))
        again = pretrained_once(tmp_path, TINY, batches, 1e-3)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    # What was learned from other batches is another file.
    pretrained_once(tmp_path, TINY, batches[:1], 1e-3)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_pretraining_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def cut_short(path, tensors, metadata):
        path.write_bytes(b"half a file")
        raise OSError("the disk is full")

    monkeypatch.setattr("scalora.ablation.tasks.byte_llama.write_tensors", cut_short)
    with pytest.raises(OSError, match="full"):
        pretrained_once(tmp_path, TINY, [torch.zeros(1, 8, dtype=torch.long)], 1e-3)
    assert list(tmp_path.iterdir()) == []


def test_two_that_pretrain_at_once_leave_one_whole_file(tmp_path):
    batches = [torch.arange(32).view(2, 16)] * 2
    results = []
    work = [
        threading.Thread(
            target=lambda: results.append(pretrained_once(tmp_path, TINY, batches, 1e-3))
        )
        for _ in range(2)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(results) == 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_task_of_a_user_s_own_file(own):
    task = task_of(f"{own}:Mean", spread=2.0, noise=None)
    assert isinstance(task, Task)
    assert (task.name, task.spread) == ("mean", 2.0)
    # As a process that starts anew does: the file alone says what the class is.
    assert type(task_of(f"{own}:Mean")).__name__ == "Mean"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("domain", "no task domain: it is one of domain-shift, .*, or path/to/file.py:Class"),
        ("{own}:Absent", "mine.py has no class Absent"),
        ("{own}:Stranger", "Stranger is not a subclass of scalora.ablation.Task"),
        ("{own}:Half", "lacks batches, loss, model, probes, score"),
        ("{own}x.py:Mean", "there is no file"),
    ],
)
def test_a_wrong_spec_is_told(own, spec, message):
    with pytest.raises(ValueError, match=message):
        task_of(spec.format(own=own))


def test_a_file_that_cannot_be_loaded_is_told(own):
    own.write_text("import nothing_of_that_name", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine.py cannot be loaded: ModuleNotFoundError"):
        task_of(f"{own}:Mean")


def test_an_option_that_a_task_does_not_take_is_told():
    with pytest.raises(
        ValueError, match=r"regression: .*'model'; the options that it takes: noise"
    ):
        task_of("regression", model="some/model")
    with pytest.raises(ValueError, match=r"domain-shift: .*; the options that it takes: none"):
        task_of("domain-shift", data="a.csv")
    with pytest.raises(ValueError, match="cannot be negative"):
        task_of("regression", noise=-1.0)
