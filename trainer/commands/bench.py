"""`longspan bench`: measure training and its kernels here, beside their peers."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import shlex
import time
from collections.abc import Callable
from typing import Any

from longspan.errors import ClusterError
from longspan.trainer.bench.catalogue import BENCHMARKS
from longspan.trainer.bench.context_parallel.settings import read_context_parallel_settings
from longspan.trainer.bench.settings import Common, read_settings

# given by the parser, not by the user
_NOT_OPTIONS = {"module", "benchmark", "json"}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table unless `args.json`, write what was asked for; the result is `Result.as_dict`.

    Raises:
        ConfigError: options are wrong; lists every problem. UsageError: this machine has too few GPUs for them.
        ClusterError: something of our own did not run; everything else was measured, printed and written before.
    """
    if args.benchmark == "list":
        return _list(show=not args.json)
    read: Callable[..., Common]
    read = read_context_parallel_settings if args.benchmark == "context-parallel" else read_settings
    read(args, on_gpu=False)  # what is wrong is said before torch is loaded
    import torch

    on_gpu = torch.cuda.is_available()
    settings = read(args, on_gpu)
    from longspan.trainer.bench import table

    result = _measure(args, settings, torch.device("cuda" if on_gpu else "cpu"))
    if not args.json:
        table.print_result(result)
    if settings.report is not None:
        table.append_report(result, settings.report)
    if result.failures:
        if args.json:
            print(json.dumps(result.as_dict(), allow_nan=False), flush=True)
        failed = "; ".join(f"{row.case}: {row.note}" for row in result.failures)
        raise ClusterError(f"{len(result.failures)} of our own rows failed: {failed}. Tracebacks, if any, are above.")
    return result.as_dict()


def _list(show: bool) -> dict[str, Any]:
    if show:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:<18}{benchmark.measures}")
            for peer, about in benchmark.peers.items():
                print(f"{'':<18}  peer {peer}: {about}")
    entries = [{"name": name, "measures": b.measures, "peers": b.peers} for name, b in BENCHMARKS.items()]
    return {"benchmarks": entries}


def _measure(args: argparse.Namespace, settings: Common, device: Any) -> Any:
    """The `Result` of one benchmark."""
    import torch

    from longspan.kernels.backend import choose
    from longspan.trainer.bench import environment
    from longspan.trainer.bench.contender import Session
    from longspan.trainer.bench.result import Result

    started = time.monotonic()
    kernels = choose("bench", torch.empty(0, device=device))  # a choice that cannot be is told before anything runs
    caches = environment.compile_caches()
    session = Session(settings, device)
    benchmark = importlib.import_module(f"longspan.trainer.bench.{BENCHMARKS[args.benchmark].module}")
    measured = benchmark.measure(settings, session)
    if session.profile is not None and settings.profile is not None:
        session.profile.write(settings.profile)
    notes = measured.notes
    if device.type != "cuda":
        notes = [*notes, "On a CPU: tiny sizes and plain PyTorch references. A smoke test, not a result."]
    return Result(
        benchmark=args.benchmark,
        command=command_line(args),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=environment.describe_device(device),
        versions=environment.versions(),
        kernels=kernels,
        settings=_plain(settings),
        ceilings=dataclasses.asdict(session.ceilings),
        rows=tuple(measured.rows),
        ratios=tuple(measured.ratios),
        first_step_seconds=session.first_step_seconds,
        compile_caches_at_start=caches,
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


def command_line(args: argparse.Namespace) -> str:
    """The command that gives these arguments, without where its files went."""
    words = ["longspan", "bench", args.benchmark]
    for name, value in vars(args).items():
        if name in _NOT_OPTIONS or name in ("profile", "write_report") or value in (None, []):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] if value else []
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [option, str(one)]
    return shlex.join(words)


def _plain(settings: Common) -> dict[str, Any]:
    """Settings as data for JSON: models by their fields; where files go is left out."""

    def plain(value: Any) -> Any:
        if hasattr(value, "model_dump"):
            return value.model_dump(mode="json")
        if isinstance(value, tuple):
            return [plain(part) for part in value]
        return value

    names = (field.name for field in dataclasses.fields(settings))
    return {name: plain(getattr(settings, name)) for name in names if name not in ("profile", "report")}
