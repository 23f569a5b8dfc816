"""`longspan data build`: a corpus recipe to shards, manifest and statistics."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from longspan.data_pipeline.build import BuildResult, build_corpus
from longspan.data_pipeline.corpus_config import CorpusConfig, corpus_problems
from longspan.trainer import recipes

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
    config = recipes.load(CorpusConfig, args.config, args.overrides, corpus_problems)
    console = Console(file=sys.stderr)
    with console.status("building") as status:

        def progress(line: str) -> None:
            # a terminal gets one line that changes, a log file one line each
            if console.is_terminal:
                status.update(Text(line))
            else:
                _print(console, line)

        result = build_corpus(config, Path(args.out or config.out or f"corpora/{config.name}"), progress)
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


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _summary(result: BuildResult) -> str:
    lines = [
        f"{result.folder}: {_OUTCOMES[result.outcome]}",
        "",
        f"{'source':<16}{'split':<10}{'documents':>10}{'bytes':>16}",
    ]
    for source, splits in result.statistics["counts"].items():
        for split, cell in splits.items():
            lines.append(f"{source:<16}{split:<10}{cell['documents']:>10,}{cell['bytes']:>16,}")
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
