"""A training run from its first step, or its newest checkpoint, to its last."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NoReturn

from longspan.cluster.mesh import Mesh
from longspan.cluster.watchdog import Watchdog
from longspan.data_pipeline.reader import LaneReader
from longspan.errors import CheckpointError, DivergenceError, Stopped, UsageError
from longspan.modeling.model import build_model
from longspan.trainer.checkpoint.background import Saved, SaveStalls
from longspan.trainer.checkpoint.ownership import Claim
from longspan.trainer.config import RunConfig, lane_problems
from longspan.trainer.corpus_tokenizer import corpus_tokenizer
from longspan.trainer.data_source import DataSource, open_data
from longspan.trainer.device import process_age_seconds, set_threads
from longspan.trainer.engine import Engine, StepResult
from longspan.trainer.lanes import Lanes
from longspan.trainer.recorder import Recorder
from longspan.trainer.restore import load_initial_weights, seed_everything
from longspan.trainer.run_directory import RunDirectory, check_usable, checkpoint_root
from longspan.trainer.saving import Checkpoints, Resumed
from longspan.trainer.schedules import learning_rate
from longspan.trainer.signals import StopRequest
from longspan.trainer.validation import Validation

# a save that goes on when the run fails is given so long to end
_LAST_SAVE_SECONDS = 60.0


def train(
    config: RunConfig, run_dir: Path, *, resume: bool = False, init_from: Path | None = None, fork_data: bool = False
) -> dict[str, Any]:
    """Train in this process group until the last step; call it on every rank, in the main thread.

    Args:
        config: everything that the run depends on.
        run_dir: where config.yaml, log.jsonl and checkpoints go.
        resume: go on from the newest checkpoint that verifies; from scratch if there is none.
        init_from: checkpoint or run directory whose weights a fresh run starts with.
        fork_data: on a resume, go on with the data settings of now (source weights, segment, lanes, boundary) where
            they differ from those of before, instead of refusing them.

    Returns:
        The summary that `longspan train --json` prints; the same on all ranks but for times.

    Raises:
        UsageError: inputs that do not fit together; nothing was written then.
        DivergenceError: too many skipped steps in a row.
        Stopped: a signal came; everything is saved.
        CheckpointError: no checkpoint verifies, or the last save failed.
    """
    with StopRequest() as stop:
        check_usable(run_dir, checkpoint_root(config, run_dir), resume=resume)
        source = open_data(config)
        arguments = {"run_dir": str(run_dir), "resume": resume, "init_from": str(init_from), "fork_data": fork_data}
        mesh = Mesh.build(config.parallel, settings={"arguments": arguments, **config.model_dump(mode="json")})
        directories: list[RunDirectory] = []
        try:
            _check_lanes(config, mesh)
            mesh.on_rank_zero(lambda: directories.append(RunDirectory(run_dir)))
            directory = directories[0] if directories else None
            recorder = Recorder(config, run_dir, mesh, directory)
            mesh.on_rank_zero(lambda: directories[0].claim(config, resume=resume, note=recorder.progress.note))
            limit = config.parallel.timeout_seconds
            with Watchdog(mesh.rank, mesh.world_size, limit, mesh.gather, run_dir / "hang") as watchdog:
                claim = directory.checkpoints if directory else None
                run = Run(config, run_dir, mesh, source, stop, recorder, watchdog, claim)
                return run.execute(resume, init_from, fork_data)
        finally:
            for directory in directories:
                directory.release()
            mesh.close()


def _check_lanes(config: RunConfig, mesh: Mesh) -> None:
    for problem in lane_problems(config, mesh.dp_size):
        raise UsageError(str(problem))


class Run:
    """One process's part of a run. `execute` is the whole life; all ranks go through it together."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        mesh: Mesh,
        source: DataSource,
        stop: StopRequest,
        recorder: Recorder,
        watchdog: Watchdog,
        claim: Claim | None,
    ) -> None:
        """Args: as in `train`; watchdog: is told what phase this process is in; claim: of the checkpoints' folder."""
        self.watchdog, self.claim = watchdog, claim
        self.config, self.run_dir, self.mesh, self.source = config, run_dir, mesh, source
        self.stop, self.recorder, self.note = stop, recorder, recorder.progress.note
        self.threads = set_threads(config.training.threads, mesh.local_world_size)
        self.step = 0
        self.saved_step: int | None = None
        self.save_due = False
        self.counters: dict[str, Any] = {
            "tokens": 0,
            "skips": 0,
            "consecutive_skips": 0,
            "checkpoint_failures": 0,
            "lanes_reset": 0,
            "threads": self.threads,
        }
        self.save_stalls = SaveStalls()
        self.first_step_seconds: float | None = None
        self.last: StepResult | None = None
        self.validation_bits_per_byte: float | None = None
        self.timed_tokens, self.timed_seconds = 0, 0.0

    @property
    def reader(self) -> LaneReader:
        """Reads this rank's lanes."""
        return self.checkpoints.reader

    def execute(self, resume: bool, init_from: Path | None, fork_data: bool = False) -> dict[str, Any]:
        """Build everything, train, save; returns the summary."""
        started = time.monotonic()
        with self.recorder.progress:
            self._build()
            resumed = self._start(resume, init_from, fork_data)
            self.recorder.open(None if resumed is None else self.step)
            status = "FAILED"
            try:
                self._record_start(resumed)
                self.checkpoints.warn_of_place()
                self._train()
                status = "FINISHED"
            except Stopped:
                status = "KILLED"
                raise
            finally:
                if status == "FAILED":
                    self._abandon()
                self.recorder.close(self.step, status)
        return self._summary(time.monotonic() - started)

    def _build(self) -> None:
        config, mesh = self.config, self.mesh
        seed_everything(config.seed)
        model = build_model(config.model)
        model.set_activation_checkpointing(config.training.activation_checkpointing)
        self.engine = Engine(model, config, mesh, self.source.manifest.vocabulary.eos)
        self.lanes = Lanes(self.engine, config.data.lanes, config.training.micro_batch_lanes)
        self.checkpoints = Checkpoints(
            config, checkpoint_root(config, self.run_dir), self.engine, self.lanes, self.source, self.note, self.claim
        )
        self.validation = Validation(
            config,
            self.source.manifest.split("held_out"),
            self.source.documents,
            corpus_tokenizer(self.source.manifest) if config.validation.sample_tokens else None,
            mesh,
        )
        seed_everything(config.seed, mesh.dp_rank + 1)  # ranks that share a lane draw the same dropout

    def _start(self, resume: bool, init_from: Path | None, fork_data: bool) -> Resumed | None:
        """Set the starting point; None if it is no checkpoint of this run."""
        resumed = self.checkpoints.resume(fork_data=fork_data) if resume else None
        if resumed is not None:
            state = resumed.state
            self.step = self.saved_step = state.step
            if init_from is not None:
                self.note("--init-from is not used: the run goes on from its own checkpoint")
            self.counters.update(state.counters, threads=self.threads)
            self.counters["lanes_reset"] += resumed.lanes_reset
            before = state.counters["threads"]
            if before != self.threads:
                self.note(
                    f"{self.threads} CPU threads now, {before} before: results may differ in the last bits. "
                    f"Set training.threads={before} for an exact resume."
                )
            return resumed
        if resume:
            self.note(f"{self.run_dir} holds no checkpoint yet; starting from the first step")
        if init_from is not None:
            vocabulary = self.source.manifest.vocabulary
            self.note(f"weights from {load_initial_weights(self.engine, self.config, vocabulary, init_from)}")
        return None

    def _record_start(self, resumed: Resumed | None) -> None:
        self.recorder.record(
            "start",
            self.step,
            resumed=resumed is not None,
            world_size=self.mesh.world_size,
            threads=self.threads,
            device=str(self.mesh.device),
            lanes_reset=self.counters["lanes_reset"],
        )
        if resumed is not None and resumed.forked:
            plan = self.reader.plan
            before = resumed.state.data["plan"]
            changed = {name: [before[name], value] for name, value in plan.phase().items() if before[name] != value}
            self.recorder.record(
                "data_fork", self.step, changed=changed, lanes_reset=resumed.lanes_reset, lanes_new=resumed.lanes_new
            )

    def _train(self) -> None:
        config = self.config
        if self.step and self._due(config.validation.interval_steps) and not self.recorder.is_validated(self.step):
            self._validate()
        while self.step < config.training.steps:
            result = self._one_step()
            self._collect(self.checkpoints.finished())
            if self.counters["consecutive_skips"] >= config.training.max_consecutive_skips:
                raise self._divergence()
            if result.stop:
                self._stop()
            self.save_due |= self._due(config.checkpoint.interval_steps)
            # a skipped step may come from bad weights, which must not push good checkpoints out
            if self.save_due and (not result.skipped or self.step == config.training.steps):
                self.save_due = False
                self._save()
            if self._due(config.validation.interval_steps):
                self._validate()
        if not self._save_at_last():
            raise CheckpointError(
                f"training is finished, but its last step {self.step} could not be saved. "
                f"{self.checkpoints.last_good()} Mend what the messages above name, then run the same command with "
                f"--resume."
            )

    def _one_step(self) -> StepResult:
        started = time.monotonic()
        self.watchdog.phase("first step" if self.first_step_seconds is None else "step", self.step)
        updates = self.step - self.counters["skips"]
        lr = learning_rate(self.config.schedule, self.config.optimizer.lr_peak, updates + 1, self.config.training.steps)
        batches = self.lanes.micro_batches(self.mesh.on_every_rank(lambda: self.reader.batch(self.step)))
        result, carried = self.engine.step(batches, self.lanes.carried, lr, stop=bool(self.stop))
        if result.skipped:
            self.lanes.roll_back()
        else:
            self.lanes.advance(carried)
            self.last = result
        self.step += 1
        counters = self.counters
        counters["tokens"] += result.num_tokens
        counters["skips"] += result.skipped
        counters["consecutive_skips"] = counters["consecutive_skips"] + 1 if result.skipped else 0
        seconds = time.monotonic() - started
        if self.first_step_seconds is None:
            self.first_step_seconds = process_age_seconds()
        else:
            self.timed_tokens += result.num_tokens
            self.timed_seconds += seconds
        self.recorder.step(self.step, result, lr, seconds, counters)
        return result

    def _save(self) -> None:
        """Start to write a checkpoint; training goes on meanwhile, and if it fails."""
        waited = self._join_save()
        self.watchdog.phase("save", self.step)
        self.checkpoints.begin(self.step, dict(self.counters), waited)

    def _join_save(self) -> float:
        """Wait for the save that goes on, if there is one; seconds that it took. Afterwards all ranks know the same."""
        started = time.monotonic()
        self.watchdog.phase("save", self.step)
        self._collect(self.checkpoints.join())
        return time.monotonic() - started

    def _collect(self, saved: Saved | None) -> None:
        """Note the outcome of a save; a failed one is counted."""
        if saved is None:
            return
        result, times = saved.result, {"stall_seconds": saved.stall_seconds, "waited_seconds": saved.waited_seconds}
        self.save_stalls.add(saved)
        if result.ok:
            self.saved_step = saved.step
            self.recorder.record(
                "checkpoint",
                saved.step,
                path=str(result.path),
                seconds=result.seconds,
                **times,
                quarantined=saved.quarantined,
            )
            self.recorder.progress.saved(saved.step, result.seconds, saved.stall_seconds, saved.waited_seconds)
        else:
            self.counters["checkpoint_failures"] += 1
            self.recorder.record("checkpoint_failure", saved.step, error=result.error, seconds=result.seconds, **times)
            self.note(str(result.error))

    def _save_at_last(self) -> bool:
        """Wait for the save that goes on; try once more if this step is not saved or was removed. Whether it is."""
        self._join_save()
        if self.saved_step != self.step or not self.checkpoints.is_there(self.step):
            self.saved_step = None
            self._save()
            self._join_save()
        return self.saved_step == self.step

    def _abandon(self) -> None:
        """Let a save end that goes on while the run fails, and hide nothing of why it does."""
        try:
            self._collect(self.checkpoints.join(_LAST_SAVE_SECONDS))
        except Exception as error:
            self.note(f"the checkpoint that was being written is lost: {error}")

    def _validate(self) -> None:
        started = time.monotonic()
        self.watchdog.phase("validation", self.step)
        result = self.validation.run(self.engine, lambda: bool(self.stop))
        if result is None:
            self._stop()
        if result.num_bytes:
            self.validation_bits_per_byte = result.bits_per_byte
        seconds = time.monotonic() - started
        self.recorder.record("validation", self.step, **result.record(), seconds=seconds)
        self.note(
            f"step {self.step}: held-out {result.bits_per_byte:.4f} bits/byte over {result.num_bytes:,} bytes "
            f"({seconds:.1f} s)"
        )
        if result.sample is not None:
            self.note(f"sample: {self.config.validation.sample_prompt + result.sample!r}")

    def _due(self, interval_steps: int) -> bool:
        return self.step % interval_steps == 0 or self.step == self.config.training.steps

    def _stop(self) -> NoReturn:
        """Save if need be and leave.

        Raises:
            Stopped: unless the save failed.
            CheckpointError: the save failed.
        """
        signal_name = self.stop.received or "a signal on another rank"
        if not self._save_at_last():
            raise CheckpointError(
                f"stopped by {signal_name}, and step {self.step} could not be saved. {self.checkpoints.last_good()}"
            )
        raise Stopped(
            f"stopped by {signal_name} after step {self.step}; everything is saved in {self.checkpoints.newest()}. "
            f"Go on with --run-dir {self.run_dir} --resume."
        )

    def _divergence(self) -> DivergenceError:
        self._join_save()
        return DivergenceError(
            f"loss or gradient was not finite in {self.counters['consecutive_skips']} steps in a row "
            f"(training.max_consecutive_skips = {self.config.training.max_consecutive_skips}), the last of them step "
            f"{self.step}. {self.checkpoints.last_good()} Lower optimizer.lr_peak or look at the data of these steps."
        )

    def _summary(self, seconds: float) -> dict[str, Any]:
        newest = self.checkpoints.newest()
        return {
            "run_dir": str(self.run_dir),
            "steps": self.step,
            "checkpoint": None if newest is None else str(newest),
            "loss": _finite(self.last.loss if self.last else None),
            "bits_per_byte": _finite(self.last.bits_per_byte if self.last else None),
            "validation_bits_per_byte": _finite(self.validation_bits_per_byte),
            "tokens": self.counters["tokens"],
            "tokens_per_second": self.timed_tokens / self.timed_seconds if self.timed_seconds else None,
            "seconds": seconds,
            "first_step_seconds": self.first_step_seconds,
            "skips": self.counters["skips"],
            "checkpoint_failures": self.counters["checkpoint_failures"],
            **self.save_stalls.summary(),
            "lanes_reset": self.counters["lanes_reset"],
            "quarantined_documents": sorted(self.reader.quarantine),
            "world_size": self.mesh.world_size,
            "threads": self.threads,
            "tracking_uri": self.recorder.tracking_uri,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
