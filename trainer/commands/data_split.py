"""`longspan data split`: some sources of a corpus, or other held-out documents, as a corpus of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from longspan.data_pipeline.corpus_tools.split import HoldOut, split_corpus


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write a new corpus at `args.out` from the one at `args.folder`.

    Raises:
        UsageError: `args.sources` or `args.hold_out` do not fit the corpus, or something is at `args.out`.
        DataError: a document is damaged.
    """
    sources = None if args.sources is None else [name.strip() for name in args.sources.split(",") if name.strip()]
    manifest = split_corpus(
        Path(args.folder),
        Path(args.out),
        sources=sources,
        hold_out=None if args.hold_out is None else HoldOut.parse(args.hold_out),
        progress=lambda line: print(line, file=sys.stderr),
    )
    held_out = len(manifest.places("held_out"))
    result = {
        "folder": str(args.out),
        "of": str(args.folder),
        "digest": manifest.digest,
        "sources": [source.name for source in manifest.sources],
        "shards": len(manifest.shards),
        "documents": len(manifest.documents),
        "held_out": held_out,
        "bytes": int(manifest.documents.num_bytes.sum()),
        "tokens": int(manifest.documents.num_tokens.sum()),
    }
    if not args.json:
        print(
            f"{args.out}: {result['documents']:,} documents ({held_out:,} held out; {result['bytes']:,} bytes, "
            f"{result['tokens']:,} tokens) in {result['shards']:,} shards, manifest digest {manifest.digest[:16]}"
        )
    return result
