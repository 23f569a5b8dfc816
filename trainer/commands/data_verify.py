"""`longspan data verify`: every shard and document against the manifest."""

from __future__ import annotations

import argparse
from typing import Any

from longspan.data_pipeline.verify import verify_corpus


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check the corpus at `args.folder`.

    Raises:
        UsageError: no corpus there. DataError: damage; names shard, document and offset.
    """
    result = verify_corpus(args.folder)
    manifest = result.manifest
    if not args.json:
        print(
            f"{args.folder}: {len(manifest.documents):,} documents in {len(manifest.shards):,} shards "
            f"({result.num_bytes:,} bytes) match manifest digest {manifest.digest[:16]}"
        )
    return {
        "folder": str(args.folder),
        "documents": len(manifest.documents),
        "shards": len(manifest.shards),
        "bytes": result.num_bytes,
        "digest": manifest.digest,
    }
