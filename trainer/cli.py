"""The `longspan` command: arguments, dispatch, exit codes. Imports no torch, so that `--help` answers at once.

Each command lives in `trainer/commands/<module>.py` as `run(args) -> dict`; the dictionary is what `--json` prints
on the last line of standard output. A command prints its human summary to standard output itself unless `args.json`;
progress and logs go to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import select
import sys
import traceback
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from longspan import __version__
from longspan.cluster import exit_records
from longspan.errors import EXIT_OK, EXIT_READER_GONE, EXIT_UNEXPECTED, LongspanError, UsageError

Subparsers = Any  # argparse has no public name for what add_subparsers returns


# Idle OpenMP threads spin before they sleep. By default they spin so long that on a shared machine the one that is
# descheduled is waited for at full load: training becomes 15 times slower (docs/decisions/007). Read when torch loads.
OPENMP_SPIN_COUNT = "30000"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (docs/architecture.md)."""
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # not at the interpreter's end, which would complain
    except (OSError, _ReaderGone) as error:  # of standard output: everything else ends in `_run`
        gone = isinstance(error, _ReaderGone) or (isinstance(error, BrokenPipeError) and _reader_gone())
        reason = getattr(error, "strerror", None)
        message = "" if gone else f"cannot write to standard output: {reason}"
        exit_records.note(message or "nobody reads its output any more.")
        if message:
            print(f"longspan: {message}", file=sys.stderr, flush=True)
        _drop_output()
        return EXIT_READER_GONE if gone else EXIT_UNEXPECTED


class _ReaderGone(Exception):
    """Nobody reads standard output any more, as after `| head`."""


def _run(argv: list[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except UsageError as error:
        raise SystemExit(_fail("--json" in (sys.argv if argv is None else argv), str(error), error.exit_code)) from None
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
    try:
        result = importlib.import_module(f"longspan.trainer.commands.{args.module}").run(args)
    except LongspanError as error:
        return _fail(args.json, str(error), error.exit_code, error.done)
    except KeyboardInterrupt:
        return _fail(args.json, "interrupted", 130)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # so rich ends a program that nobody reads
            raise _ReaderGone from error
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            raise _ReaderGone from error
        traceback.print_exc()
        return _fail(args.json, f"unexpected {type(error).__name__}: {error}", EXIT_UNEXPECTED)
    exit_records.note(result=result)
    if args.json and os.environ.get("RANK", "0") == "0":  # one result, not one a rank
        print(json.dumps(result, allow_nan=False), flush=True)
    return EXIT_OK


_OUTPUTS = (1, 2)  # file descriptors of standard output and error


def _reader_gone() -> bool:
    """Whether standard output or error is a pipe that nobody reads, as after `| head`, and not some other pipe."""
    look = select.poll()
    for descriptor in _OUTPUTS:
        look.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in look.poll(0))


def _drop_output() -> None:
    """Let what is still buffered go nowhere: it would be written, and fail, when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in _OUTPUTS:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _fail(as_json: bool, message: str, exit_code: int, done: Mapping[str, Any] = MappingProxyType({})) -> int:
    exit_records.note(message)
    said = exit_records.to_say(message)
    if said is not None:
        print(f"longspan: {said}", file=sys.stderr, flush=True)
        if as_json:
            print(json.dumps({**done, "error": said, "exit_code": exit_code}), flush=True)
    return exit_code


class _Parser(argparse.ArgumentParser):
    """Leaves it to `main` to say what is wrong, since `--json` asks for an object then too."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError with `message`."""
        self.print_usage(sys.stderr)
        raise UsageError(f"{message}. See `{self.prog} --help`.")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="longspan", description="Long-context pretraining with recurrent memory.")
    parser.add_argument("--version", action="version", version=f"longspan {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _data,
        _train,
        _launch,
        _evaluate,
        _evals,
        _export,
        _generate,
        _report,
        _checkpoint,
        _plan,
        _bench,
        _doctor,
    ):
        add(commands)
    return parser


def _command(
    commands: Subparsers, name: str, module: str, help_text: str, sets: bool = False
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(module=module)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of standard output")
    if sets:
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="SECTION.FIELD=VALUE",
            dest="overrides",
            help="override a field",
        )
    return parser


