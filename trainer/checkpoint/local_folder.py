"""Publishing on a file system: a temporary folder, synced, then renamed.

What it needs of the file system: a new name is exclusive (O_EXCL), `fsync` of a file and of a folder makes them last,
and `rename` of a folder within one file system is atomic. Local disks and NFS (version 3 and up, mounted `hard`) have
that. Nothing here uses locks, hard links, unnamed files or the order of writes.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from longspan.errors import CheckpointError
from longspan.trainer.checkpoint import contents
from longspan.trainer.checkpoint.crash_points import crash_point
from longspan.trainer.checkpoint.files import FileEntry, sync_folder, temporary_name, write_file
from longspan.trainer.checkpoint.manifest import COMMITTED, MANIFEST, commit_line, step_folder_name
from longspan.trainer.checkpoint.prune import remove_orphans
from longspan.trainer.checkpoint.tensor_file import Pieces
from longspan.trainer.checkpoint.verify import pinned, verify


class LocalFolder:
    """Writes one checkpoint after the other below `root`; only rank 0 calls `begin`, `publish` and `remove`."""

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        """Args: root: RUN/checkpoints, made by the first save; warn: takes messages about left-overs."""
        self.root, self._warn = root, warn
        self._temporary: Path | None = None

    def begin(self, step: int) -> str | None:
        """Make a fresh temporary folder; its name for `join`, or None if this step is saved already and verifies."""
        if not self.root.is_dir():
            self.root.mkdir(parents=True)
            sync_folder(self.root.parent)
        remove_orphans(self.root, self._warn)
        final = self.root / step_folder_name(step)
        if (final / COMMITTED).is_file():
            try:
                verify(final)
                return None
            except CheckpointError as error:
                self._warn(f"{error}\nIt is replaced by a new save of the same step.")
        self._temporary = self.root / temporary_name(final.name)
        for folder in ("", *contents.FOLDERS):
            os.mkdir(self._temporary / folder)
        return self._temporary.name

    def join(self, name: str) -> None:
        """Write below the folder that `begin` made on rank 0."""
        self._temporary = self.root / name

    def write(self, name: str, pieces: Pieces) -> FileEntry:
        """Write and sync one file of the checkpoint. Raises WriteError."""
        assert self._temporary is not None
        parent = (self._temporary / name).parent
        if parent.name == contents.TOKENIZER and not parent.is_dir():  # not every run has one
            os.mkdir(parent)
        return write_file(self._temporary, name, pieces)

    def publish(self, step: int, manifest: bytes) -> Path:
        """Complete the temporary folder and give it its final name, which it keeps through a power loss."""
        temporary, final = self._temporary, self.root / step_folder_name(step)
        assert temporary is not None
        write_file(temporary, MANIFEST, [manifest])
        for folder in sorted(path for path in temporary.iterdir() if path.is_dir()):
            sync_folder(folder)
        crash_point("after-manifest")
        write_file(temporary, COMMITTED, [commit_line(manifest)])
        crash_point("after-committed")
        sync_folder(temporary)
        crash_point("before-rename")
        if final.exists():  # not verified, or begin() would have kept it: evidence, so moved aside and not removed
            os.rename(final, self.root / f"damaged-{final.name}-{secrets.token_hex(4)}")
        os.rename(temporary, final)
        crash_point("after-rename")
        sync_folder(self.root)
        self._temporary = None
        return final

    def clean(self) -> None:
        """Remove what a crash left. Only the holder of the run directory's lock may."""
        remove_orphans(self.root, self._warn)

    def discard(self) -> None:
        """After a failed save, when no rank writes any more: remove what there is of it."""
        if self._temporary is not None:
            try:
                shutil.rmtree(self._temporary)
            except FileNotFoundError:
                pass  # it failed before the folder was made, or after the rename
            except OSError as error:
                self._warn(f"left-over {self._temporary} could not be removed: {error}. The next save tries again.")
        self._temporary = None

    def remove(self, folder: Path) -> bool:
        """Take an old checkpoint away at once, then remove its files; False if it was pinned meanwhile."""
        away = self.root / temporary_name(f"prune-{folder.name}")
        os.rename(folder, away)
        crash_point("mid-prune")
        if pinned(folder):  # between our look and the rename: give it back
            os.rename(away, folder)
            sync_folder(self.root)
            return False
        shutil.rmtree(away)
        return True
