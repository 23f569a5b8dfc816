"""MLflow: the metrics of log.jsonl, each exactly once (evaluations: evaluation_tracking.py).

The training run writes log.jsonl and nothing else; a thread here follows that file. So no fault of a tracking server
can stop or slow a step, and what could not be sent is sent by whoever comes next: a resumed run or an evaluation.
mlflow takes a second to import and its first sqlite file two more: both happen in the thread, after the
first steps.
"""

from __future__ import annotations

import json
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
from longspan.trainer.metric_sender import Metric, Sender, Store, exclusive, tracking_uri

MAX_PARAMS = 100  # MLflow's limit of parameters in one call
POLL_SECONDS = 2.0
SETTLE_SECONDS = 5.0  # after the first log line: the first steps should not share the interpreter with an import
MAX_BACKOFF_SECONDS = 60.0
SETUP_SECONDS = 30.0  # longest wait for another process that creates the same database
LOCK = ".tracking.lock"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # schemes of URIs that name no server


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
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a repeated request to create something may create it twice
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is the command's
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
        if not self._runs_with(tag, value):
            self._client.create_run(self._experiment, start_time=start_ms, tags={**tags, tag: value}, run_name=name)
        kept, *doubles = self._runs_with(tag, value)
        for run_id in doubles:  # a server that was killed or slow may have created what its client gave up on
            self._client.delete_run(run_id)
        for missing in tags.items() - self._client.get_run(kept).data.tags.items():
            self._client.set_tag(kept, *missing)
        return kept

    def start_ms(self, run_id: str) -> int:
        """When a run began, unix milliseconds."""
        return int(self._client.get_run(run_id).info.start_time)

    def _runs_with(self, tag: str, value: str) -> list[str]:
        """Ids of all runs with this tag, in an order that everybody sees."""
        found = self._client.search_runs([self._experiment], filter_string=f"tags.`{tag}` = '{value}'", max_results=10)
        return sorted(str(run.info.run_id) for run in found)

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

    def log_dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        """Say what data a run read; the same again is harmless."""
        entities = self._entities
        dataset = entities.Dataset(name, digest, "local", json.dumps({"uri": source}))
        context = entities.InputTag("mlflow.data.context", "evaluation")
        self._client.log_inputs(run_id, [entities.DatasetInput(dataset, [context])])

    def set_alias(self, model: str, alias: str, run_id: str, tags: dict[str, str]) -> None:
        """Move an alias of a registered model to the version that stands for a run; makes what is missing."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = [v for v in self._client.search_model_versions(f"name='{model}'") if v.run_id == run_id]
        version = known[0] if known else self._client.create_model_version(model, f"runs:/{run_id}", run_id, tags)
        self._client.set_registered_model_alias(model, alias, version.version)

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
    """The store that a run's metrics go to; its artifacts lie beside the run unless a server keeps them."""
    uri = tracking_uri(run_dir, config)
    is_database = uri.partition(":")[0].partition("+")[0] in DATABASES
    return MlflowStore(uri, config.experiment, run_dir.absolute().parent / "mlflow-artifacts" if is_database else None)


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
                return self._warn(f"metrics are not sent to {self.uri} ({brief(error)}); they stay in log.jsonl.")

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
                    f"cannot reach the tracking store {self.uri} ({brief(error)}). "
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
        print(f"longspan: metrics of {run_dir} were not sent: {brief(error)}", file=sys.stderr, flush=True)
        return False
    return True


def brief(error: Exception) -> str:
    """An error in one line, without the SQL statements that a store adds."""
    text = " ".join(str(error).split()).split(" [SQL: ")[0]
    return f"{type(error).__name__}: {text[:200]}"
