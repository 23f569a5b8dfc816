"""MLflow: the metrics of log.jsonl, each exactly once, and the curves of evaluations.

The training run writes log.jsonl and nothing else; a thread here follows that file. So no fault of a tracking server
can stop or slow a step, and what could not be sent is sent by whoever comes next: a resumed run or an evaluation.
mlflow takes a second to import and its first sqlite file two more: both happen in the thread, after the
first steps.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from longspan.trainer import recipes
from longspan.trainer.config import RunConfig, TrackingConfig
from longspan.trainer.metric_sender import MAX_BATCH, Metric, Sender, Store, TrackingState, exclusive, tracking_uri

MAX_PARAMS = 100  # MLflow's limit of parameters in one call
POLL_SECONDS = 2.0
SETTLE_SECONDS = 5.0  # after the first log line: the first steps should not share the interpreter with an import
MAX_BACKOFF_SECONDS = 60.0
SETUP_SECONDS = 30.0  # longest wait for another process that creates the same database
LOCK = ".tracking.lock"
KEY_TAG = "eval.key"
PARENT_TAG = "mlflow.parentRunId"
LOGGED = "_LOGGED"


class MlflowStore:
    """An experiment of an MLflow store. Slow calls fail after seconds; nothing is sent anywhere else."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None) -> None:
        """Import mlflow, open the store, find or create the experiment.

        Args:
            uri: tracking URI.
            experiment: name.
            artifacts: folder for the artifacts of a new experiment; None: the server's own place.
        """
        for name, value in {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }.items():
            os.environ.setdefault(name, value)
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # its notes on new tables would cut progress lines
        with suppress(ImportError):  # DeepSpeed imports mlflow too, perhaps before the variables above were set
            from mlflow.telemetry.client import set_telemetry_client

            set_telemetry_client()
        self._entities = entities
        database = _sqlite_file(uri)
        with exclusive(database.parent / ".mlflow.lock", SETUP_SECONDS) if database else nullcontext():
            if database:
                _create_whole(database)
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            self._experiment = (
                found.experiment_id
                if found
                else self._client.create_experiment(
                    experiment, artifact_location=artifacts.as_uri() if artifacts else None
                )
            )

    def find_or_create_run(self, tag: str, value: str, name: str, tags: dict[str, str], start_ms: int) -> str:
        """Id of the run whose `tag` is `value`."""
        found = self._client.search_runs([self._experiment], filter_string=f"tags.`{tag}` = '{value}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = self._client.create_run(self._experiment, start_time=start_ms, tags={**tags, tag: value}, run_name=name)
        return str(run.info.run_id)

    def highest_steps(self, run_id: str) -> dict[str, int] | None:
        """Highest step per metric name; None if there is no such run."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return {metric.key: int(metric.step) for metric in run.to_proto().data.metrics}

    def log(self, run_id: str, metrics: list[Metric]) -> None:
        """Send at most 1000 points, all or none."""
        self._client.log_batch(run_id, metrics=[self._entities.Metric(*metric) for metric in metrics])

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        """Send parameters; sending the same again is harmless, and a changed one keeps its first value."""
        from mlflow.exceptions import MlflowException

        entities = [self._entities.Param(name, value) for name, value in params.items()]
        for start in range(0, len(entities), MAX_PARAMS):
            try:
                self._client.log_batch(run_id, params=entities[start : start + MAX_PARAMS])
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise

    def log_artifacts(self, run_id: str, result: dict[str, Any], picture: Path) -> None:
        """Store result.json and the curve's picture."""
        self._client.log_dict(run_id, result, "result.json")
        self._client.log_artifact(run_id, str(picture))

    def set_status(self, run_id: str, status: str) -> None:
        """RUNNING, FINISHED, KILLED or FAILED."""
        if status == "RUNNING":
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status)


def _sqlite_file(uri: str) -> Path | None:
    """The file behind an sqlite URI; None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") and "?" not in uri else None


def _create_whole(database: Path) -> None:
    """Make MLflow's tables in a file that gets its name last.

    It takes seconds and dozens of migrations; a process that dies among them, or a disk that fills, would leave a
    database that no later process can open.
    """
    from mlflow.tracking import MlflowClient

    if database.exists():
        return
    for left in database.parent.glob(f".{database.name}.new-*"):
        left.unlink()
    unfinished = database.with_name(f".{database.name}.new-{uuid.uuid4().hex}")  # MLflow keeps an engine per name
    MlflowClient(tracking_uri=f"sqlite:///{unfinished}").search_experiments(max_results=1)
    os.replace(unfinished, database)


def open_store(run_dir: Path, config: TrackingConfig) -> Store:
    """The store that a run's metrics go to; its artifacts lie beside the run unless a URI was configured."""
    artifacts = None if config.uri else run_dir.absolute().parent / "mlflow-artifacts"
    return MlflowStore(tracking_uri(run_dir, config), config.experiment, artifacts)


