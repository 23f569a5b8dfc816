"""Bugs that a reconciler or its workers can be given; they prove that the checks would see a pipeline that has them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from longspan.trainer import evaluation_tracking
from longspan.trainer.evaluation import folders
from longspan.trainer.evaluation.lease import Lease
from longspan.trainer.evaluation.worker import EvaluationWorker


def lease_ignored() -> None:
    """Bug: everybody gets every lease."""
    Lease.take = classmethod(lambda cls, path, valid_seconds=0: cls(path, "me"))  # type: ignore[assignment]
    Lease.renew = lambda self: True  # type: ignore[method-assign]
    Lease.release = lambda self: None  # type: ignore[method-assign]


def marker_before_the_write() -> None:
    """Bug: `_LOGGED` is there before MLflow has anything."""
    send = evaluation_tracking._log_evaluation

    def early(store: Any, parent: str | None, result: dict[str, Any], picture: Path) -> None:
        (picture.parent / evaluation_tracking.LOGGED).touch()
        send(store, parent, result, picture)

    evaluation_tracking._log_evaluation = early


class SuccessBeforeTheWrite(EvaluationWorker):
    """Bug: `_SUCCESS` is there before the result, in the folder that everybody looks into."""

    def __init__(self) -> None:
        super().__init__()
        publish = self._run.publish

        def early(folder: Path, result: dict[str, Any]) -> None:
            folder.mkdir(parents=True)
            (folder / folders.SUCCESS).touch()
            time.sleep(0.2)
            publish(folder.parent / f"late-{folder.name}", result)
            for file in (folder.parent / f"late-{folder.name}").iterdir():
                file.replace(folder / file.name)
            (folder.parent / f"late-{folder.name}").rmdir()

        self._run.publish = early


WORKERS = {"success_before_the_write": SuccessBeforeTheWrite}
