"""`longspan data inspect`: what a corpus holds, as a table, as JSON and as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longspan.data_pipeline.corpus_tools.picture import save_picture, summary_text
from longspan.data_pipeline.corpus_tools.summary import summarise


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the manifest of the corpus at `args.folder`; no shard is read.

    Raises:
        UsageError: no corpus there, or the picture cannot be written. DataError: the manifest is damaged.
    """
    summary = summarise(args.folder)
    if args.png is not None:
        save_picture(summary, Path(args.png))
        summary["png"] = args.png
    if not args.json:
        print(summary_text(summary))
    return summary
