"""Which checkpoint of a run is the best: a rule that does not move for noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longspan.trainer.evaluation.bootstrap import DocumentBootstrap
from longspan.trainer.evaluation.folders import LOGGED, read_results
from longspan.trainer.evaluation.specs import Spec, TaskSpec


def best_of(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best result by bits per byte of mode `carried`.

    In order of steps, a checkpoint takes the place of the best one so far only if the interval of their paired
    difference over documents lies below zero. So the answer does not depend on the order of evaluation.

    Args:
        results: result.json of checkpoints of one run, with one spec.

    Returns:
        One of them; None if there are none.
    """
    best: dict[str, Any] | None = None
    for result in sorted(results, key=lambda entry: (entry["checkpoint"]["step"], entry["key"])):
        if best is None or _is_better(result, best):
            best = result
    return best


def follow(evals: Path, spec: Spec, move: Callable[[list[dict[str, Any]], dict[str, Any]], bool]) -> None:
    """Move the registry's alias if the best checkpoint of a run and spec has changed.

    Args:
        evals: RUN/evals.
        spec: of the results.
        move: tells the registry all results and the best one; whether it took that.
    """
    if isinstance(spec, TaskSpec):  # has no bits per byte of documents to compare
        return
    results = [result for folder, result in read_results(evals, spec) if (folder / LOGGED).exists()]
    best, marker = best_of(results), evals / f"best-{spec.digest[:8]}"
    if best is None or (marker.exists() and marker.read_text(encoding="utf-8") == best["key"]):
        return
    if move(results, best):
        marker.write_text(best["key"], encoding="utf-8")


def _is_better(result: dict[str, Any], best: dict[str, Any]) -> bool:
    if result["carried"]["bits_per_byte"] >= best["carried"]["bits_per_byte"]:
        return False
    new, old = _by_document(result), _by_document(best)
    if new.keys() != old.keys():  # another corpus: not comparable, so the place is kept
        return False
    names, spec = sorted(new), result["spec"]
    bootstrap = DocumentBootstrap(
        np.array([new[name][1] for name in names]),
        spec["bootstrap_samples"],
        spec["seed"],
        confidence=spec["confidence"],
    )
    difference = bootstrap.difference(
        np.array([new[name][0] for name in names]), np.array([old[name][0] for name in names])
    )
    return difference.ci_high is not None and difference.ci_high < 0


def _by_document(result: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Nats and bytes of each document's targets, mode `carried`."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for score in result["scores"]:
        if score["mode"] == "carried":
            sums[score["document"]][0] += score["nats"]
            sums[score["document"]][1] += score["bytes"]
    return {name: (nats, int(count)) for name, (nats, count) in sums.items()}
