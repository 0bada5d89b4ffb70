"""Plans and an engine from a command line."""

from __future__ import annotations

import argparse

import torch

from scalora.ablation import defaults
from scalora.ablation.engines import Cluster, Engine, Inline, LocalProcesses
from scalora.ablation.job import digest_of_source
from scalora.ablation.methods import SUITES, Method, method_of
from scalora.ablation.plan import TaskPlan
from scalora.ablation.task import Task
from scalora.ablation.tasks import task_of


def plans_of(args: argparse.Namespace) -> list[TaskPlan]:
    """Return one plan per task.

    Raises:
        ValueError: an unknown task, method, suite or device, or two tasks of one name.
    """
    methods = _methods(args)
    plans = [_plan(args, spec, methods) for spec in args.task]
    if len({plan.name for plan in plans}) < len(plans):
        raise ValueError(f"two of the tasks have one name: {', '.join(p.name for p in plans)}")
    return plans


def engine_of(args: argparse.Namespace) -> Engine:
    """Return the engine that runs the jobs.

    Raises:
        ValueError: parameters of a cluster without one, or parameters that submitit does not know.
    """
    if args.engine == "slurm":
        return Cluster(args.output / "slurm", dict(args.slurm))
    if args.slurm:
        raise ValueError("--slurm goes with --engine slurm")
    if args.engine == "inline":
        return Inline()
    return LocalProcesses(args.jobs, args.output / "processes.log")


def _plan(args: argparse.Namespace, spec: str, methods: list[Method]) -> TaskPlan:
    options = {name: getattr(args, name) for name in ("model", "data", "source")}
    given = {name: value for name, value in options.items() if value is not None}
    task = task_of(spec, **given)
    number = args.seeds or (1 if args.smoke else defaults.SEEDS)
    seeds = tuple(range(number))
    search_seeds = min(args.search_seeds or number, number)
    return TaskPlan(
        task=spec,
        name=task.name,
        options=tuple(sorted(given.items())),
        source_code=digest_of_source(spec),
        metric=task.metric,
        lower_is_better=task.lower_is_better,
        methods=tuple(method.name for method in methods),
        rates=tuple(method.rate for method in methods),
        learning_rates=_learning_rates(args, task),
        seeds=seeds,
        search_seeds=seeds[:search_seeds],
        steps=_steps(args, task),
        rank=args.rank or task.rank,
        device=_device(args),
    )


def _methods(args: argparse.Namespace) -> list[Method]:
    if args.suite is not None and args.suite not in SUITES:
        raise ValueError(f"no suite {args.suite!r}: there are {', '.join(SUITES)}.")
    specs = list(SUITES[args.suite]) if args.suite else []
    specs += args.methods or []
    found = [method_of(spec) for spec in specs or SUITES[defaults.SUITE]]
    return list({method.name: method for method in found}.values())


def _learning_rates(args: argparse.Namespace, task: Task) -> tuple[float, ...]:
    rates = sorted(args.learning_rates or task.learning_rates)
    if args.smoke and not args.learning_rates:
        middle = len(rates) // 2
        rates = rates[max(0, middle - 1) : middle + 1]
    elif args.short and not args.learning_rates:
        rates = rates[::2]
    return tuple(rates)


def _steps(args: argparse.Namespace, task: Task) -> int:
    if args.steps:
        return int(args.steps)
    if args.smoke:
        return defaults.SMOKE_STEPS
    return task.short_steps if args.short else task.steps


def _device(args: argparse.Namespace) -> str:
    if args.engine != "slurm":
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is none here")
        return args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # The devices of a cluster cannot be seen from here.
    return args.device or "cpu"
