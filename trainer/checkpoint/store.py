"""The trainer's own save and load, all ranks together.

A save: rank 0 makes room for it; every rank writes its share, hashing while writing; all agree that every rank
succeeded; rank 0 writes the manifest and COMMITTED, publishes and prunes; all learn the outcome. A crash or power loss
at any moment leaves the old checkpoints or the new one (local_folder.py, object_folder.py say how). No rank leaves an
agreement out because of an error, so none waits for ever.
"""

from __future__ import annotations

import errno
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longspan.errors import CheckpointError, UsageError
from longspan.trainer.checkpoint import contents
from longspan.trainer.checkpoint.agreement import RankDiskError, Ranks
from longspan.trainer.checkpoint.awaited import pin_awaited
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.crash_points import crash_point
from longspan.trainer.checkpoint.files import CHUNK_BYTES, FileEntry, UnreadableError, check_file
from longspan.trainer.checkpoint.free_space import check_space
from longspan.trainer.checkpoint.local_folder import LocalFolder
from longspan.trainer.checkpoint.manifest import Manifest, committed_folders, read_manifest, step_folder_name
from longspan.trainer.checkpoint.object_folder import ObjectFolder
from longspan.trainer.checkpoint.ownership import Claim
from longspan.trainer.checkpoint.places import Place
from longspan.trainer.checkpoint.prune import prune


@dataclass(frozen=True)
class SaveResult:
    """Outcome of one save, the same on all ranks but for `seconds`.

    Attributes:
        ok: the checkpoint is published and survives a crash.
        path: its folder; None if not ok.
        seconds: wall time of the save.
        error: what went wrong and what to do; None if ok.
    """

    ok: bool
    path: Place | None
    seconds: float
    error: str | None


