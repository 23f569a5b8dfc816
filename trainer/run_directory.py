"""The run directory: made or found, written to by one trainer at a time."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from longspan.cluster.environment import read_place
from longspan.errors import UsageError
from longspan.trainer.checkpoint.file_lock import open_locked_patiently
from longspan.trainer.checkpoint.manifest import step_of
from longspan.trainer.checkpoint.ownership import ID_FILE, Claim, Identity, claim, foreign, read_owner
from longspan.trainer.checkpoint.places import Place, RemotePath, children, place_of
from longspan.trainer.checkpoint.verify import CHECKPOINTS
from longspan.trainer.config import RunConfig
from longspan.trainer.metric_sender import STATE as TRACKING_STATE

CONFIG_FILE = "config.yaml"
LOCK_FILE = "lock"


def checkpoint_root(config: RunConfig, run_dir: Path) -> Place:
    """Where the run's checkpoints go. Raises UsageError: an address that nothing here can open."""
    return place_of(config.checkpoint.folder) if config.checkpoint.folder else run_dir / CHECKPOINTS


def check_usable(run_dir: Path, checkpoints: Place, *, resume: bool) -> None:
    """See whether a run may start here, before anything is written.

    Raises:
        UsageError: the directory cannot be written to, the place of the checkpoints cannot be reached or is of one
            process's memory and there are several, or `resume` is not asked for and it holds checkpoints or is
            another run's.
    """
    _check_folder("run directory", run_dir, "--run-dir")
    if isinstance(checkpoints, Path) and checkpoints != run_dir / CHECKPOINTS:
        _check_folder("checkpoint.folder =", checkpoints, "folder")
    check_unused(run_dir, checkpoints, resume=resume)


def check_unused(run_dir: Path, checkpoints: Place, *, resume: bool) -> None:
    """See whether no other run is here already, for a host that may see less of the place than the run will.

    Raises:
        UsageError: the checkpoints' place cannot be reached, or it holds some and `resume` is not asked for.
    """
    if isinstance(checkpoints, RemotePath) and checkpoints.is_volatile and read_place().world_size > 1:
        raise UsageError(
            f"checkpoint.folder = {checkpoints} is the memory of one process, and there are {read_place().world_size}: "
            f"each would have a part of a checkpoint. Use a folder that all of them see, or a store like "
            f"s3://BUCKET/FOLDER."
        )
    try:
        owner = read_owner(checkpoints)
        holds_some = any(step_of(folder) is not None for folder in children(checkpoints))
    except OSError as error:
        raise UsageError(
            f"checkpoint.folder = {checkpoints} cannot be listed: {error.strerror or error}. Check the address and the "
            f"credentials, or choose another folder."
        ) from error
    if holds_some and not resume:
        where = checkpoints if checkpoints != run_dir / CHECKPOINTS else run_dir
        other = "--run-dir" if where == run_dir else "checkpoint.folder"
        raise UsageError(
            f"{where} holds checkpoints of an earlier run already{f': {owner}' if owner else ''}. "
            f"Go on with it with --resume, or choose another {other}."
        )
    if owner and not resume and owner.run != _run_id(run_dir):
        raise UsageError(foreign(checkpoints, owner))


def _run_id(run_dir: Path) -> str | None:
    """The id of the run that a directory belongs to; None before its first start."""
    try:
        return (run_dir / ID_FILE).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def identity_of(config: RunConfig, run_dir: Path) -> Identity:
    """What the run says about itself to the owner of a folder of checkpoints."""
    fixed = {
        "model": config.model.model_dump(mode="json", exclude={"name", "dropout"}),
        "optimizer": config.optimizer.name,
    }
    digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
    return Identity(_run_id(run_dir), config.name, config.seed, digest, str(run_dir.absolute()))


def _check_folder(name: str, folder: Path, option: str) -> None:
    """Raises UsageError unless `folder`, or the nearest of its parents that exists, is a folder to write in."""
    place = next(path for path in [folder, *folder.absolute().parents] if os.path.lexists(path))
    if not place.is_dir():
        raise UsageError(f"{name} {folder}: {place} is a file, not a folder. Choose another {option}.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(
            f"{name} {folder} is not writable: no permission to write in {place}. "
            f"Choose another {option} or change the permissions."
        )


class RunDirectory:
    """An open run directory with its lock held; rank 0 has one.

    Attributes:
        checkpoints: claim of the folder of its checkpoints; None before `claim`.

    The lock is the kernel's (flock), so it ends with the process that holds it, however that ends; the file's text
    only says who that is.
    """

    def __init__(self, path: Path) -> None:
        """Make the directory if need be and take its lock.

        Raises:
            UsageError: it cannot be made or written to, or another trainer holds the lock (names pid and host).
        """
        self.path = path
        self._made = not path.exists()
        self._named = self._started = False
        self._name_before: str | None = None
        self.checkpoints: Claim | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = open_locked_patiently(path / LOCK_FILE, _holder(path / LOCK_FILE).get("host"))
        except OSError as error:
            raise UsageError(
                f"run directory {path} is not writable: {error.strerror}. "
                f"Choose another --run-dir or change the permissions."
            ) from error
        holder = _holder(path / LOCK_FILE)
        if lock is None:
            raise UsageError(
                f"another trainer is at work in {path}: pid {holder.get('pid', 'unknown')} "
                f"on host {holder.get('host', 'unknown')}. Wait for it, stop it, or choose another --run-dir. If that "
                f"host is gone for good and the file server still keeps its lock, remove {path / LOCK_FILE}."
            )
        self._lock, self.stale_holder = lock, holder
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)

    def claim(self, config: RunConfig, *, resume: bool, note: Callable[[str], None]) -> None:
        """Take the folder of the checkpoints for this run.

        Raises:
            UsageError: it belongs to another run or is in use (names it), or cannot be written to.
        """
        root = checkpoint_root(config, self.path)
        identity = identity_of(config, self.path)
        self.checkpoints = claim(root, identity, resume=resume, remember=self._remember, note=note)

    def _remember(self, run: str) -> None:
        before = _run_id(self.path)
        if before == run:
            return
        self._named, self._name_before = True, before
        self._write(ID_FILE, f"{run}\n")
        if before is not None:  # a copy: its metrics are not to go where those of the original do
            (self.path / TRACKING_STATE).unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        """Put the resolved configuration at RUN/config.yaml, whole or not at all: the run has started."""
        self._started = True
        self._write(CONFIG_FILE, text)

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)

    def release(self) -> None:
        """Let another trainer in; what was made for a run that then could not start goes away again."""
        if self.checkpoints:
            self.checkpoints.release(unused=not self._started)
        if self._named and not self._started:
            if self._name_before is not None:
                self._write(ID_FILE, f"{self._name_before}\n")
            else:
                (self.path / ID_FILE).unlink(missing_ok=True)
        if self._made and os.listdir(self.path) == [LOCK_FILE]:
            (self.path / LOCK_FILE).unlink()
            self.path.rmdir()
        os.ftruncate(self._lock, 0)
        os.close(self._lock)


def _holder(lock: Path) -> dict[str, str]:
    """Who says to hold a lock: host and pid; empty if nobody does."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: str(value) for name, value in holder.items()} if isinstance(holder, dict) else {}