def _data(commands: Subparsers) -> None:
    group = commands.add_parser("data", help="build, verify, inspect, merge and split shards")
    actions = group.add_subparsers(metavar="ACTION", required=True)
    build = _command(actions, "build", "data_build", "corpora -> shards + manifest", sets=True)
    build.add_argument("config", help="corpus recipe (YAML)")
    build.add_argument("--out", help="folder to write instead of the recipe's")
    build.add_argument("--processes", type=int, help="at most so many at once; the cores, up to 8, if not given")
    verify = _command(actions, "verify", "data_verify", "check every shard and document against the manifest")
    verify.add_argument("folder", help="folder that `data build` wrote")
    inspect = _command(actions, "inspect", "data_inspect", "sources, licences, counts and lengths of a corpus")
    inspect.add_argument("folder", help="folder that `data build` wrote")
    inspect.add_argument("--png", metavar="FILE", help="write the lengths as a picture there")
    merge = _command(actions, "merge", "data_merge", "several corpora of one tokenizer -> one corpus")
    merge.add_argument("out", help="folder to make")
    merge.add_argument("folders", nargs="+", metavar="FOLDER", help="corpora, two or more")
    split = _command(actions, "split", "data_split", "some sources, or other held-out documents -> a new corpus")
    split.add_argument("folder", help="folder that `data build` wrote")
    split.add_argument("--out", required=True, help="folder to make")
    split.add_argument("--sources", metavar="NAME,...", help="take the documents of these sources only")
    split.add_argument(
        "--hold-out",
        metavar="FILE|FRACTION",
        help="hold these documents out and no others: a file of ids, or a fraction of each source's bytes",
    )


def _train(commands: Subparsers) -> None:
    _train_options(_command(commands, "train", "train", "train a model in this process group", sets=True))


def _train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("config", help="training recipe (YAML)")
    train.add_argument("--run-dir", help="run directory; runs/NAME if not given")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint that verifies")
    train.add_argument("--init-from", metavar="CHECKPOINT|HF", help="start from another run's weights, or an export's")
    train.add_argument(
        "--fork-data",
        action="store_true",
        help="with --resume: go on with other source weights, segment, lanes or boundary than before",
    )


def _launch(commands: Subparsers) -> None:
    group = commands.add_parser("launch", help="train with several processes, here or on a cluster")
    targets = group.add_subparsers(metavar="TARGET", required=True)

    def add(name: str, help_text: str, restarts: int) -> argparse.ArgumentParser:
        launch = _command(targets, name, "launch", help_text, sets=True)
        launch.set_defaults(target=name)
        _train_options(launch)
        launch.add_argument("--nproc", type=int, metavar="N", help="processes on each node; its GPUs if not given")
        launch.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the run; 1 if not given")
        launch.add_argument(
            "--max-restarts", type=int, default=restarts, help=f"from the last checkpoint, after a fault; {restarts}"
        )
        launch.add_argument("--dry-run", action="store_true", help="print what would be started or submitted")
        return launch

    local = add("local", "torchrun on this node, with signals forwarded and exit codes kept", 0)
    local.add_argument("--rendezvous", metavar="HOST:PORT", help="where the launchers of several nodes meet")
    local.add_argument("--run-id", default="longspan", help="the same on all nodes of a run")
    slurm = add("slurm", "submit an sbatch script that saves and requeues itself at its time limit", 3)
    slurm.add_argument("--time", default="24:00:00", help="time limit of the job; 24:00:00 if not given")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="a further #SBATCH line, e.g. --sbatch=--mem=0"
    )
    ray = add("ray", "run on nodes of a Ray cluster", 3)
    ray.add_argument("--address", required=True, help="of the cluster: auto, HOST:PORT or ray://HOST:PORT")
    kubernetes = add("kubernetes", "submit a Kubernetes job with kubectl", 3)
    kubernetes.add_argument("--kind", choices=("pytorchjob", "rayjob"), default="pytorchjob", help="operator's job")
    kubernetes.add_argument("--image", required=True, help="container image with Longspan and the recipe")
    kubernetes.add_argument("--volume-claim", required=True, metavar="NAME", help="shared volume with corpora and runs")


def _evaluate(commands: Subparsers) -> None:
    evaluate = _command(
        commands, "evaluate", "evaluate", "perplexity versus context length of one checkpoint", sets=True
    )
    evaluate.add_argument("checkpoint", help="checkpoint folder, or run directory for its newest checkpoint")
    evaluate.add_argument("--spec", required=True, help="evaluation spec (YAML)")
    evaluate.add_argument("--out", help="folder for results; RUN/evals if not given")


