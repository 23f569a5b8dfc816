"""`longspan data build`: a corpus recipe to shards, manifest and statistics."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeElapsedColumn

from longspan.data_pipeline.build import BuildResult, build_corpus
from longspan.data_pipeline.corpus_config import CorpusConfig, corpus_problems
from longspan.errors import UsageError
from longspan.trainer import recipes

_LOG_SECONDS = 10.0
_MOST_PROCESSES = 8  # more of them wait for the disk
_OUTCOMES = {
    "built": "built",
    "replaced": "built; it replaces another corpus",
    "reused": "reused: the corpus there is already identical",
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build the corpus of the recipe `args.config`; returns counts, figures, digest and outcome.

    Raises:
        ConfigError, UsageError: recipe or inputs are wrong; nothing was written.
    """
    if args.processes is not None and args.processes < 1:
        raise UsageError(f"--processes {args.processes}: at least 1 process builds; leave it out for one a core.")
    config = recipes.load(CorpusConfig, args.config, args.overrides, corpus_problems)
    console = Console(file=sys.stderr)
    out = Path(args.out or config.out or f"corpora/{config.name}")
    with _Display(console) as display:
        result = build_corpus(config, out, display.say, display.bar, args.processes or _default_processes())
    for note in result.notes:
        _print(console, f"note: {note}")
    if not args.json:
        print(_summary(result))
    return {
        "folder": str(result.folder),
        "outcome": result.outcome,
        "digest": result.manifest.digest,
        "shards": len(result.manifest.shards),
        "documents": len(result.manifest.documents),
        **result.statistics,
    }


class _Display:
    """A bar on a terminal; in a log file a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._stage, self._told = "", 0.0

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """One line about a finished part of the work."""
        _print(self._console, line)

    def bar(self, stage: str, done: int, total: int) -> None:
        """Where the stage is, in bytes."""
        if self._console.is_terminal:
            if self._task is None:
                self._task = self._progress.add_task(stage)
            self._progress.update(self._task, description=stage, completed=done, total=total)
            return
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._told = stage, now
        elif now - self._told >= _LOG_SECONDS:
            self._told = now
            _print(self._console, f"{stage}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")


def _default_processes() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _summary(result: BuildResult) -> str:
    lines = [
        f"{result.folder}: {_OUTCOMES[result.outcome]}",
        "",
        f"{'source':<16}{'split':<10}{'documents':>10}{'bytes':>16}{'tokens':>16}",
    ]
    for source, splits in result.statistics["counts"].items():
        for split, cell in splits.items():
            lines.append(f"{source:<16}{split:<10}{cell['documents']:>10,}{cell['bytes']:>16,}{cell['tokens']:>16,}")
    train = result.statistics["totals"]["train"]
    duplicates = result.statistics["duplicates"]
    lines += [
        "",
        f"{result.manifest.vocabulary.name} tokens: {train['bytes_per_token']:.3f} bytes each in training; "
        f"{duplicates['groups']} groups of documents that belong together, {duplicates['copies']} copies",
    ]
    held_out = result.statistics["held_out"]
    if held_out:
        lines += [
            "",
            f"held-out documents: unigram byte entropy {held_out['unigram_bits_per_byte']:.3f} bits per byte, "
            f"xz -9 reaches {held_out['xz_bits_per_byte']:.3f} (each document by itself)",
        ]
    manifest = result.manifest
    lines.append(f"{len(manifest.shards)} shards, manifest digest {manifest.digest[:16]}")
    return "\n".join(lines)
