"""From counts to the result.json of a synthetic task, its table and its picture.

result.json has key, kind ("synthetic"), protocol, spec, spec_digest, checkpoint, model, environment and seconds as that
of perplexity versus length, and

    tests     [{test, low, high, right, total, errors, accuracy, ci_low, ci_high, seeds: [{seed, the same}]}]
              low, high: sizes of the samples; errors = total - right; 95% intervals: Wilson's, the rule of three where
              nothing or everything is wrong; the first numbers are over all seeds
    carried   loss on the answers alone: bits_per_byte of their bytes with ci_low and ci_high over documents (null with
              fewer than two), nats_per_token, perplexity_per_token, context_min, context_max
    curve     always empty, swapped always null: nothing is measured by context length
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data_pipeline.synthetic.scoring import interval
from longspan.trainer.evaluation.bootstrap import DocumentBootstrap
from longspan.trainer.evaluation.result import perplexity
from longspan.trainer.evaluation.specs import TaskSpec
from longspan.trainer.evaluation.task_documents import Tally, TaskDocument, size_bins

_RESAMPLES = 2000


def summarise_tasks(tallies: Sequence[Tally], documents: Sequence[TaskDocument], spec: TaskSpec) -> dict[str, Any]:
    """The measured part of result.json (see the module's text).

    Args:
        tallies: of all documents. documents: that they number. spec: test sets and seeds.
    """
    tests = []
    for test in spec.test_names:
        for number in range(len(size_bins(spec))):
            mine = [t for t in tallies if t.bin == number and documents[t.document].test == test]
            if not mine:
                continue
            by_seed = {seed: [t for t in mine if documents[t.document].seed == seed] for seed in spec.seeds}
            tests.append(
                {
                    "test": test,
                    **_sizes(mine, documents, size_bins(spec)[number]),
                    **_accuracy(mine),
                    "seeds": [{"seed": seed, **_accuracy(of_seed)} for seed, of_seed in by_seed.items() if of_seed],
                }
            )
    return {
        "tests": tests,
        "carried": _loss(tallies, documents),
        "swapped": None,
        "curve": [],
        "num_documents": len(documents),
        "target_tokens": sum(tally.tokens for tally in tallies),
        "target_bytes": sum(tally.bytes for tally in tallies),
    }


def _sizes(tallies: list[Tally], documents: Sequence[TaskDocument], limits: tuple[int, int]) -> dict[str, int]:
    sizes = np.concatenate([documents[tally.document].made.sizes for tally in tallies])
    inside = sizes[(sizes >= limits[0]) & (sizes <= limits[1])]
    return {"low": int(inside.min()), "high": int(inside.max())}


def _accuracy(tallies: list[Tally]) -> dict[str, Any]:
    right, total = sum(tally.right for tally in tallies), sum(tally.total for tally in tallies)
    low, high = interval(right, total)
    return {
        "right": right,
        "total": total,
        "errors": total - right,
        "accuracy": right / total,
        "ci_low": low,
        "ci_high": high,
    }


def _loss(tallies: Sequence[Tally], documents: Sequence[TaskDocument]) -> dict[str, Any]:
    numbers = sorted({tally.document for tally in tallies})
    nats = [math.fsum(tally.nats for tally in tallies if tally.document == d) for d in numbers]
    sizes = [sum(tally.bytes for tally in tallies if tally.document == d) for d in numbers]
    rate = DocumentBootstrap(np.array(sizes), _RESAMPLES, seed=0).rate(np.array(nats))
    nats_per_token = math.fsum(nats) / sum(tally.tokens for tally in tallies)
    return {
        **rate.as_dict(),
        "nats_per_token": nats_per_token,
        "perplexity_per_token": perplexity(nats_per_token),
        "context_min": 1,
        "context_max": max(len(documents[d].tokens) for d in numbers),
    }


def task_table(result: dict[str, Any]) -> str:
    """Right and wrong samples of each test set as text: over all seeds, then seed by seed."""
    head = f"{'test set':>20}  {'sizes':>15}  {'errors':>7}  {'samples':>8}  {'right':>8}  95% interval of right"
    lines = [f"Samples of {result['spec']['suite']} with every answer right, step {result['checkpoint']['step']}", head]
    for entry in result["tests"]:
        lines.append(_line(entry["test"], f"{entry['low']:,}-{entry['high']:,}", entry))
        if len(entry["seeds"]) > 1:
            lines += [_line(f"seed {seed['seed']}", "", seed) for seed in entry["seeds"]]
    return "\n".join(lines)


def _line(name: str, sizes: str, entry: dict[str, Any]) -> str:
    span = f"{entry['ci_low']:.4f} .. {entry['ci_high']:.4f}"
    return f"{name:>20}  {sizes:>15}  {entry['errors']:7,}  {entry['total']:8,}  {entry['accuracy']:8.4f}  {span}"


def task_png(result: dict[str, Any], path: Path) -> None:
    """Share of right samples of each test set with its interval, and every seed as a point, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    entries = result["tests"]
    for x, entry in enumerate(entries):
        axes.plot([x, x], [entry["ci_low"], entry["ci_high"]], color="#1f5fa8", linewidth=5, alpha=0.3)
        axes.plot(x, entry["accuracy"], "o", color="#1f5fa8", label="all seeds, 95% interval" if x == 0 else None)
        seeds = [seed["accuracy"] for seed in entry["seeds"]]
        places = x + np.linspace(0.12, 0.3, len(seeds))
        axes.plot(places, seeds, "x", color="#8a6d3b", label="each seed" if x == 0 else None)
    labels = [f"{entry['test']}\n{entry['low']:,}-{entry['high']:,}" for entry in entries]
    axes.set_xticks(range(len(entries)), labels, fontsize=8, rotation=45 if len(entries) > 6 else 0)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("samples with every answer right")
    axes.set_title(f"{result['spec']['suite']}: {result['checkpoint']['run']}, step {result['checkpoint']['step']}")
    axes.grid(alpha=0.25, axis="y")
    axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