def _evals(commands: Subparsers) -> None:
    group = commands.add_parser("evals", help="evaluate every committed checkpoint once, on Ray")
    actions = group.add_subparsers(metavar="ACTION", required=True)

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        action = _command(actions, name, f"evals_{name}", help_text, sets=True)
        action.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
        action.add_argument("--spec", action="append", required=True, help="evaluation spec (YAML); may be repeated")
        return action

    reconcile = add("reconcile", "evaluate what has no result yet")
    often = reconcile.add_mutually_exclusive_group(required=True)
    often.add_argument("--once", action="store_true", help="one pass, then exit")
    often.add_argument("--every", metavar="10m", help="a pass, a pause of so long, and again until a signal comes")
    reconcile.add_argument("--address", help="of a Ray cluster that runs; one of its own on this machine if not given")
    reconcile.add_argument("--workers", type=int, metavar="N", help="models in memory at once; the GPUs if not given")
    reconcile.add_argument("--gpus-per-worker", type=int, choices=(0, 1), help="1 if this machine has GPUs, else 0")
    reconcile.add_argument("--alert-worse-by", type=float, metavar="BITS", help="bits per byte above the best before")
    reconcile.add_argument("--alert-command", metavar="COMMAND", help="is run then, the alert as JSON on its input")
    add("status", "what each checkpoint's evaluation has come to")
    retry = add("retry", "let failed evaluations run again")
    retry.add_argument("--step", type=int, help="of this checkpoint alone")


def _export(commands: Subparsers) -> None:
    export = _command(commands, "export", "export", "write a Hugging Face folder with a model card")
    export.add_argument("checkpoint", help="checkpoint folder, or run directory for its newest checkpoint")
    export.add_argument("out", help="folder to write")
    export.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    export.add_argument("--push", metavar="OWNER/NAME", help="upload it to this repository of the Hugging Face hub")
    export.add_argument("--private", action="store_true", help="with --push: make the repository private")


def _generate(commands: Subparsers) -> None:
    generate = _command(commands, "generate", "generate", "continue a text")
    generate.add_argument("model", help="exported folder, checkpoint or run directory")
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=200)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 = greedy")
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=0)


def _report(commands: Subparsers) -> None:
    report = _command(commands, "report", "report", "one self-contained HTML page about a run, or comparing several")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directory; the first of several is the reference")
    report.add_argument("--out", metavar="FILE", help="RUN/report.html, or comparison.html beside RUN, if not given")


def _checkpoint(commands: Subparsers) -> None:
    group = commands.add_parser("checkpoint", help="verify and convert checkpoints")
    actions = group.add_subparsers(metavar="ACTION", required=True)
    verify = _command(actions, "verify", "checkpoint_verify", "check every file of a checkpoint against its manifest")
    verify.add_argument("checkpoint", help="checkpoint folder, or run directory for all of its checkpoints")
    convert = _command(
        actions, "convert", "checkpoint_convert", "checkpoint -> Hugging Face folder, or such a folder -> checkpoint"
    )
    convert.add_argument("source", help="exported folder, checkpoint folder or run directory")
    convert.add_argument("out", help="folder to write: an export, or a run directory with the checkpoint")
    convert.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def _plan(commands: Subparsers) -> None:
    plan = _command(commands, "plan", "plan", "parameters, memory and step time of a recipe, without a GPU", sets=True)
    plan.add_argument("config", help="training recipe, or a recipe of a model alone (YAML)")
    plan.add_argument("--hardware", default="h100", help="whose measured rates to use: configs/hardware/NAME.yaml")
    only = "for a recipe of a model alone: "
    plan.add_argument("--rows", type=int, metavar="B", help=f"{only}sequences of one step; 1 if not given")
    plan.add_argument(
        "--segment-tokens", type=int, metavar="N", help=f"{only}tokens of one sequence; 4096 if not given"
    )
    plan.add_argument(
        "--vocab-size", type=int, metavar="V", help=f"{only}rows of the embedding; the model's if not given"
    )
    plan.add_argument("--precision", help=f"{only}bf16 (the default) or fp32")
    plan.add_argument("--activation-checkpointing", help=f"{only}none (the default), mixer or layer")
    plan.add_argument(
        "--lanes", type=int, metavar="L", help=f"{only}sequences of one step over all GPUs; B a GPU if not given"
    )
    plan.add_argument("--optimizer", help=f"{only}none (the default), adamw or adafactor")
    plan.add_argument("--gpus", metavar="N,...", help="rank the layouts of so many GPUs: 8, 8,64 or 1..1024 (doubling)")
    plan.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="AXIS=VALUE,...",
        help="with --gpus: leave out other layouts; axes dp, cp, tp, zero_stage, state_slices, "
        "activation_checkpointing, micro_batch_lanes, offload_optimizer",
    )
    plan.add_argument("--plot", metavar="FILE", help="with --gpus: tokens/s over GPUs as a PNG")


