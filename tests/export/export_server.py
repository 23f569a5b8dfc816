"""Serves exports that a signal ends at a chosen place; see `forked_lives`.

A request is {"run": folder, "out": folder, "point": crash point or None, "instead_of": name of the function of
`trainer/export.py` in whose place the process ends or None, "exchanges": whether the system can exchange names,
"log": file}.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from longspan.trainer import export, export_folder
from longspan.trainer.checkpoint import crash_points
from longspan.trainer.export import export_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forked_lives import serve


def _end(*args: Any, **more: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def live(request: dict[str, Any]) -> None:
    """One export over what is there."""
    if request["point"]:
        os.environ[crash_points.ENVIRONMENT_VARIABLE] = f"{request['point']}@1"
    if request["instead_of"]:
        assert callable(getattr(export, request["instead_of"]))
        setattr(export, request["instead_of"], _end)
    if not request["exchanges"]:
        export_folder.exchange = lambda first, second: False
    export_checkpoint(Path(request["run"]), Path(request["out"]), overwrite=True)


if __name__ == "__main__":
    serve(live, lambda request: Path(request["log"]))
