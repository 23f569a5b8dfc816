"""A run's checkpoints: what is put into one, and a run put back from one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from longspan.data_pipeline.reader import LaneReader
from longspan.trainer import recipes
from longspan.trainer.checkpoint import rng
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.store import CheckpointStore, SaveResult
from longspan.trainer.config import RunConfig
from longspan.trainer.engine import Engine
from longspan.trainer.lanes import Lanes
from longspan.trainer.restore import check_resumable, seed_everything


class Checkpoints:
    """Saves and restores engine, lanes, data position and random generators; all ranks call it together."""

    def __init__(
        self,
        config: RunConfig,
        root: Path,
        engine: Engine,
        lanes: Lanes,
        reader: LaneReader,
        note: Callable[[str], None],
    ) -> None:
        """Args: root: RUN/checkpoints; note: takes messages for the person at the terminal."""
        self._config, self._engine, self._lanes, self._reader, self._note = config, engine, lanes, reader, note
        self._store = CheckpointStore(
            root,
            rank=engine.mesh.rank,
            world_size=engine.mesh.world_size,
            group=engine.mesh.control_group,
            keep_last=config.checkpoint.keep_last,
            milestone_interval_steps=config.checkpoint.milestone_interval_steps,
            warn=note,
        )

    def save(self, step: int, counters: dict[str, Any]) -> SaveResult:
        """Write everything that the run needs to go on after `step`; a disk error is in the result, not raised."""
        # each rank meets only the bad documents of its own lanes; rank 0 saves, so that a resume knows all of them
        for quarantine in self._engine.mesh.gather(self._reader.quarantine):
            self._reader.adopt_quarantine(quarantine)
        return self._store.save(
            RunState(
                step=step,
                weights=self._engine.weights(),
                optimizer=self._engine.optimizer_state(),
                lanes=self._lanes.packed() if self._engine.mesh.cp_rank == 0 else None,  # the same on all of cp
                lane_start=self._lanes.start,
                lane_stop=self._lanes.stop,
                data=self._reader.state(step),
                rng=rng.capture(),
                counters=counters,
                config_yaml=recipes.dump(self._config),
            )
        )

    def resume(self) -> RunState | None:
        """Put the run back to its newest checkpoint that verifies; None if there is no checkpoint.

        Raises:
            UsageError: the checkpoint does not fit the configuration or the corpus.
            CheckpointError: there are checkpoints, but none verifies.
        """
        found = self._store.load_newest(self._lanes.start, self._lanes.stop)
        if found is None:
            return None
        state, folder = found
        changed = check_resumable(self._config, state, folder)
        self._reader.check_state(state.data)
        self._engine.load(state.weights, state.optimizer)
        if state.lanes is not None:
            self._lanes.restore(state.lanes)
        if state.rng:
            rng.restore(state.rng)
        else:  # written by fewer ranks
            seed_everything(self._config.seed, self._engine.mesh.dp_rank + 1, state.step)
        self._note(f"resuming from {folder} at step {state.step}")
        for line in changed:
            self._note(f"changed since: {line}")
        return state

    def newest(self) -> Path | None:
        """The newest published checkpoint."""
        committed = self._store.committed()
        return committed[-1] if committed else None

    def last_good(self) -> str:
        """A sentence that names the newest published checkpoint."""
        newest = self.newest()
        return f"The last good checkpoint is {newest}." if newest else "No checkpoint has been saved."
