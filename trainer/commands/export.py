"""`longspan export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longspan.trainer.export import export_checkpoint


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the Hugging Face folder; the result says where it is and what it holds."""
    result = export_checkpoint(Path(args.checkpoint), Path(args.out), overwrite=args.overwrite)
    if not args.json:
        evaluation = "with its evaluation" if result["evaluation"] else "not evaluated yet"
        print(f"{result['out']}: step {result['step']:,}, {result['parameters']:,} parameters, {evaluation}")
        print("Load it with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True), or try it:")
        print(f"  longspan generate {result['out']} --prompt 'In the beginning'")
    return result
