"""A run's checkpoints: what is put into one, and a run put back from one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from longspan.cluster.config import LONGEST_ALLOWANCE
from longspan.data_pipeline.reader import LaneReader
from longspan.trainer import recipes
from longspan.trainer.checkpoint import rng
from longspan.trainer.checkpoint.background import BackgroundSaver, Saved
from longspan.trainer.checkpoint.contents import Place, RunState, divide
from longspan.trainer.checkpoint.free_space import shortage
from longspan.trainer.checkpoint.manifest import COMMITTED, step_folder_name
from longspan.trainer.checkpoint.ownership import Claim
from longspan.trainer.checkpoint.places import Place as Folder
from longspan.trainer.checkpoint.places import RemotePath
from longspan.trainer.checkpoint.snapshot import Snapshot, Source
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.config import RunConfig
from longspan.trainer.corpus_tokenizer import check_tokenizer, tokenizer_files
from longspan.trainer.data_source import DataSource
from longspan.trainer.engine import Engine
from longspan.trainer.lanes import Lanes
from longspan.trainer.restore import check_resumable, keeps_generators, seed_everything

_BYTES_A_PARAMETER = 12  # float32 weight and two moments


@dataclass(frozen=True)
class Resumed:
    """A run put back.

    Attributes:
        state: what the checkpoint holds. forked: the data plan goes on with other settings than before.
        lanes_reset: lanes of all ranks whose carried state belonged elsewhere, so that they start in the initial
            state. lanes_new: those for which there was none.
    """

    state: RunState
    forked: bool
    lanes_reset: int
    lanes_new: int


class Checkpoints:
    """Saves and restores engine, lanes, data position and random generators; all ranks call it together.

    Attributes:
        reader: of this rank's lanes; another one after a resume with another data plan.
    """

    def __init__(
        self,
        config: RunConfig,
        root: Folder,
        engine: Engine,
        lanes: Lanes,
        source: DataSource,
        note: Callable[[str], None],
        claim: Claim | None,
    ) -> None:
        """Args: root: where they go; note: takes messages for the person; claim: of `root`, on rank 0."""
        self._config, self._engine, self._lanes, self._source, self._note = config, engine, lanes, source, note
        self._tokenizer = tokenizer_files(source.manifest)
        self._known: Folder | None = None  # the newest published checkpoint that this process has seen
        self.reader = self._open_reader()
        mesh = engine.mesh
        timeout = timedelta(seconds=config.parallel.timeout_seconds * LONGEST_ALLOWANCE)
        self._store = CheckpointStore(
            root,
            rank=mesh.rank,
            world_size=mesh.world_size,
            # its own: the saving thread talks over it while this one trains (docs/checkpoints.md)
            group=dist.new_group(backend="gloo", timeout=timeout) if mesh.world_size > 1 else None,
            keep_last=config.checkpoint.keep_last,
            milestone_interval_steps=config.checkpoint.milestone_interval_steps,
            warn=note,
            claim=claim,
        )
        sizes = engine.parameter_sizes()
        self._share = set(divide([sizes] * mesh.world_size)[mesh.rank])
        self._sizes = sizes
        snapshot = Snapshot(mesh.device)
        self._saver = BackgroundSaver(self._store.save, snapshot)
        engine.before_update = self._saver.settle
        snapshot.reserve(_BYTES_A_PARAMETER * sum(sizes[name] for name in self._share))

    def begin(self, step: int, counters: dict[str, Any], waited_seconds: float) -> None:
        """Start to write everything that the run needs to go on after `step`; the save before must have been joined.

        Args:
            step: updates done. counters: the trainer's, a copy.
            waited_seconds: for which training waited until the save before had ended.
        """
        started = time.monotonic()
        # each rank meets only the bad documents of its own lanes; rank 0 saves, so that a resume knows all of them
        for quarantine in self._engine.mesh.gather(self.reader.quarantine):
            self.reader.adopt_quarantine(quarantine)
        data = self.reader.state(step)
        lanes = self._engine.whole_heads(self._lanes.packed())
        state = RunState(
            step=step,
            weights={},
            optimizer={},
            lanes=_own_memory(lanes) if self._engine.mesh.speaks_for_lanes else None,
            lane_start=self._lanes.start,
            lane_stop=self._lanes.stop,
            data=data,
            rng=rng.capture(),
            counters=counters,
            config_yaml=recipes.dump(self._config),
            places=places_of(data)[self._lanes.start : self._lanes.stop],
            tokenizer=self._tokenizer,
        )
        quarantined = sorted(self.reader.quarantine)
        self._saver.begin(state, self._sources, started=started, waited_seconds=waited_seconds, quarantined=quarantined)

    def _sources(self) -> Iterator[Source]:
        return (Source(*source) for source in self._engine.each_state(self._share))

    def finished(self) -> Saved | None:
        """The outcome of a save that has ended on this rank, once. Raises what is no disk error."""
        return self._remember(self._saver.finished())

    def join(self, timeout_seconds: float | None = None) -> Saved | None:
        """Wait for the save that goes on, if there is one; its outcome, once. Raises what is no disk error."""
        return self._remember(self._saver.join(timeout_seconds))

    def _remember(self, saved: Saved | None) -> Saved | None:
        if saved is not None and saved.result.ok:
            self._known = saved.result.path
        return saved

    def warn_of_place(self) -> None:
        """Say on rank 0 that the place of the checkpoints will be full before the run's end, or goes away with it."""
        if self._engine.mesh.rank == 0:
            if isinstance(self._store.root, RemotePath) and self._store.root.is_volatile:
                self._note(
                    f"checkpoint.folder = {self._store.root} is this process's memory: its checkpoints vanish with the "
                    f"process, and no --resume will find them"
                )
            size = _BYTES_A_PARAMETER * sum(self._sizes.values())
            text = shortage(self._store.root, size, self._config.checkpoint.keep_last, len(self._store.committed()))
            if text:
                self._note(text)

    def resume(self, *, fork_data: bool) -> Resumed | None:
        """Put the run back to its newest checkpoint that verifies; None if there is no checkpoint.

        Args:
            fork_data: go on with the data settings of now where they differ from the checkpoint's.

        Raises:
            UsageError: the checkpoint does not fit the configuration or the corpus.
            CheckpointError: there are checkpoints, but none verifies.
        """
        found = self._store.load_newest(self._lanes.start, self._lanes.stop)
        if found is None:
            return None
        state, folder = found
        self._known = folder
        vocabulary = self._source.manifest.vocabulary
        trained = state.data.get("plan", {}).get("vocabulary_digest", vocabulary.digest)
        check_tokenizer(trained, vocabulary, str(folder), self._config.data.shards)
        changed = check_resumable(self._config, state, folder)
        forked = self._resume_data(state, fork_data)
        self._engine.load(state.weights, state.optimizer)
        num_reset, num_new = self._resume_lanes(state)
        if state.rng and keeps_generators(self._config, state):
            rng.restore(state.rng)
        else:
            seed_everything(self._config.seed, self._engine.mesh.dp_rank + 1, state.step)
        self._note(f"resuming from {folder} at step {state.step}")
        for line in changed:
            self._note(f"changed since: {line}")
        if forked:
            self._note(f"the data plan is forked at step {state.step}: it goes on with the settings of now")
        if num_reset:
            self._note(
                f"{num_reset} of {self._config.data.lanes} lanes start in the initial state: what they carried "
                f"belongs to another document or place"
            )
        return Resumed(state, forked, num_reset, num_new)

    def _open_reader(self) -> LaneReader:
        return self._source.lane_reader(self._lanes.start, self._lanes.stop)

    def _resume_data(self, state: RunState, fork_data: bool) -> bool:
        """Go on with the saved plan, or a fork of it; whether it is a new fork."""
        wanted = self._source.plan
        self._source = self._source.resumed(state.data, allow_fork=fork_data)
        if self._source.plan is not wanted:
            self.reader = self._open_reader()
        forked = self._source.plan.description() != state.data["plan"]
        if forked and self._source.plan.first_step == state.step:
            self.reader.adopt_quarantine(dict(state.data["quarantine"]))
            return True
        self.reader.check_state(state.data)
        return False

    def _resume_lanes(self, state: RunState) -> tuple[int, int]:
        """Put back the carried states that belong to what the lanes read next.

        Returns:
            Lanes of all ranks whose state belongs elsewhere, and those that the checkpoint has no state of.
        """
        lanes, mesh = self._lanes, self._engine.mesh
        due = places_of(self.reader.state(state.step))[lanes.start : lanes.stop]
        # a lane without a document may carry anything: what starts there next resets it
        rows = [row for row, place in enumerate(state.places) if place is not None and place == due[row]]
        lanes.restore(self._engine.own_heads(state.lanes or {}), rows)
        counts = (len(state.places) - len(rows), len(due) - len(state.places))
        of_groups = [found for speaks, found in mesh.gather((mesh.speaks_for_lanes, counts)) if speaks]
        return sum(reset for reset, _ in of_groups), sum(new for _, new in of_groups)

    def newest(self) -> Folder | None:
        """The newest published checkpoint; where nobody can say, the newest that this process knows of."""
        try:
            committed = self._store.committed()
        except OSError:  # an end must not look like another one because a store is down
            return self._known
        return committed[-1] if committed else None

    def is_there(self, step: int) -> bool:
        """Whether a checkpoint that was published has not been removed since; every rank must ask."""
        folder = self._store.root / step_folder_name(step)
        try:
            found = (folder / COMMITTED).is_file()
        except OSError:  # as in `newest`
            found = folder == self._known
        return self._engine.mesh.any_rank(found)

    def last_good(self) -> str:
        """A sentence that names the newest published checkpoint."""
        newest = self.newest()
        return f"The last good checkpoint is {newest}." if newest else "No checkpoint has been saved."


def _own_memory(lanes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Carried state that stays as it is: on the CPU nothing writes to it, for every step returns a new one."""
    return {name: tensor.detach().cpu() for name, tensor in lanes.items()}


def places_of(data: Mapping[str, Any]) -> list[Place]:
    """What each lane of a data state goes on with: (document id, token), or None."""
    return [None if lane is None else (lane["doc_id"], lane["offset"]) for lane in data["lanes"]]
