"""Publishing in an object store, which has no rename: COMMITTED is written last and removed first.

What it needs of the store: an object appears whole or not at all, and is seen by every reader as soon as the write
has returned (S3 since 2020, GCS, Azure, MinIO). Every upload is followed by a question for its size. Objects without
a COMMITTED beside them are what a crash left; the next save or resume removes them. So one folder serves one run.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.crash_points import crash_point
from longspan.trainer.checkpoint.files import Digest, FileEntry, UnreadableError, WriteError, chunks
from longspan.trainer.checkpoint.manifest import COMMITTED, MANIFEST, commit_line, step_folder_name, step_of
from longspan.trainer.checkpoint.places import RemotePath
from longspan.trainer.checkpoint.tensor_file import Pieces
from longspan.trainer.checkpoint.verify import pinned, verify


class ObjectFolder:
    """Writes one checkpoint after the other below `root`; only rank 0 calls `begin`, `publish` and `remove`."""

    def __init__(self, root: RemotePath, warn: Callable[[str], None]) -> None:
        """Args: root: where the checkpoints of one run lie; warn: takes messages about left-overs."""
        self.root, self._warn = root, warn
        self._folder: RemotePath | None = None

    def begin(self, step: int) -> str | None:
        """Make room for a step; its folder's name for `join`, or None if it is saved already and verifies.

        Raises:
            OSError: the store does not say what it has.
        """
        self.clean()
        final = self.root / step_folder_name(step)
        if (final / COMMITTED).is_file():
            try:
                verify(final)
                return None
            except UnreadableError as error:  # perhaps good, so not to be replaced
                raise OSError(errno.EIO, str(error)) from error
            except CheckpointError as error:
                self._warn(f"{error}\nIt is replaced by a new save of the same step.")
            self._remove(final)
        self._folder = final
        return final.name

    def join(self, name: str) -> None:
        """Write below the folder that `begin` made on rank 0."""
        self._folder = self.root / name

    def write(self, name: str, pieces: Pieces) -> FileEntry:
        """Upload one object of the checkpoint. Raises WriteError."""
        assert self._folder is not None
        content = bytearray(sum(map(len, pieces)))
        digest, position = Digest(), 0
        for chunk in chunks(pieces):
            digest.add(chunk)
            content[position : position + len(chunk)] = chunk
            position += len(chunk)
            crash_point("mid-payload")
        self._upload(self._folder, name, content)
        return digest.entry()

    def publish(self, step: int, manifest: bytes) -> RemotePath:
        """Upload manifest and COMMITTED; with the latter the checkpoint is there."""
        folder = self._folder
        assert folder is not None and step_of(folder) == step
        self._upload(folder, MANIFEST, manifest)
        crash_point("after-manifest")
        self._upload(folder, COMMITTED, commit_line(manifest))
        crash_point("after-committed")
        self._folder = None
        return folder

    def clean(self) -> None:
        """Remove what a crash left: steps without COMMITTED. No other trainer may use the folder."""
        for folder in self.root.iterdir():
            if step_of(folder) is not None and not (folder / COMMITTED).is_file():
                try:
                    folder.remove_tree()
                except OSError as error:
                    self._warn(f"left-over {folder} could not be removed: {error}. The next save tries again.")

    def discard(self) -> None:
        """After a failed save, when no rank writes any more: remove what there is of it."""
        if self._folder is not None:
            try:
                self._remove(self._folder)
            except OSError as error:
                self._warn(f"left-over {self._folder} could not be removed: {error}. The next save tries again.")
        self._folder = None

    def remove(self, folder: RemotePath) -> bool:
        """Take an old checkpoint away at once, then remove its objects; False if it was pinned meanwhile."""
        committed = (folder / COMMITTED).read_bytes()
        (folder / COMMITTED).unlink()
        crash_point("mid-prune")
        if pinned(folder):  # between our look and the removal: give it back
            self._upload(folder, COMMITTED, committed)
            return False
        folder.remove_tree()
        return True

    def _remove(self, folder: RemotePath) -> None:
        (folder / COMMITTED).unlink(missing_ok=True)  # first: a removal that stops half-way leaves no checkpoint
        folder.remove_tree()

    @staticmethod
    def _upload(folder: RemotePath, name: str, content: bytes | bytearray) -> None:
        try:
            (folder / name).write_bytes(content)
        except OSError as error:
            text = f"{folder / name}: {error.strerror or error}, while {len(content):,} bytes were uploaded"
            raise WriteError(error.errno, text) from error