class Tracker:
    """Follows a run's log.jsonl in a daemon thread. No method raises, and none but `close` waits."""

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        *,
        make_store: Callable[[], Store] | None = None,
        warn: Callable[[str], None] | None = None,
        settle_seconds: float = SETTLE_SECONDS,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Touch nothing yet.

        Args:
            run_dir: run directory, on rank 0.
            config: its configuration; with `tracking.enabled` false nothing is ever sent.
            make_store: another store than MLflow's.
            warn: told once when the store cannot be reached, and once when it can again; standard error if None.
            settle_seconds: from the first log line to the first use of the store.
            poll_seconds: between looks at the log.
        """
        self.uri = tracking_uri(run_dir, config.tracking)
        self._run_dir = run_dir
        self._config = config
        self._make_store = make_store or (lambda: open_store(run_dir, config.tracking))
        self._warn = warn or (lambda message: print(f"longspan: {message}", file=sys.stderr, flush=True))
        self._settle_seconds = settle_seconds
        self._poll_seconds = poll_seconds
        self._stop = threading.Event()
        self._abandoned = threading.Event()
        self._complete = not config.tracking.enabled
        self._failures = 0
        self._status = "FINISHED"
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)

    def start(self) -> None:
        """Begin to follow the log."""
        if self._config.tracking.enabled:
            self._thread.start()

    def close(self, timeout: float = 5.0, status: str = "FINISHED") -> bool:
        """Send what is left, for at most `timeout` seconds; whether the store now has everything.

        Args:
            timeout: seconds.
            status: MLflow's word for how the run stands: FINISHED, KILLED or FAILED.
        """
        self._status = status
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._abandoned.set()
        return self._complete

    def _run(self) -> None:
        while True:
            try:
                with exclusive(self._run_dir / LOCK, 0.0):
                    return self._follow(Sender(self._run_dir, self._config, self._make_store))
            except TimeoutError:  # an evaluation or a report sends what an earlier process left
                if self._stop.wait(self._poll_seconds):
                    return
            except Exception as error:
                return self._warn(f"metrics are not sent to {self.uri} ({_brief(error)}); they stay in log.jsonl.")

    def _follow(self, sender: Sender) -> None:
        while not sender.has_content() and not self._stop.wait(self._poll_seconds):
            pass
        self._stop.wait(self._settle_seconds)
        while True:
            last = self._stop.is_set()
            reached = self._try(sender, last)
            if last:
                self._complete = reached
                return
            pause = self._poll_seconds * 2 ** min(self._failures, 16)
            self._stop.wait(min(pause, MAX_BACKOFF_SECONDS))

    def _try(self, sender: Sender, last: bool) -> bool:
        try:
            sender.send(self._abandoned.is_set if last else self._stop.is_set)
            if last:
                sender.set_status(self._status)
        except Exception as error:
            self._failures += 1
            if self._failures == 1 and not self._abandoned.is_set():
                self._warn(
                    f"cannot reach the tracking store {self.uri} ({_brief(error)}). "
                    f"The run goes on; metrics stay in log.jsonl and are sent later: by this run when the store "
                    f"answers, by `longspan train --resume`, or by `longspan evaluate`."
                )
            return False
        if self._failures:
            self._warn(f"the tracking store {self.uri} answers again; all metrics were sent.")
        self._failures = 0
        return True


def backfill(run_dir: Path, make_store: Callable[[], Store] | None = None) -> bool:
    """Send what a run's log has and MLflow has not; whether MLflow now has everything. Never raises.

    A run that is training at the moment does this itself and is left alone. With nothing to send, mlflow is not loaded.
    """
    try:
        config = recipes.load(RunConfig, run_dir / "config.yaml")
        if not config.tracking.enabled:
            return True
        with exclusive(run_dir / LOCK, 0.0):
            sender = Sender(run_dir, config, make_store or (lambda: open_store(run_dir, config.tracking)))
            sender.send()
            sender.set_status("FINISHED" if sender.highest_step >= config.training.steps else "KILLED")
    except TimeoutError:
        return False
    except Exception as error:
        print(f"longspan: metrics of {run_dir} were not sent: {_brief(error)}", file=sys.stderr, flush=True)
        return False
    return True


def log_evaluation(
    run_dir: Path, result: dict[str, Any], picture: Path, make_store: Callable[[], Store] | None = None
) -> bool:
    """Log an evaluation: one MLflow run per key, and columns on the training run. Never raises.

    The curve's metrics have step = context length; all points carry the checkpoint's time, so that logging again
    changes nothing. A finished log leaves `_LOGGED` beside the picture; without it, log again.

    Args:
        run_dir: run directory of the evaluated checkpoint.
        result: result.json.
        picture: RUN/evals/KEY/curve.png.
        make_store: another store than MLflow's.

    Returns:
        Whether MLflow has all of it.
    """
    if (picture.parent / LOGGED).exists():
        return True
    backfill(run_dir, make_store)
    try:
        config = recipes.load(RunConfig, run_dir / "config.yaml")
        if not config.tracking.enabled:
            return False
        store = make_store() if make_store else open_store(run_dir, config.tracking)
        state = TrackingState.read(run_dir, tracking_uri(run_dir, config.tracking), config.tracking.experiment)
        with exclusive(picture.parent / LOCK, SETUP_SECONDS):
            _log_evaluation(store, state.run_id, result, picture)
        (picture.parent / LOGGED).touch()
    except Exception as error:
        print(
            f"longspan: evaluation {result['key'][:8]} is not in the tracking store yet ({_brief(error)}); "
            f"its result is complete in {picture.parent}.",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


def _log_evaluation(store: Store, parent: str | None, result: dict[str, Any], picture: Path) -> None:
    checkpoint, spec = result["checkpoint"], result["spec"]
    time_ms = int(checkpoint["committed"] * 1000)
    tags = {
        "ckpt.step": str(checkpoint["step"]),
        "ckpt.fingerprint": checkpoint["fingerprint"],
        "eval.spec": spec["name"],
        "dataset.digest": result["data"]["digest"][:32],
        **({PARENT_TAG: parent} if parent else {}),
    }
    name = f"{checkpoint['run']} step {checkpoint['step']} {spec['name']}"
    run_id = store.find_or_create_run(KEY_TAG, result["key"], name, tags, time_ms)
    points = evaluation_points(result, time_ms)
    for start in range(0, len(points), MAX_BATCH):
        store.log(run_id, points[start : start + MAX_BATCH])
    store.log_artifacts(run_id, result, picture)
    store.set_status(run_id, "FINISHED")
    if parent:
        store.log(parent, evaluation_columns(result, time_ms))


def evaluation_points(result: dict[str, Any], time_ms: int) -> list[Metric]:
    """Curves over context length: constant names, step = context length (the longest true one for carried)."""
    points: list[Metric] = []
    curve = [(entry["mode"], entry["context_tokens"], entry) for entry in result["curve"]]
    curve += [(mode, result[mode]["context_max"], result[mode]) for mode in ("carried", "swapped") if result[mode]]
    for mode, length, entry in curve:
        points += [
            (f"ppl_vs_len/{mode}/{field}", float(entry[field]), time_ms, int(length))
            for field in ("bits_per_byte", "ci_low", "ci_high")
        ]
    gain = result["memory_gain"]
    if gain:
        points += [
            (f"memory_gain/{field}", float(gain[field]), time_ms, int(gain["context_tokens"]))
            for field in ("bits_per_byte", "ci_low", "ci_high")
        ]
    return points


def evaluation_columns(result: dict[str, Any], time_ms: int) -> list[Metric]:
    """Sortable columns of the training run over training steps, e.g. `bits_per_byte_truncated/ctx_00001024`."""
    step = int(result["checkpoint"]["step"])
    entries = [(entry["mode"], entry["context_tokens"], entry) for entry in result["curve"]]
    entries.append(("carried", result["carried"]["context_max"], result["carried"]))
    columns = [
        (f"bits_per_byte_{mode}/ctx_{length:08d}", float(entry["bits_per_byte"]), time_ms, step)
        for mode, length, entry in entries
    ]
    if result["memory_gain"]:
        columns.append(("memory_gain/bits_per_byte", float(result["memory_gain"]["bits_per_byte"]), time_ms, step))
    return columns


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()).split(" [SQL: ")[0]
    return f"{type(error).__name__}: {text[:200]}"
