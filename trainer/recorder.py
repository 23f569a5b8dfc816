"""What a run writes down and shows: configuration, log, tracking and progress, all on rank 0 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.cluster.mesh import Mesh
from longspan.modeling.flops import train_flops_per_token
from longspan.trainer import recipes
from longspan.trainer.config import RunConfig
from longspan.trainer.device import memory_gib, peak_flops
from longspan.trainer.engine import StepResult
from longspan.trainer.log import RunLog
from longspan.trainer.progress import Progress
from longspan.trainer.run_directory import RunDirectory
from longspan.trainer.tracking import Tracker


class Recorder:
    """Every rank has one and calls it alike; those other than 0 write and print nothing.

    Attributes:
        progress: the person's view. tracking_uri: where metrics go besides the log; None before `open`
            and if they go nowhere else.
    """

    def __init__(self, config: RunConfig, run_dir: Path, mesh: Mesh, directory: RunDirectory | None) -> None:
        """Args: directory: the open run directory on rank 0, None elsewhere."""
        self._config, self._run_dir, self._mesh, self._directory = config, run_dir, mesh, directory
        self._flops_per_token = train_flops_per_token(config.model, config.data.segment_tokens)
        self._log: RunLog | None = None
        self._tracker: Tracker | None = None
        self.tracking_uri: str | None = None
        self.progress = Progress(
            num_steps=config.training.steps,
            peak_flops=peak_flops(mesh.device),
            silent=mesh.rank != 0,
        )

    def open(self, keep_through_step: int | None) -> None:
        """Begin to write into the run directory, now that the run is known to be able to start.

        Args:
            keep_through_step: what the log holds beyond this step is cut off; None: a fresh log.
        """

        def work() -> None:
            assert self._directory is not None
            if self._directory.stale_holder:
                self.progress.note(f"took over the lock of a trainer that is gone: {self._directory.stale_holder}")
            self._directory.write_config(recipes.dump(self._config))
            self._log = RunLog(self._run_dir, keep_through_step)
            self._tracker = Tracker(self._run_dir, self._config)
            self._tracker.start()
            if self._config.tracking.enabled:
                self.tracking_uri = self._tracker.uri

        self._mesh.on_rank_zero(work)

    def close(self, step: int, status: str) -> None:
        """Args: status: FINISHED, KILLED or FAILED."""
        self.record("end", step, status=status)
        if self._log:
            self._log.close()
        if self._tracker:
            self._tracker.close(status=status)

    def record(self, kind: str, step: int, **fields: Any) -> None:
        """Append to the log."""
        if self._log:
            self._log.write(kind, step, **fields)

    def step(self, step: int, result: StepResult, lr: float, seconds: float, counters: dict[str, Any]) -> None:
        """Record and show one step."""
        if self._log is None:
            return
        tokens_per_second = result.num_tokens / seconds
        fields = {
            "loss": result.loss,
            "aux_loss": result.aux_loss,
            "bits_per_byte": result.bits_per_byte,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": tokens_per_second,
            "tokens": counters["tokens"],
            "model_flops_per_second": tokens_per_second * self._flops_per_token,
            "memory_gib": memory_gib(self._mesh.device),
            "skipped": result.skipped,
            "skips": counters["skips"],
            "seconds": seconds,
        }
        self._log.write("step", step, **fields)
        self.progress.step(fields, step, seconds)

    def is_validated(self, step: int) -> bool:
        """Whether the log has the validation of this step; every rank must ask."""
        return self._mesh.any_rank(self._log is not None and step in self._log.validated)
