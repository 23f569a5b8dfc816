"""Copies on this machine of checkpoints in a store, for commands that read one as a folder."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.files import read_checked, temporary_name, write_file
from longspan.trainer.checkpoint.manifest import COMMITTED, MANIFEST, read_manifest
from longspan.trainer.checkpoint.places import RemotePath


def fetch(source: RemotePath, run: Path | None) -> Path:
    """Copy a published checkpoint to RUN/checkpoints, or to a temporary folder that this process removes at its end.

    Every file is checked on the way. A copy that is there and of the same manifest is not fetched again; copies of
    other steps are removed from RUN/checkpoints, which the run itself does not use.

    Args:
        source: the checkpoint. run: the run directory that it belongs to, if it is known.

    Raises:
        CheckpointError: it does not verify, or the store cannot be read. OSError: this machine's disk.
    """
    if run is None:
        root = Path(tempfile.mkdtemp(prefix="longspan-checkpoint-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
    else:
        root = run / "checkpoints"
        root.mkdir(exist_ok=True)
    copy = root / source.name
    manifest, fingerprint = read_manifest(source)
    if (copy / COMMITTED).is_file() and read_manifest(copy)[1] == fingerprint:
        return copy
    temporary = root / temporary_name(copy.name)
    try:
        for name, entry in manifest.files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(temporary, name, [read_checked(source, name, entry, manifest.chunk_bytes)])
        for name in (MANIFEST, COMMITTED):
            write_file(temporary, name, [(source / name).read_bytes()])
        for other in [copy, *(root.glob("step-*") if run else ())]:
            shutil.rmtree(other, ignore_errors=True)
        temporary.rename(copy)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {source}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return copy
