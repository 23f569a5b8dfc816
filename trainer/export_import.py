"""An exported folder as a run directory with one checkpoint, whose weights are exactly those of the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.errors import CheckpointError
from longspan.trainer import recipes
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import CHECKPOINTS, fingerprint
from longspan.trainer.export_folder import check_target, published
from longspan.trainer.export_origin import read_export

CONVERTED = "converted.json"


def import_export(source: Path, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Make a run directory of an exported folder; nothing stands at `out` before all of it is written.

    Its checkpoint serves evaluation, export, generation and `train --init-from`. It has no optimizer state, so that
    no run can be resumed from it.

    Args:
        source: exported folder. out: run directory to make.
        overwrite: replace `out` if it was made in this way (or is empty).

    Returns:
        Where it is and what it holds.

    Raises:
        UsageError: `source` is no export, or `out` exists or cannot be written.
        CheckpointError: `source` does not hold what it was written with, or the disk is full.
    """
    check_target(out, overwrite, CONVERTED)
    found = read_export(source)
    state = RunState(
        step=found.step,
        weights=found.weights,
        optimizer={},
        lanes=None,
        lane_start=0,
        lane_stop=0,
        data=found.data,
        rng={},
        counters={**found.counters, "converted_from": found.fingerprint},
        config_yaml=recipes.dump(found.config),
        tokenizer=found.tokenizer_files,
    )
    with published(out, overwrite, CONVERTED) as folder:
        (folder / "config.yaml").write_text(state.config_yaml, encoding="utf-8")
        note = {"export": source.name, "fingerprint": found.fingerprint}
        (folder / CONVERTED).write_text(json.dumps(note) + "\n", encoding="utf-8")
        saved = CheckpointStore(folder / CHECKPOINTS).save(state)
        if not saved.ok or saved.path is None:
            raise CheckpointError(f"{out} could not be written: {saved.error}")
        name = saved.path.name
    checkpoint = out / CHECKPOINTS / name
    return {
        "out": str(out),
        "checkpoint": str(checkpoint),
        "fingerprint": fingerprint(checkpoint),
        "step": found.step,
        "parameters": sum(tensor.numel() for tensor in found.weights.values()),
    }
