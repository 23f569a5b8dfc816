"""`longspan data merge`: several corpora of one tokenizer to one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from longspan.data_pipeline.corpus_tools.merge import merge_corpora


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Merge the corpora at `args.folders` into a new one at `args.out`.

    Raises:
        UsageError: they cannot go together, or something is at `args.out`. DataError: a shard is damaged.
    """
    folders = [Path(folder) for folder in args.folders]
    manifest = merge_corpora(Path(args.out), folders, lambda line: print(line, file=sys.stderr))
    result = {
        "folder": str(args.out),
        "merged": [str(folder) for folder in folders],
        "digest": manifest.digest,
        "sources": [source.name for source in manifest.sources],
        "shards": len(manifest.shards),
        "documents": len(manifest.documents),
        "bytes": int(manifest.documents.num_bytes.sum()),
        "tokens": int(manifest.documents.num_tokens.sum()),
    }
    if not args.json:
        print(
            f"{args.out}: {result['documents']:,} documents ({result['bytes']:,} bytes, {result['tokens']:,} tokens) "
            f"of {len(folders)} corpora in {result['shards']:,} shards, manifest digest {manifest.digest[:16]}"
        )
    return result
