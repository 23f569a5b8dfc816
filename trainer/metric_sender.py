"""What log.jsonl has and a tracking store has not, sent once; and where that is remembered.

Exactly once holds because a store drops a point with the same key, step, value and timestamp (timestamps come from
the log), and because a step that the store already has is never sent again.
"""

from __future__ import annotations

import fcntl
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from longspan.trainer.config import RunConfig, TrackingConfig
from longspan.trainer.metric_log import LogLine, MetricLog, Position, kind_of

STATE = "tracking.json"
LOG = "log.jsonl"
MAX_BATCH = 1000  # MLflow's limit of metrics in one call
TOKEN_TAG = "longspan.token"  # noqa: S105 - a name that finds a run again, no secret
_LOCK_POLL_SECONDS = 0.1

Metric = tuple[str, float, int, int]
"""Name, value, unix milliseconds, step."""


def tracking_uri(run_dir: Path, config: TrackingConfig) -> str:
    """Where a run's metrics go: the configured URI, or the sqlite file `mlflow.db` beside the run directory."""
    return config.uri or f"sqlite:///{run_dir.absolute().parent / 'mlflow.db'}"


class Store(Protocol):
    """What is asked of a tracking server; every call may raise anything."""

    def find_or_create_run(self, tag: str, value: str, name: str, tags: dict[str, str], start_ms: int) -> str:
        """Id of the run whose `tag` is `value`; a new one gets the name, the tags and the start."""

    def start_ms(self, run_id: str) -> int:
        """When a run began, unix milliseconds: the start that its maker gave."""

    def highest_steps(self, run_id: str) -> dict[str, int] | None:
        """Highest step per metric name; None if there is no such run."""

    def log(self, run_id: str, metrics: list[Metric]) -> None:
        """Store at most 1000 points, all or none; a point that is there already stays one point."""

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        """Store parameters; a known one keeps its value."""

    def log_artifacts(self, run_id: str, result: dict[str, Any], picture: Path) -> None:
        """Store result.json and a picture."""

    def log_dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        """Say what data a run read; digest of at most 36 characters."""

    def set_alias(self, model: str, alias: str, run_id: str, tags: dict[str, str]) -> None:
        """Move an alias of a registered model to the version that stands for a run; makes what is missing."""

    def set_status(self, run_id: str, status: str) -> None:
        """RUNNING, FINISHED, KILLED or FAILED."""


class TrackingState(BaseModel):
    """RUN/tracking.json: which MLflow run, and how much of the log it has."""

    uri: str
    experiment: str
    token: str
    birth: str = ""
    run_id: str | None = None
    offset: int = 0
    anchor: str = ""
    highest: dict[str, int] = {}

    @classmethod
    def read(cls, run_dir: Path, uri: str, experiment: str) -> TrackingState:
        """The state on disk; a new one if there is none, it is damaged, or it belongs to another store."""
        try:
            state = cls.model_validate_json((run_dir / STATE).read_bytes())
            if (state.uri, state.experiment) == (uri, experiment):
                return state
        except (OSError, ValueError):
            pass
        return cls(uri=uri, experiment=experiment, token=uuid.uuid4().hex)

    def write(self, run_dir: Path) -> None:
        """Replace the file in one step."""
        temporary = run_dir / f".{STATE}.tmp"
        temporary.write_text(self.model_dump_json() + "\n", encoding="utf-8")
        temporary.replace(run_dir / STATE)


