"""Which run a folder of checkpoints belongs to, so that two runs never overwrite and prune each other's.

    FOLDER/owner/owner.json    the run, and the process that writes for it now
    FOLDER/owner/lock          locked by that process (flock) where the file system can
    RUN/run_id                 by which a run directory, wherever it is moved to, knows its folder again

On a file system the record gets its name whole, with a rename of its folder that fails if there is one. In an object
store it is a conditional write, as good as the store's. Every process that goes on with a run becomes its holder, and
whoever has been the holder before learns it at the next save, before anything is written. docs/checkpoints.md.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from longspan.errors import UsageError
from longspan.trainer.checkpoint.file_lock import open_locked, open_locked_patiently
from longspan.trainer.checkpoint.files import describe_disk_error, sync_folder, temporary_name, write_file
from longspan.trainer.checkpoint.manifest import committed_folders
from longspan.trainer.checkpoint.places import Place

FOLDER = "owner"
RECORD = "owner.json"
LOCK = "lock"
ID_FILE = "run_id"  # in the run directory
_ATTEMPTS = 20  # each of them loses to another process, or to one that removes left-overs


class Owner(BaseModel):
    """Contents of owner.json.

    Attributes:
        run: id of the run. name, seed, config_sha256: its recipe's; the digest is of what no resume can change.
        run_dir, host, pid: of the process that writes for it now. holder: names that process among all.
        started: when the run began. held_since: when this process did. Both UTC, ISO 8601.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    run: str
    name: str
    seed: int
    config_sha256: str
    run_dir: str
    host: str
    pid: int
    holder: str
    started: str
    held_since: str

    def __str__(self) -> str:
        return (
            f"run {self.run} ({self.name}, seed {self.seed}) with the run directory {self.run_dir}, started "
            f"{self.started}, last opened {self.held_since} by pid {self.pid} on host {self.host}"
        )

    def encoded(self) -> bytes:
        """The bytes of owner.json."""
        return (json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n").encode()


@dataclass(frozen=True)
class Identity:
    """What a run says about itself.

    Attributes:
        run: its id; None in a run directory that has none yet. The rest as in `Owner`.
    """

    run: str | None
    name: str
    seed: int
    config_sha256: str
    run_dir: str

    def owner(self) -> Owner:
        """A record that makes this process the holder."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Owner(
            run=self.run or secrets.token_hex(8),
            name=self.name,
            seed=self.seed,
            config_sha256=self.config_sha256,
            run_dir=self.run_dir,
            host=socket.gethostname(),
            pid=os.getpid(),
            holder=secrets.token_hex(8),
            started=now,
            held_since=now,
        )


def read_owner(root: Place) -> Owner | None:
    """Whose folder it is; None if nobody's, as those that versions before this record have written.

    Raises:
        UsageError: the record is damaged. OSError: it cannot be read.
    """
    record = root / FOLDER / RECORD
    try:
        return Owner.model_validate_json(record.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise UsageError(
            f"{record} says whose checkpoints these are and is damaged. See that no other run uses {root}, then "
            f"remove {root / FOLDER} and go on with --resume."
        ) from error


def foreign(root: Place, owner: Owner) -> str:
    """The message for a run that is not the owner."""
    return (
        f"the checkpoints in {root} belong to another run: {owner}. One folder serves one run. Choose another "
        f"checkpoint.folder, or go on with that run: its recipe and seed, its --run-dir if it is there, and --resume. "
        f"If that run is gone for good, remove {root / FOLDER}."
    )


class Claim:
    """A folder of checkpoints that this process holds; rank 0 has it."""

    def __init__(self, root: Place, mine: Owner, before: Owner | None, lock: int | None, made_root: bool) -> None:
        """Args: before: the holder before this one; lock: descriptor; made_root: the folder was not there before."""
        self.root, self.owner = root, mine
        self._before, self._lock, self._made_root = before, lock, made_root

    def check(self, warn: Callable[[str], None]) -> None:
        """See before a write whether this process still holds the folder.

        Raises:
            UsageError: another one does. OSError: nobody can say.
        """
        found = read_owner(self.root)
        if found is None:
            warn(f"{self.root} has lost its {FOLDER} record: it or the whole folder was removed. Both are made again.")
            lock = _create(self.root, self.owner)
            if lock is not None:
                _unlock(self._lock)
                self._lock = lock
                return
            found = read_owner(self.root)
        if found is None or found.holder != self.owner.holder:
            raise UsageError(
                f"{self.root} was taken over, so this process writes nothing more there and ends. "
                f"Now it is of {found}. One folder serves one run, and one process of it at a time."
            )

    def release(self, *, unused: bool) -> None:
        """Let go of the folder.

        Args:
            unused: the run could not start, so nothing of the claim is to remain.
        """
        if unused:
            with suppress(OSError, UsageError):
                self._undo()
        _unlock(self._lock)
        self._lock = None

    def _undo(self) -> None:
        found = read_owner(self.root)
        if found is None or found.holder != self.owner.holder:
            return
        if self._before is not None:
            _replace(self.root, self._before)
        elif isinstance(self.root, Path):
            away = self.root / temporary_name(FOLDER)
            os.rename(self.root / FOLDER, away)
            shutil.rmtree(away)
            if self._made_root:
                self.root.rmdir()
        else:
            (self.root / FOLDER / RECORD).unlink()


def claim(
    root: Place,
    identity: Identity,
    *,
    resume: bool,
    remember: Callable[[str], None],
    note: Callable[[str], None],
) -> Claim:
    """Take a folder of checkpoints for a run, before anything in it is looked at or changed; on rank 0.

    A folder that nobody owns is taken, with whatever checkpoints are in it. One that has an owner is taken by the run
    directory with the owner's id; by one without an id only to resume a run of the same recipe that has saved.

    Args:
        root: where the checkpoints go. identity: of the run. resume: whether it was asked to go on.
        remember: keeps the run's id in the run directory; called before the folder shows it.
        note: takes messages for the person at the terminal.

    Raises:
        UsageError: it belongs to another run or is in use (names it), or cannot be written to.
    """
    try:
        return _claim(root, identity, resume, remember, note)
    except OSError as error:
        raise UsageError(
            f"checkpoints cannot be written to {root}: {describe_disk_error(error)}. Check the folder, its permissions "
            f"or credentials, or choose another checkpoint.folder."
        ) from error


def _claim(
    root: Place, identity: Identity, resume: bool, remember: Callable[[str], None], note: Callable[[str], None]
) -> Claim:
    made_root = isinstance(root, Path) and not root.exists()
    for _ in range(_ATTEMPTS):
        found = read_owner(root)
        if found is not None:
            return _take_over(root, found, identity, resume, remember, note)
        mine = identity.owner()
        identity = replace(identity, run=mine.run)
        remember(mine.run)
        lock = _create(root, mine)
        if lock is not None:
            return Claim(root, mine, None, lock, made_root)
    raise UsageError(f"{root} is written to by several processes at once. Choose another checkpoint.folder.")


def _take_over(
    root: Place,
    found: Owner,
    identity: Identity,
    resume: bool,
    remember: Callable[[str], None],
    note: Callable[[str], None],
) -> Claim:
    if identity.run is None and resume:
        if not committed_folders(root):
            raise UsageError(f"{foreign(root, found)} It has saved nothing yet, so there is nothing to resume.")
        differing = [
            name for name in ("name", "seed", "config_sha256") if getattr(found, name) != getattr(identity, name)
        ]
        if differing:
            raise UsageError(f"{foreign(root, found)} This run has another {' and another '.join(differing)}.")
        note(f"{identity.run_dir} goes on with {found}")
        remember(found.run)
    elif identity.run != found.run:
        raise UsageError(foreign(root, found))
    elif _is_copy(identity, found):
        identity = _branch(root, identity, found, remember, note)
    lock = open_locked_patiently(root / FOLDER / LOCK, found.host) if isinstance(root, Path) else -1
    if lock is None:
        raise UsageError(
            f"another trainer is at work in {root}: {found}. Wait for it, or stop it. If its host is gone "
            f"for good and the file server still keeps its lock, remove {root / FOLDER / LOCK}."
        )
    mine = replace(identity, run=identity.run or found.run).owner().model_copy(update={"started": found.started})
    _replace(root, mine)
    return Claim(root, mine, found, lock, made_root=False)


def _is_copy(identity: Identity, found: Owner) -> bool:
    """Whether the run directory that the owner wrote from is there still, besides the one that has its id now."""
    before, now = Path(found.run_dir), Path(identity.run_dir)
    try:
        same_id = (before / ID_FILE).read_text(encoding="utf-8").strip() == identity.run
        return same_id and not before.samefile(now)
    except OSError:  # moved, or of another host
        return False


def _branch(
    root: Place, identity: Identity, found: Owner, remember: Callable[[str], None], note: Callable[[str], None]
) -> Identity:
    """Make a run of its own of a copied run directory, if it has its checkpoints in it; who it is then.

    Raises:
        UsageError: they are elsewhere, where the run that was copied has its own.
    """
    run_dir = Path(identity.run_dir)
    if not isinstance(root, Path) or run_dir.resolve() not in root.resolve().parents:
        raise UsageError(
            f"{run_dir} is a copy of the run directory {found.run_dir}, which is there still, and the checkpoints in "
            f"{root} are of that one: {found}. Go on in {found.run_dir}; or, if that one is never to go on, remove "
            f"{Path(found.run_dir) / ID_FILE}; or, if {root} was copied too, remove {root / FOLDER}."
        )
    branch = secrets.token_hex(8)
    note(f"{run_dir} is a copy of {found.run_dir}, which is there still: it goes on as run {branch}, on its own")
    remember(branch)
    return replace(identity, run=branch)


def _create(root: Place, mine: Owner) -> int | None:
    """Put the record there if there is none. A descriptor that holds the lock (-1: no lock), None if there was one."""
    if not isinstance(root, Path):
        return -1 if (root / FOLDER / RECORD).create_bytes(mine.encoded()) else None
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        sync_folder(root.parent)
    temporary = root / temporary_name(FOLDER)
    lock = None
    try:
        os.mkdir(temporary)
        write_file(temporary, RECORD, [mine.encoded()])
        lock = open_locked(temporary / LOCK)
        sync_folder(temporary)
        os.rename(temporary, root / FOLDER)  # fails if there is a folder with something in it
        sync_folder(root)
    except OSError:
        _unlock(lock)
        shutil.rmtree(temporary, ignore_errors=True)
        # there was one; or the temporary folder was taken for a left-over by the one that there is now
        if (root / FOLDER / RECORD).exists():
            return None
        raise
    return lock


def _replace(root: Place, owner: Owner) -> None:
    if not isinstance(root, Path):
        (root / FOLDER / RECORD).write_bytes(owner.encoded())
        return
    temporary = temporary_name(RECORD)
    write_file(root / FOLDER, temporary, [owner.encoded()])
    os.replace(root / FOLDER / temporary, root / FOLDER / RECORD)
    sync_folder(root / FOLDER)


def _unlock(lock: int | None) -> None:
    if lock is not None and lock >= 0:
        os.close(lock)
