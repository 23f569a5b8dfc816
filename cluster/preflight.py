"""Before ranks form groups: whether they are of one mind about configuration, code and devices.

Every rank compares itself with rank 0 and puts what it found into the store that the ranks meet in; rank 0 collects
and everybody reads the verdict, so all ranks end alike, with one message. It costs each rank four small messages.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import socket
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longspan.cluster import exit_records
from longspan.errors import UsageError

_LOG = logging.getLogger("longspan.cluster.preflight")
_PACKAGES = ("torch", "numpy", "deepspeed", "megatron-core", "triton", "safetensors", "longspan")
_MOST_LISTED = 20
_LINGER_SECONDS = 10.0
_ASK_SECONDS = 0.05


def describe_rank(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """What one rank says about itself.

    Args:
        settings: nested configuration that has to be the same on all ranks, JSON values only.
        kind: "cpu" or "cuda".
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    problem = None
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        problem = (
            f"has {torch.cuda.device_count()} GPUs, but process {local_rank + 1} on it needs one of its own; "
            f"start at most one process a GPU (--nproc {torch.cuda.device_count()})"
        )
    return {
        "host": socket.gethostname(),
        "kind": kind,
        "problem": problem,
        "settings": settings,
        "versions": versions(),
    }


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, and a digest of Longspan's own source."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for room in ("trainer", "modeling", "data_pipeline", "cluster", "kernels"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    found["longspan's source"] = digest.hexdigest()[:12]
    return found


def check_ranks(store: dist.Store, rank: int, world_size: int, mine: dict[str, Any], timeout_seconds: float) -> None:
    """Compare all ranks; every rank calls it.

    Args:
        store: where the ranks meet.
        rank, world_size: this process among them.
        mine: what `describe_rank` returned here.
        timeout_seconds: longest wait for the others.

    Raises:
        UsageError: on all ranks: settings, kinds of device or WORLD_SIZE differ (names ranks and fields), or a host
            has fewer GPUs than processes.
        UsageError: another process has this RANK already; or WORLD_SIZE is so different that rank 0 does not know of
            this rank.
        UsageError: on all ranks that are there: others did not come in time (names them).
        ClusterError: the same, and the launcher starts all ranks again.
    """
    store = dist.PrefixStore("longspan-preflight", store)
    _take_place(store, rank, world_size, mine["host"])
    if rank == 0:
        store.set("reference", json.dumps({**mine, "world_size": world_size}))
    reference = json.loads(_read(store, "reference", timeout_seconds))
    if rank >= reference["world_size"]:
        raise UsageError(
            f"WORLD_SIZE = {world_size} for rank {rank} on host {mine['host']}, but {reference['world_size']} for "
            f"rank 0, which waits for no such rank. Set the same on all ranks."
        )
    report = {
        "where": f"rank {rank} on host {mine['host']}",
        "problem": mine["problem"],
        "settings": [
            f"{name}: {ours} there, {theirs} on rank 0"
            for name, theirs, ours in _differences(
                {"WORLD_SIZE": reference["world_size"], "device": reference["kind"], **reference["settings"]},
                {"WORLD_SIZE": world_size, "device": mine["kind"], **mine["settings"]},
            )
        ],
        "versions": [
            f"{name} {ours} there, {theirs} on rank 0"
            for name, theirs, ours in _differences(reference["versions"], mine["versions"])
        ],
    }
    store.set(f"report/{rank}", json.dumps(report))
    if rank == 0:
        store.set("verdict", json.dumps(_collect(store, world_size, timeout_seconds)))
    # rank 0 itself may use up the whole timeout
    verdict = json.loads(_read(store, "verdict", 2 * timeout_seconds))
    exit_records.meet()
    store.set(f"read/{rank}", "")
    if rank == 0:
        # the store ends with this process, and so may this process whatever the verdict: first the others read from it
        present = [other for other in range(world_size) if other not in verdict["missing"]]
        _come(store, [f"read/{other}" for other in present], _LINGER_SECONDS)
    for line in verdict["warnings"]:
        _LOG.warning(line)
    if verdict["missing"] and not verdict["problems"]:
        names = ", ".join(_shortened([str(number) for number in verdict["missing"]]))
        raise exit_records.never_met(
            f"rank{'s' if len(verdict['missing']) > 1 else ''} {names} of {world_size} did not come within "
            f"{timeout_seconds:.0f} s. Look at their own messages, or wait longer with parallel.timeout_seconds."
        )
    if verdict["problems"]:
        raise UsageError(
            "the ranks cannot train together:\n  "
            + "\n  ".join(verdict["problems"])
            + "\nStart all of them with the same configuration and arguments, on hosts of one kind."
        )


def _collect(store: dist.Store, world_size: int, timeout_seconds: float) -> dict[str, list[Any]]:
    """On rank 0: what is wrong with any rank."""
    problems, warnings, missing = [], [], []
    if not _come(store, [f"report/{rank}" for rank in range(world_size)], timeout_seconds):
        missing = [rank for rank in range(world_size) if not store.check([f"report/{rank}"])]
    for rank in [rank for rank in range(world_size) if rank not in missing]:
        report = json.loads(store.get(f"report/{rank}"))
        if report["problem"]:
            problems.append(f"{report['where']} {report['problem']}")
        problems += [f"{report['where']} differs in {line}" for line in report["settings"]]
        if report["versions"]:
            warnings.append(
                f"{report['where']} runs other versions: {'; '.join(report['versions'])}. "
                f"Results may differ; install the same on all hosts."
            )
    return {"problems": _shortened(problems), "warnings": _shortened(warnings), "missing": missing}


def _take_place(store: dist.Store, rank: int, world_size: int, host: str) -> None:
    """Say that this process is `rank`, unless another one has: it would wait for ever for those that it met twice.

    Raises:
        UsageError: another process has.
    """
    me = f"process {os.getpid()} on host {host}"
    holder = store.compare_set(f"place/{rank}", "", me).decode()
    if holder != me:
        raise UsageError(
            f"two processes have RANK = {rank} of {world_size}: {holder}, and {me}, which ends. Give each its own."
        )


def _read(store: dist.Store, key: str, timeout_seconds: float) -> bytes:
    """What rank 0 put there; raises if it does not."""
    if not _come(store, [key], timeout_seconds):
        raise exit_records.never_met(f"rank 0 said nothing within {timeout_seconds:.0f} s. Look at its own message.")
    return bytes(store.get(key))


def _come(store: dist.Store, keys: list[str], timeout_seconds: float) -> bool:
    """Whether all keys are there within the timeout.

    Asks again and again: no signal gets through while a process is in the store's own `wait`.
    """
    deadline = time.monotonic() + timeout_seconds
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(_ASK_SECONDS)
    return True


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= _MOST_LISTED:
        return lines
    return [*lines[:_MOST_LISTED], f"and {len(lines) - _MOST_LISTED} more"]


def _differences(theirs: Any, ours: Any, where: str = "") -> list[tuple[str, str, str]]:
    """(dotted field, value of rank 0, value here) of every field that differs."""
    if isinstance(theirs, list) and isinstance(ours, list):
        theirs, ours = ({str(index): value for index, value in enumerate(values)} for values in (theirs, ours))
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = [*theirs, *(name for name in ours if name not in theirs)]
        prefix = f"{where}." if where else ""
        return [found for name in names for found in _differences(theirs.get(name), ours.get(name), f"{prefix}{name}")]
    return [] if theirs == ours else [(where, str(theirs), str(ours))]