class Sender:
    """Sends what log.jsonl has and MLflow has not. Raises whatever the store raises; the next call goes on."""

    def __init__(self, run_dir: Path, config: RunConfig, make_store: Callable[[], Store]) -> None:
        """Touch nothing yet.

        Args:
            run_dir: run directory.
            config: its configuration, sent as parameters.
            make_store: called when there is something to send.
        """
        self._run_dir = run_dir
        self._config = config
        self._make_store = make_store
        self._store: Store | None = None
        tracking = config.tracking
        self._state = TrackingState.read(run_dir, tracking_uri(run_dir, tracking), tracking.experiment)
        self._log = MetricLog(
            run_dir / LOG, Position(self._state.offset, self._state.anchor, dict(self._state.highest))
        )

    def has_content(self) -> bool:
        """Whether the log has a line."""
        return self._log.has_content()

    @property
    def highest_step(self) -> int:
        """Last training step that was sent; -1 before the first."""
        return self._log.position.highest.get("step", -1)

    def send(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Send all new lines, in batches of whole lines; looks at `stopped` between batches."""
        self._follow_rebirth()
        if next(self._log.new_lines(), None) is None:
            return
        if self._store is None:
            self._store = self._attach()
        batch: list[LogLine] = []
        for line in self._log.new_lines():
            if sum(len(old.metrics) for old in batch) + len(line.metrics) > MAX_BATCH:
                self._send_batch(batch)
                batch = []
                if stopped():
                    return
            batch.append(line)
        if batch:
            self._send_batch(batch)

    def set_status(self, status: str) -> None:
        """Tell the store how the run stands, if it knows the run."""
        if self._store is not None and self._state.run_id is not None:
            self._store.set_status(self._state.run_id, status)

    def _follow_rebirth(self) -> None:
        """A log with another first line is another run: it gets an MLflow run of its own."""
        birth = self._log.birth()
        if self._state.birth not in ("", birth):
            state = self._state
            self._state = TrackingState(uri=state.uri, experiment=state.experiment, token=uuid.uuid4().hex)
            self._log.position = Position()
            self._store = None
        self._state.birth = birth

    def _attach(self) -> Store:
        """Open the store and this run in it; what it already has counts as sent."""
        store = self._make_store()
        state = self._state
        steps = store.highest_steps(state.run_id) if state.run_id is not None else None
        if steps is None:
            state.write(self._run_dir)  # the token first: a run created just before a crash is found by it again
            name = self._run_dir.absolute().name
            tags = {"longspan.run_dir": str(self._run_dir.absolute()), "longspan.recipe": self._config.name}
            start_ms = int(time.time() * 1000)
            state.run_id = store.find_or_create_run(TOKEN_TAG, state.token, name, tags, start_ms)
            steps = store.highest_steps(state.run_id) or {}
            store.log_params(state.run_id, flat_params(self._config))
            self._log.position = Position()
        position = self._log.position
        for kind in {kind_of(name) for name in steps}:
            known = max(step for name, step in steps.items() if kind_of(name) == kind)
            position.highest[kind] = max(known, position.highest.get(kind, -1))
        store.set_status(state.run_id, "RUNNING")  # type: ignore[arg-type]
        self._persist()
        return store

    def _send_batch(self, batch: list[LogLine]) -> None:
        assert self._store is not None and self._state.run_id is not None
        metrics = [(name, value, line.time_ms, line.step) for line in batch for name, value in line.metrics.items()]
        self._store.log(self._state.run_id, metrics)
        self._log.advance(batch)
        self._persist()

    def _persist(self) -> None:
        position = self._log.position
        self._state.offset, self._state.anchor = position.offset, position.anchor
        self._state.highest = dict(position.highest)
        self._state.write(self._run_dir)


def flat_params(config: BaseModel) -> dict[str, str]:
    """The configuration as `section.field` -> text."""
    flat: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                add(f"{name}.{key}" if name else key, item)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for place, item in enumerate(value):
                add(f"{name}.{place}", item)
        else:
            flat[name] = str(value)

    add("", config.model_dump(mode="json"))
    return flat


@contextmanager
def exclusive(path: Path, timeout: float) -> Iterator[None]:
    """Hold a lock file; it is free again when this process ends, however it ends.

    Raises:
        TimeoutError: another process holds it for longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{path} is held by another process") from None
                time.sleep(_LOCK_POLL_SECONDS)
        yield