def _bench(commands: Subparsers) -> None:
    group = commands.add_parser("bench", help="measure training and its kernels here, beside public ones")
    actions = group.add_subparsers(metavar="BENCHMARK", required=True)
    _command(actions, "list", "bench", "the benchmarks and their peers").set_defaults(benchmark="list")

    def add(name: str, help_text: str, *counts: str, races: bool = True) -> argparse.ArgumentParser:
        parser = _command(actions, name, "bench", help_text)
        parser.set_defaults(benchmark=name)
        for option in counts:
            parser.add_argument(option, type=int, help="sizes of the paper on a GPU, tiny ones on a CPU if not given")
        parser.add_argument("--precision", choices=("bf16", "fp32"), help="bf16 on a GPU, fp32 on a CPU if not given")
        if races:
            parser.add_argument("--peers", default="all", metavar="NAMES", help="all, none, or as in `bench list`")
            parser.add_argument("--no-peers", action="store_const", const="none", dest="peers", help="--peers none")
            parser.add_argument("--profile", metavar="FILE", help="write the most expensive kernels of one call there")
        default = "1.5 seconds of them" if races else "5"
        parser.add_argument("--repeat", type=int, help=f"timed calls; {default} if not given")
        parser.add_argument("--write-report", metavar="PAGE.md", help="append the results to this Markdown page")
        return parser

    step = add(
        "step", "a training step of whole models, forward and backward", "--rows", "--segment-tokens", "--vocab-size"
    )
    step.add_argument("--model", action="append", default=[], help="recipe's name or path; several: repeat, or commas")
    step.add_argument("--activation-checkpointing", choices=("none", "mixer", "layer"), default="none")
    step.add_argument("--dropout", type=float, default=0.0)
    step.add_argument("--optimizer", choices=("none", "adamw"), default="none", help="update weights in each step")
    step.add_argument("--in-turns", action="store_true", help="contenders take turns, all in memory: for close races")
    chain = add("block-recurrent", "state chain, and a whole recurrent mixer", "--rows", "--segment-tokens")
    chain.add_argument("--model", help="recipe whose first recurrent layer to take")
    add("window-attention", "sliding-window attention", "--rows", "--segment-tokens", "--window-tokens")
    add("cross-entropy", "output layer with its loss", "--tokens", "--dim", "--vocab-size")
    sizes = ("--rows", "--segment-tokens", "--ring-tokens")
    ranks = add("context-parallel", "one sequence over the GPUs of this machine", *sizes, races=False)
    ranks.add_argument("--nproc", type=int, default=2, metavar="N", help="processes, each with a GPU of its own; 2")
    ranks.add_argument("--parts", default="step,ring,linear", metavar="NAMES", help="some of step, ring and linear")
    ranks.add_argument("--model", help="recipe's name or path, for the step")
    ranks.add_argument("--state-slices", default="1,2", metavar="M,...", help="slices that hand their states on; 1,2")
    _bench_data(actions)


def _bench_data(actions: Subparsers) -> None:
    data = _command(actions, "data", "bench_data", "readers, seeking and encoding on this machine; needs no GPU")
    data.set_defaults(benchmark="data")
    data.add_argument("--corpus", metavar="DIR", help="what `data build` wrote; random token ids if not given")
    data.add_argument("--tokens", type=int, help="of a pass, and of the corpus that is made; 100 million if not given")
    data.add_argument("--repeat", type=int, help="passes; 3 if not given")
    data.add_argument("--peers", default="all", metavar="NAMES", help="all, none, or names as in `bench list`")
    data.add_argument("--no-peers", action="store_const", const="none", dest="peers", help="--peers none")
    data.add_argument("--write-report", metavar="PAGE.md", help="append the results to this Markdown page")


def _doctor(commands: Subparsers) -> None:
    _command(commands, "doctor", "doctor", "what works on this machine, and the fix for what does not")


if __name__ == "__main__":
    sys.exit(main())
