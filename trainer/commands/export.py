"""`longspan export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longspan.errors import UsageError
from longspan.trainer.export import export_checkpoint


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the Hugging Face folder and push it if asked to; the result says where it is and what it holds.

    Raises:
        UsageError: --private without --push; what `export_checkpoint` and `check_repository` refuse.
    """
    if args.private and not args.push:
        raise UsageError("--private says how a repository is made, and nothing is pushed. Add --push OWNER/NAME.")
    if args.push:
        from longspan.trainer.export_push import check_repository

        check_repository(args.push)
    result = export_checkpoint(Path(args.checkpoint), Path(args.out), overwrite=args.overwrite)
    if not args.json:
        evaluation = "with its evaluation" if result["evaluation"] else "not evaluated yet"
        print(f"{result['out']}: step {result['step']:,}, {result['parameters']:,} parameters, {evaluation}")
        print("Load it with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True), or try it:")
        print(f"  longspan generate {result['out']} --prompt 'In the beginning'")
    if args.push:
        from longspan.trainer.export_push import push_folder

        message = f"Step {result['step']}, checkpoint {result['fingerprint'][:16]}"
        result["pushed"] = push_folder(Path(args.out), args.push, private=args.private, message=message)
        if not args.json:
            print(f"pushed: {result['pushed']}")
    return result
