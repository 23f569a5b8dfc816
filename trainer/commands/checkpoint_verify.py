"""`longspan checkpoint verify`: check every file of one checkpoint, or of all checkpoints of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.manifest import COMMITTED, committed_folders
from longspan.trainer.checkpoint.places import Place, place_of
from longspan.trainer.checkpoint.verify import checked_manifest, checkpoints_of, newest


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Verify `args.checkpoint`.

    Returns:
        `{"checkpoints": [{"path", "step", "num_files", "num_bytes", "fingerprint"}, ...]}`, oldest first.

    Raises:
        UsageError: neither a checkpoint nor a run directory with one.
        CheckpointError: at least one does not verify; names every damaged file and byte range of all of them.
    """
    path = place_of(args.checkpoint)
    folders: list[Place] = [path] if (path / COMMITTED).is_file() else committed_folders(checkpoints_of(path))
    folders = folders or [newest(Path(args.checkpoint))]  # raises: nothing there
    results, problems = [], []
    for folder in folders:
        try:
            manifest, fingerprint = checked_manifest(folder)
        except CheckpointError as error:
            problems.append(str(error))
            _say(args, f"DAMAGED   {folder}")
            continue
        sizes = [entry.size for entry in manifest.files.values()]
        results.append(
            {
                "path": str(folder),
                "step": manifest.step,
                "num_files": len(sizes),
                "num_bytes": sum(sizes),
                "fingerprint": fingerprint,
            }
        )
        _say(args, f"verified  {folder}  step {manifest.step}, {len(sizes)} files, {sum(sizes):,} bytes")
    if problems:
        raise CheckpointError(f"{len(problems)} of {len(folders)} checkpoints damaged.\n" + "\n".join(problems))
    return {"checkpoints": results}


def _say(args: argparse.Namespace, line: str) -> None:
    if not args.json:
        print(line, flush=True)
