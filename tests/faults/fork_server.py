"""Serves lives of the trainer, each from start or resume to its end; see `forked_lives`.

A request is {"config": file, "run_dir": folder, "log": file, "plant": name of a bug or None}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import planted
import yaml

from longspan.trainer.config import RunConfig
from longspan.trainer.loop import train

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forked_lives import serve


def live(request: dict[str, Any]) -> None:
    """One trainer."""
    if request["plant"]:
        getattr(planted, request["plant"])()
    config = RunConfig.model_validate(yaml.safe_load(Path(request["config"]).read_text()))
    train(config, Path(request["run_dir"]), resume=True)


if __name__ == "__main__":
    serve(live, lambda request: Path(request["log"]))
