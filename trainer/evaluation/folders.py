"""Where results lie and what their files mean. Imports no torch."""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from longspan.errors import UsageError
from longspan.trainer import recipes
from longspan.trainer.checkpoint.files import check_file
from longspan.trainer.checkpoint.manifest import COMMITTED, read_manifest
from longspan.trainer.checkpoint.verify import CHECKPOINTS, fingerprint
from longspan.trainer.config import RunConfig
from longspan.trainer.evaluation.spec import evaluation_key
from longspan.trainer.evaluation.specs import Spec, TaskSpec
from longspan.trainer.shards import read_manifest as read_corpus_manifest

CONFIG = "config.yaml"
EVALS = "evals"
RESULT = "result.json"
CURVE = "curve.png"
SUCCESS = "_SUCCESS"
LOGGED = "_LOGGED"
WORK = "work"
LEASES = "leases"


def run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint folder lies in; the folder itself for a copy elsewhere."""
    checkpoint = checkpoint.absolute()
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint


def evals_folder(checkpoint: Path) -> Path:
    """RUN/evals of a checkpoint.

    Raises:
        UsageError: the checkpoint does not lie in a run directory, so nobody said where results go.
    """
    run = run_of(checkpoint)
    if run == checkpoint.absolute():
        raise UsageError(f"{checkpoint} lies in no run directory (RUN/{CHECKPOINTS}/...): name a folder with --out.")
    return run / EVALS


def work_folder(evals: Path, key: str) -> Path:
    """Where the finished shards of an unfinished evaluation lie; `evals` is RUN/evals."""
    return evals / WORK / key


def commit_time(checkpoint: Path) -> float:
    """When the checkpoint was published, unix seconds."""
    return (checkpoint / COMMITTED).stat().st_mtime


def read_result(folder: Path) -> dict[str, Any] | None:
    """A finished result; None if there is none, or a torn one: whoever publishes the next puts that aside.

    Args:
        folder: RUN/evals/KEY.

    Raises:
        OSError: it is there and cannot be read at the moment; to evaluate again would replace it.
    """
    if not (folder / SUCCESS).is_file():
        return None
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("key") == folder.name else None


def is_torn(folder: Path) -> bool:
    """Whether a folder calls itself finished and holds no result."""
    return (folder / SUCCESS).is_file() and read_result(folder) is None


def put_aside(folder: Path) -> None:
    """Make room for a result where a torn one lies, which is kept under another name."""
    with suppress(FileNotFoundError):
        folder.rename(folder.with_name(f".torn-{folder.name}-{uuid.uuid4().hex[:8]}"))


def read_results(evals: Path, spec: Spec) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and result of every evaluation with this spec that is done; `evals` is RUN/evals."""
    found = []
    for success in sorted(evals.glob(f"[!.]*/{SUCCESS}")):  # unpublished ones begin with a dot
        result = read_result(success.parent)
        if result is not None and result["spec_digest"] == spec.digest:
            found.append((success.parent, result))
    return found


def key_of(checkpoint: Path, spec: Spec) -> str:
    """The key that `evaluate` will use, without reading weights.

    Raises:
        CheckpointError: the checkpoint's manifest or configuration does not verify.
        ConfigError: this version cannot read its configuration.
        UsageError, DataError: its shards cannot be read.
    """
    mark = fingerprint(checkpoint)
    manifest = read_manifest(checkpoint)[0]
    check_file(checkpoint, CONFIG, manifest.files[CONFIG], manifest.chunk_bytes)
    config = recipes.load(RunConfig, checkpoint / CONFIG)
    if isinstance(spec, TaskSpec):
        return evaluation_key(mark, spec, spec.dataset_digest)
    corpus = read_corpus_manifest(spec.shards or config.data.shards, config.data)
    return evaluation_key(mark, spec, corpus.digest)
