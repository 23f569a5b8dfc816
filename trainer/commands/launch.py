"""`longspan launch local|slurm|ray|kubernetes`: `longspan train` in several processes. Imports no torch."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from longspan.cluster import submit
from longspan.cluster.launcher import NodeLaunch, NodeResult, collect_signals, messages, run_node, visible_gpus
from longspan.errors import (
    EXIT_OK,
    EXIT_READER_GONE,
    EXIT_REQUEUE,
    ClusterError,
    ConfigError,
    LongspanError,
    Problem,
    Stopped,
)
from longspan.trainer import recipes
from longspan.trainer.config import RunConfig, cross_problems
from longspan.trainer.launch_options import option_problems, world_problems
from longspan.trainer.run_directory import check_unused, check_usable, checkpoint_root

_MODULE = "longspan.trainer.cli"
_ADVICE = "Mend recipe and options; --set section.field=value changes a field of the recipe."


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check recipe and options, then start or submit it; returns the run's summary, or what was submitted.

    Raises:
        ConfigError: recipe or options are wrong, or the processes do not divide what the recipe has; every problem.
        UsageError: the run directory cannot be used, or the nodes cannot meet.
        LongspanError: the run ended with an error; has its exit code.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # a scheduler's, for nodes; they would silence this command
        os.environ.pop(name, None)
    gpus = visible_gpus()
    if args.nproc is None:
        args.nproc = gpus or 1
    config = _checked(args, gpus if args.target == "local" else 0)
    args.run_dir = args.run_dir or str(Path("runs") / config.name)
    targets = {"local": _local, "slurm": _slurm, "ray": _ray, "kubernetes": _kubernetes}
    return targets[args.target](args, config)


def _checked(args: argparse.Namespace, gpus: int) -> RunConfig:
    """The recipe; raises ConfigError with everything that is wrong with it and with the options."""

    def check(config: RunConfig) -> list[Problem]:
        return [*cross_problems(config), *world_problems(args, config)]

    problems = option_problems(args, gpus)
    try:
        config = recipes.load(RunConfig, args.config, args.overrides, check)
    except ConfigError as error:
        raise ConfigError(f"launch of {args.config}", [*error.problems, *problems], _ADVICE) from error
    if problems:
        raise ConfigError(f"launch of {args.config}", problems, "Mend the options.")
    return config


def _check_run_dir(args: argparse.Namespace, config: RunConfig, *, seen_here: bool = True) -> None:
    """What `train` checks too: its nodes cannot, as they are told to resume for the sake of restarts.

    Args: seen_here: whether this host sees the folders that the nodes will use.
    """
    run_dir = Path(args.run_dir)
    check = check_usable if seen_here else check_unused
    check(run_dir, checkpoint_root(config, run_dir), resume=args.resume)


def _train_arguments(args: argparse.Namespace, *, resume: bool) -> list[str]:
    """The arguments of `longspan train` behind its name."""
    arguments = [args.config, "--run-dir", args.run_dir]
    if resume:
        arguments.append("--resume")
    if args.init_from:
        arguments += ["--init-from", args.init_from]
    if args.fork_data:
        arguments.append("--fork-data")
    return arguments + [part for override in args.overrides for part in ("--set", override)]


def _node_arguments(args: argparse.Namespace) -> list[str]:
    """`longspan launch local` for a node of a job; a job that is started again has to go on where it was."""
    arguments = ["launch", "local", *_train_arguments(args, resume=True), "--nodes", str(args.nodes)]
    return [*arguments, "--nproc", str(args.nproc), "--max-restarts", str(args.max_restarts)]


def _local(args: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    _check_run_dir(args, config)
    launch = NodeLaunch(
        module=_MODULE,
        # a restart has to resume; a run that has no checkpoint yet starts from its first step all the same
        arguments=("train", *_train_arguments(args, resume=True)),
        processes=args.nproc,
        nodes=args.nodes,
        rendezvous=args.rendezvous,
        run_id=args.run_id,
        max_restarts=args.max_restarts,
        timeout_seconds=config.parallel.timeout_seconds,
    )
    command = shlex.join(launch.torchrun())
    if args.dry_run:
        return _shown(args, {"command": command}, command)
    result = run_node(launch, quiet_output=args.json)
    if result.exit_code == EXIT_READER_GONE:  # the workers write where this process does
        raise BrokenPipeError
    if result.exit_code != EXIT_OK:
        raise _error(result)
    return {**result.result(), "restarts": result.restarts}


def _error(result: NodeResult) -> LongspanError:
    text = "\n".join(messages(result.ends)) or "a process was killed before it could say why."
    error = Stopped(text) if result.exit_code == EXIT_REQUEUE else ClusterError(text)
    error.exit_code = result.exit_code
    return error


def _slurm(args: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    _check_run_dir(args, config)
    options = [
        *([f"--gpus-per-node={args.nproc}"] if not _is_set(args.sbatch, "--gpus", "--gres") else []),
        *args.sbatch,
    ]
    values = {
        "name": submit.job_name(config.name),
        "nodes": str(args.nodes),
        "time": args.time,
        "options": "\n".join(f"#SBATCH {option}" for option in options),
        "command": shlex.join(["longspan", *_node_arguments(args)]),
    }
    script = submit.render("train.sbatch", values)
    if args.dry_run:
        return _shown(args, {"script": script}, script)
    answer = submit.submit("sbatch", ["--parsable"], script)
    return _shown(args, {"job_id": answer, "script": script}, f"submitted job {answer}")


def _is_set(options: list[str], *names: str) -> bool:
    return any(option.startswith(names) for option in options)


def _kubernetes(args: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    _check_run_dir(args, config, seen_here=False)  # they are in the pods' volume
    node = _node_arguments(args)
    if args.kind == "rayjob":
        node = ["launch", "ray", *_train_arguments(args, resume=True), "--address", "auto", "--nodes", str(args.nodes)]
        node += ["--nproc", str(args.nproc), "--max-restarts", str(args.max_restarts)]
    values = {
        "name": submit.job_name(config.name),
        "image": args.image,
        "nodes": str(args.nodes),
        "other_nodes": str(args.nodes - 1),
        "processes": str(args.nproc),
        "volume_claim": args.volume_claim,
        "command": shlex.join(["longspan", *node]),
    }
    manifest = submit.render(f"{args.kind}.yaml", values)
    if args.dry_run:
        return _shown(args, {"manifest": manifest}, manifest)
    answer = submit.submit("kubectl", ["apply", "--filename", "-"], manifest)
    return _shown(args, {"answer": answer, "manifest": manifest}, answer)


def _ray(args: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    _check_run_dir(args, config)

    def command(meeting: str) -> list[str]:
        run_id = submit.job_name(config.name)
        return ["-m", _MODULE, *_node_arguments(args), "--rendezvous", meeting, "--run-id", run_id]

    if args.dry_run:
        text = f"on each of {args.nodes} nodes: {shlex.join(['python', *command('HOST:PORT')])}"
        return _shown(args, {"command": command("HOST:PORT")}, text)

    from longspan.cluster.ray_nodes import connect, run_on_nodes

    ray = connect(args.address)
    with collect_signals() as received:
        codes = run_on_nodes(
            ray,
            command,
            nodes=args.nodes,
            processes=args.nproc,
            gpus=ray.cluster_resources().get("GPU", 0) > 0,
            timeout_seconds=config.parallel.timeout_seconds,
            received=received,
        )
    bad = [code for code in codes if code != EXIT_OK]
    if bad:
        error = ClusterError(f"the run ended with exit codes {codes} on its nodes; their messages are above.")
        error.exit_code = bad[0]
        raise error
    return _shown(args, {"run_dir": args.run_dir, "exit_codes": codes}, f"finished: {args.run_dir}")


def _shown(args: argparse.Namespace, result: dict[str, Any], text: str) -> dict[str, Any]:
    if not args.json:
        print(text)
    return result