class CheckpointStore:
    """Checkpoints of one run.

    Every rank of the run makes one and calls `save` and `load_newest` together with the others, one call at a time,
    from any thread.

    Args:
        root: RUN/checkpoints or a place in an object store; made by the first save. The caller holds the run
            directory's lock.
        rank, world_size, group: this rank in the process group that saves (None: the default group). The group is
            not used when world_size is 1. Where saves run in a thread, no other thread may use the group.
        keep_last: newest checkpoints that pruning keeps.
        milestone_interval_steps: multiples of this are kept as well; None: no milestones.
        warn: takes messages about fallbacks and left-overs, on rank 0; standard error if not given.
        claim: of the folder, on rank 0, looked at before anything is written; None: the caller sees to it.
    """

    def __init__(
        self,
        root: Place,
        *,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        keep_last: int = 3,
        milestone_interval_steps: int | None = None,
        warn: Callable[[str], None] | None = None,
        claim: Claim | None = None,
    ) -> None:
        self.root = root
        self._claim = claim
        self._ranks = Ranks(rank, world_size, group)
        self._keep_last = keep_last
        self._milestone_interval_steps = milestone_interval_steps
        self._warn = warn or _to_standard_error
        self._folder: Any = (LocalFolder if isinstance(root, Path) else ObjectFolder)(root, self._warn)  # type: ignore[arg-type]

    def committed(self) -> list[Place]:
        """Published checkpoints, oldest first; not verified."""
        return committed_folders(self.root)

    def save(self, state: RunState) -> SaveResult:
        """Write one checkpoint; to be called by all ranks at the same step.

        A disk error on any rank (full, read-only, input/output error) is reported in the result on all of them, and
        nothing is left behind; the older checkpoints are not touched.

        Raises:
            ClusterError: another rank failed for a reason that is no disk error; that rank raises its own error.
            UsageError: another process has taken the folder over; nothing of it was touched.
        """
        started = time.monotonic()
        crash_point("before-temporary")
        try:
            path = self._save(state)
        except RankDiskError as error:
            message = (
                f"checkpoint of step {state.step} not saved: {error}. The older checkpoints are untouched; the next "
                f"save tries again. {self._advice()}"
            )
            return SaveResult(False, None, time.monotonic() - started, message)
        return SaveResult(True, path, time.monotonic() - started, None)

    def _advice(self) -> str:
        if not isinstance(self.root, Path):
            return f"Check that {self.root} can be reached and written to."
        return f"Free space on the disk of {self.root}, or lower checkpoint.keep_last = {self._keep_last}."

    def _save(self, state: RunState) -> Place:
        tied = contents.find_tied(state.weights)
        weights = {name: tensor for name, tensor in state.weights.items() if name not in tied}
        optimizer = contents.flat_optimizer(state.optimizer)
        final = self.root / step_folder_name(state.step)

        def begin() -> tuple[str | None, dict[str, int], dict[str, int], dict[str, int]]:
            name = None
            if self._ranks.rank == 0:
                self._check_claim()
                name = self._folder.begin(state.step)
            return name, _sizes(weights), _sizes(optimizer), _sizes(state.lanes or {})

        begun = self._agree(begin)
        if begun[0][0] is None:
            return final
        self._agree(lambda: check_space(self.root, _total(begun)) if self._ranks.rank == 0 else None)
        self._folder.join(begun[0][0])

        def write() -> tuple[dict[str, FileEntry], dict[str, Any], tuple[int, int] | None]:
            shares = {}
            for folder, tensors, place in (("weights", weights, 1), ("optimizer", optimizer, 2)):
                names = contents.divide([sizes[place] for sizes in begun])[self._ranks.rank]
                shares[folder] = {name: tensors[name] for name in names}
            return (
                self._write_payload(state, shares),
                state.rng,
                None if state.lanes is None else (state.lane_start, state.lane_stop),
            )

        written = self._agree(write)
        self._agree(lambda: self._publish(state, tied, written) if self._ranks.rank == 0 else None)
        return final

    def _check_claim(self) -> None:
        if self._claim:
            self._claim.check(self._warn)

    def _write_payload(self, state: RunState, shares: dict[str, dict[str, Any]]) -> dict[str, FileEntry]:
        """Write this rank's share; returns the manifest's entries for it."""
        entries: dict[str, FileEntry] = {}

        def write(name: str, pieces: contents.Pieces) -> None:
            entries[name] = self._folder.write(name, pieces)

        for folder, tensors in shares.items():
            for name, pieces in contents.encode_parts(tensors, folder, self._ranks.rank):
                write(name, pieces)
        if state.lanes is not None:
            write(*contents.encode_lanes(state))
        if self._ranks.rank == 0:
            write(contents.CONFIG, [state.config_yaml.encode()])
            write(contents.DATA, [contents.encode_json(state.data)])
            for file, content in state.tokenizer.items():
                write(f"{contents.TOKENIZER}/{file}", [content])
        return entries

    def _publish(self, state: RunState, tied: dict[str, str], written: list[Any]) -> None:
        """Rank 0: complete the checkpoint, make it the newest one, prune."""
        files: dict[str, FileEntry] = {}
        for entries, _, _ in written:
            files.update(entries)
        rng = {"ranks": [state_of_rank for _, state_of_rank, _ in written]}
        files[contents.RNG] = self._folder.write(contents.RNG, [contents.encode_json(rng)])
        crash_point("after-payload")
        manifest = Manifest(
            step=state.step,
            config_sha256=hashlib.sha256(state.config_yaml.encode()).hexdigest(),
            world_size=self._ranks.world_size,
            lanes=[lanes for _, _, lanes in written if lanes is not None],
            tied=tied,
            counters=state.counters,
            chunk_bytes=CHUNK_BYTES,
            files=files,
        )
        self._check_claim()
        pin_awaited(self.root, step_folder_name(state.step))
        final = self._folder.publish(state.step, manifest.encoded())
        crash_point("before-prune")
        prune(
            self.root,
            final,
            keep_last=self._keep_last,
            milestone_interval_steps=self._milestone_interval_steps,
            remove=self._folder.remove,
            warn=self._warn,
        )

    def load_newest(self, lane_start: int, lane_stop: int) -> tuple[RunState, Place] | None:
        """The newest checkpoint that verifies on all ranks; to be called by all ranks.

        Every file of it is checked, by the ranks that read it or by one of them. Orphans of a crash are removed.

        Args:
            lane_start, lane_stop: this rank's lanes [start, stop); the ranks that saved may have had others.

        Returns:
            (this rank's state, checkpoint folder), or None if nothing was ever published.

        Raises:
            CheckpointError: there are checkpoints, but none verifies, or their store does not answer.
        """

        def find() -> list[str]:
            if self._ranks.rank:
                return []
            self._folder.clean()
            return [folder.name for folder in reversed(self.committed())]

        try:
            names = self._agree(find)[0]
        except RankDiskError as error:
            raise CheckpointError(f"the checkpoints cannot be listed: {error}. Check the disk.") from error
        problems = []
        for name in names:
            folder = self.root / name
            loaded: list[RunState] = []

            def read(folder: Place = folder, loaded: list[RunState] = loaded) -> None:
                try:
                    loaded.append(self._read(folder, lane_start, lane_stop))
                except UnreadableError as error:
                    if isinstance(folder, Path):
                        raise
                    raise OSError(errno.EIO, str(error)) from error  # a store may answer again; a bad disk will not

            try:
                self._agree(read)
                return loaded[0], folder
            except RankDiskError as error:
                raise CheckpointError(
                    f"checkpoint {folder} cannot be read: {error}. It may be good, so no older one is taken. Try again."
                ) from error
            except CheckpointError as error:
                problems.append(f"checkpoint {folder} does not verify: {error}")
                if self._ranks.rank == 0:
                    self._warn(f"{problems[-1]}. Falling back to the next older checkpoint.")
        if not problems:
            return None
        raise CheckpointError(
            "no checkpoint left that verifies:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + f"\nRestore one of them from a backup, or move {self.root} away and start the run again."
        )

    def _read(self, folder: Place, lane_start: int, lane_stop: int) -> RunState:
        manifest, _ = read_manifest(folder)
        rng = contents.read_json(folder, manifest, contents.RNG)["ranks"]
        lanes, places = contents.read_lanes(folder, manifest, lane_start, lane_stop)
        state = RunState(
            step=manifest.step,
            weights=contents.read_weights(folder, manifest),
            optimizer=contents.read_optimizer(folder, manifest),
            lanes=lanes,
            lane_start=lane_start,
            lane_stop=lane_stop if lanes is None else lane_start + len(places),
            data=contents.read_json(folder, manifest, contents.DATA),
            rng=rng[self._ranks.rank] if self._ranks.rank < len(rng) else {},
            counters=manifest.counters,
            config_yaml=contents.read_file(folder, manifest, contents.CONFIG).decode(),
            places=places,
            tokenizer=contents.read_tokenizer_files(folder, manifest),
        )
        # carried state is the only thing that a rank reads in part
        for number, name in enumerate(sorted(name for name in manifest.files if name.startswith("state/"))):
            if number % self._ranks.world_size == self._ranks.rank:
                check_file(folder, name, manifest.files[name], manifest.chunk_bytes)
        return state

    def _agree(self, work: Callable[[], Any]) -> list[Any]:
        """`Ranks.agree`, and a failure leaves nothing behind: no rank writes any more when it is known."""
        try:
            return self._ranks.agree(work)
        except UsageError:
            raise  # the folder is another process's now, and so is what lies in it
        except Exception:
            if self._ranks.rank == 0 and self._is_held():
                self._folder.discard()
            raise

    def _is_held(self) -> bool:
        """Whether what a failed save has left is this process's to remove."""
        try:
            self._check_claim()
        except (OSError, UsageError):
            return isinstance(self.root, Path)  # its left-overs have names of their own there
        return True


def _sizes(tensors: dict[str, Any]) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _total(begun: list[Any]) -> int:
    """Bytes of all tensors that the ranks hold together."""
    logical = [{name: size for sizes in begun for name, size in sizes[place].items()} for place in (1, 2)]
    return sum(sum(sizes.values()) for sizes in [*logical, *(sizes[3] for sizes in begun)])


def _to_standard_error(message: str) -> None:
    print(f"longspan: {message}", file=sys.stderr, flush=True)
