"""`longspan checkpoint convert`: a checkpoint -> a Hugging Face folder, or such a folder -> a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longspan.trainer.export_origin import is_exported


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert `args.source` into the other form at `args.out`; the result says which, and where."""
    source, out = Path(args.source), Path(args.out)
    if is_exported(source):
        from longspan.trainer.export_import import import_export

        result = {"to": "checkpoint", **import_export(source, out, overwrite=args.overwrite)}
    else:
        # transformers takes seconds to load, and only this way needs it
        from longspan.trainer.export import export_checkpoint

        result = {"to": "export", **export_checkpoint(source, out, overwrite=args.overwrite)}
    if not args.json:
        where = result["checkpoint"] if result["to"] == "checkpoint" else result["out"]
        print(f"{where}: step {result['step']:,}, {result['parameters']:,} parameters")
    return result
