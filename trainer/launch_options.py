"""What is wrong with the options of `longspan launch`, before anything is started or submitted. Imports no torch."""

from __future__ import annotations

import argparse
import re

from longspan.cluster.network import split_address, split_endpoint
from longspan.errors import Problem, UsageError
from longspan.trainer.config import RunConfig, lane_problems

# the script's notice comes 120 s before the limit, and Slurm may send it a minute early: a job as short as that
# would stop and requeue itself before its first step, again and again
SHORTEST_JOB_SECONDS = 240
_SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<numbers>\d+(?::\d+){0,2})", re.ASCII)
_NO_LIMIT = ("infinite", "unlimited")  # besides 0


def option_problems(args: argparse.Namespace, gpus: int) -> list[Problem]:
    """What is wrong with the options by themselves.

    Args:
        args: the command line; `nproc` is a number.
        gpus: of this host; 0 if the processes run elsewhere, or on CPUs.
    """
    problems = [
        Problem(f"--{name.replace('_', '-')} {getattr(args, name)}", f"{least} or more.")
        for name, least in (("nproc", 1), ("nodes", 1), ("max_restarts", 0))
        if getattr(args, name) < least
    ]
    if gpus and args.nproc > gpus:
        what = f"this node has {gpus} GPUs, and a process needs one of its own."
        problems.append(Problem(f"--nproc {args.nproc}", what))
    if args.fork_data and not args.resume:
        what = "changes the data of a run that goes on: give it together with --resume."
        problems.append(Problem("--fork-data", what))
    of_target = {"local": _local, "slurm": _slurm, "ray": _ray, "kubernetes": _kubernetes}
    return problems + of_target[args.target](args)


def world_problems(args: argparse.Namespace, config: RunConfig) -> list[Problem]:
    """What is wrong with so many processes for this recipe; empty where their number itself is wrong."""
    if args.nodes < 1 or args.nproc < 1:
        return []
    world_size, replica = args.nodes * args.nproc, config.parallel.tp * config.parallel.cp
    if world_size % replica:
        what = (
            f"do not factor into parallel.tp = {config.parallel.tp} x parallel.cp = {config.parallel.cp} x data "
            f"parallel. Use a multiple of {replica}."
        )
        return [Problem(f"{args.nodes} nodes x {args.nproc} processes = {world_size}", what)]
    return lane_problems(config, world_size // replica)


def slurm_seconds(text: str) -> int | None:
    """Seconds of a time limit in one of Slurm's forms (sbatch(1), --time); 0 for no limit, None if it is in none."""
    if text.lower() in _NO_LIMIT:
        return 0
    found = _SLURM_TIME.fullmatch(text)
    if found is None:
        return None
    numbers = [int(number) for number in found["numbers"].split(":")]
    if found["days"] is not None:  # days-hours, days-hours:minutes, days-hours:minutes:seconds
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    # minutes, minutes:seconds, hours:minutes:seconds
    hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return (hours * 60 + minutes) * 60 + seconds


def _local(args: argparse.Namespace) -> list[Problem]:
    if args.rendezvous is None:
        if args.nodes < 2:
            return []
        what = "needs --rendezvous HOST:PORT: a host of the run and a free port of it, the same on every node."
        return [Problem(f"--nodes {args.nodes}", what)]
    try:
        split_endpoint(args.rendezvous)
    except UsageError as error:
        where, _, what = str(error).partition(": ")
        return [Problem(where, what)]
    return []


def _slurm(args: argparse.Namespace) -> list[Problem]:
    problems = []
    seconds = slurm_seconds(args.time)
    if seconds is None:
        what = (
            "not a time limit of Slurm. Write MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, "
            "DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS or unlimited, e.g. 12:00:00."
        )
        problems.append(Problem(f"--time {args.time}", what))
    elif 0 < seconds < SHORTEST_JOB_SECONDS:
        what = (
            f"{seconds} s, but the job saves and requeues itself two to three minutes before its limit. Use "
            f"{SHORTEST_JOB_SECONDS // 60} minutes or more."
        )
        problems.append(Problem(f"--time {args.time}", what))
    for option in args.sbatch:
        if not option.startswith("-") or not option.isprintable():
            what = "not one line with an option of sbatch, e.g. --sbatch=--partition=long."
            problems.append(Problem(f"--sbatch {option!r}", what))
    return problems


def _ray(args: argparse.Namespace) -> list[Problem]:
    if args.address == "auto" or split_address(args.address.removeprefix("ray://")):
        return []
    return [Problem(f"--address {args.address}", "write it as auto, HOST:PORT or ray://HOST:PORT.")]


def _kubernetes(args: argparse.Namespace) -> list[Problem]:
    if args.kind == "pytorchjob" and args.nodes == 1:
        return [
            Problem("--kind pytorchjob", "needs --nodes 2 or more; for one node use --kind rayjob, or a plain pod.")
        ]
    return []
