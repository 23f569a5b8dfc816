"""What a result says of its checkpoint, model and machine."""

from __future__ import annotations

import platform
from typing import Any

import torch

from longspan.trainer.checkpoint.load import LoadedModel
from longspan.trainer.evaluation.folders import commit_time, run_of


def describe(loaded: LoadedModel, device: torch.device | str) -> dict[str, Any]:
    """The parts `checkpoint`, `model` and `environment` of result.json."""
    config = loaded.config
    return {
        "checkpoint": {
            "path": str(loaded.path),
            "run": run_of(loaded.path).name,
            "name": config.name,
            "step": loaded.step,
            "fingerprint": loaded.fingerprint,
            "committed": commit_time(loaded.path),
        },
        "model": {
            "name": config.model.name,
            "window_tokens": config.model.window_tokens,
            "quantum": loaded.model.quantum,
            "segment_tokens": config.data.segment_tokens,
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
    }
