"""Evaluations in MLflow: one run per (checkpoint, spec) under its training run, each exactly once.

A marker beside the result, written last, says that the store has all of it; without the marker everything is sent
again, which changes nothing: runs are found by their key, and a point with the same key, step, value and timestamp
stays one point. Timestamps are the checkpoint's as whoever logged first saw it, never the present: copies of a run have
the same key and log to the same run, though copying may have changed the times of their files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from longspan.trainer import recipes
from longspan.trainer.config import RunConfig
from longspan.trainer.metric_sender import LOG, MAX_BATCH, Metric, Store, TrackingState, exclusive, tracking_uri
from longspan.trainer.tracking import LOCK, backfill, brief, open_store

KEY_TAG = "eval.key"
PARENT_TAG = "mlflow.parentRunId"
LOGGED = "_LOGGED"
MAX_DIGEST = 36  # MLflow's limit of a data set's digest
BEST_ALIAS = "best-bpb"

Outcome = Literal["logged", "elsewhere", "off", "refused", "later"]


def log_evaluation(
    run_dir: Path, result: dict[str, Any], picture: Path, make_store: Callable[[], Store] | None = None
) -> bool:
    """As `send_evaluation`; whether MLflow has all of it."""
    return send_evaluation(run_dir, result, picture, make_store) == "logged"


def send_evaluation(
    run_dir: Path, result: dict[str, Any], picture: Path, make_store: Callable[[], Store] | None = None
) -> Outcome:
    """Log an evaluation, unless that was done. Never raises.

    Args:
        run_dir: run directory of the evaluated checkpoint.
        result: result.json.
        picture: RUN/evals/KEY/curve.png.
        make_store: another store than MLflow's.

    Returns:
        logged: MLflow has all of it; elsewhere: another process is logging it; off: the run is not tracked; refused:
        the store answers but does not take this one as it is; later: the store does not answer. After either of the
        last two a later call sends it.
    """
    folder = picture.parent
    opened: Callable[[], Store] | None = None
    store: Store | None = None
    try:
        if (folder / LOGGED).exists():
            return "logged"
        config = recipes.load(RunConfig, run_dir / "config.yaml")
        if not config.tracking.enabled:
            return "off"
        with ExitStack() as held:
            try:
                held.enter_context(exclusive(folder / LOCK, 0.0))
            except TimeoutError:
                return "elsewhere"
            if not (folder / LOGGED).exists():
                opened = make_store or partial(open_store, run_dir, config.tracking)
                store = opened()
                backfill(run_dir, opened)
                _log_evaluation(store, _parent(run_dir, config), result, picture)
                (folder / LOGGED).touch()
    except Exception as error:
        refused = opened is None or (store is not None and _answers(opened))
        what = "is refused by the tracking store" if refused else "is not in the tracking store yet"
        print(
            f"longspan: evaluation {result['key'][:8]} of {run_dir} {what} ({brief(error)}); its "
            f"result is complete in {folder}, and the next pass or `longspan evaluate` sends it.",
            file=sys.stderr,
            flush=True,
        )
        return "refused" if refused else "later"
    return "logged"


def store_name(run_dir: Path) -> str:
    """Which store a run's evaluations go to: runs with the same name share it. Never raises."""
    try:
        return tracking_uri(run_dir, recipes.load(RunConfig, run_dir / "config.yaml").tracking)
    except Exception:  # a configuration that cannot be read: whatever goes wrong is this run's affair alone
        return str(run_dir.absolute())


def _answers(make_store: Callable[[], Store]) -> bool:
    """Whether a store that just failed can be opened: then it has something against what it was given."""
    try:
        make_store()
    except Exception:
        return False
    return True


def move_best(
    run_dir: Path, results: list[dict[str, Any]], best: dict[str, Any], make_store: Callable[[], Store] | None = None
) -> bool:
    """Let the alias `best-bpb` of the registered model RUN.SPEC mean `best`; whether it does. Never raises.

    Args:
        run_dir: run directory.
        results: of one spec; used for nothing but the count in the version's tags.
        best: one of them, chosen by `trainer.evaluation.best`; its run must have been logged.
        make_store: another store than MLflow's.
    """
    try:
        config = recipes.load(RunConfig, run_dir / "config.yaml")
        store = make_store() if make_store else open_store(run_dir, config.tracking)
        run_id = store.find_or_create_run(KEY_TAG, best["key"], _name(best), _tags(best, None), _time_ms(best))
        checkpoint = best["checkpoint"]
        tags = {
            "ckpt.path": checkpoint["path"],
            "ckpt.step": str(checkpoint["step"]),
            "ckpt.fingerprint": checkpoint["fingerprint"],
            "carried_bits_per_byte": f"{best['carried']['bits_per_byte']:.6f}",
            "of_checkpoints": str(len(results)),
        }
        store.set_alias(f"{checkpoint['run']}.{best['spec']['name']}", BEST_ALIAS, run_id, tags)
    except Exception as error:
        print(f"longspan: alias {BEST_ALIAS} was not moved: {brief(error)}", file=sys.stderr, flush=True)
        return False
    return True


def _parent(run_dir: Path, config: RunConfig) -> str | None:
    """The training run's id; None if nobody trained here.

    Raises:
        ConnectionError: it has a log, but no run in the store yet: evaluations are logged after it.
    """
    tracking = config.tracking
    state = TrackingState.read(run_dir, tracking_uri(run_dir, tracking), tracking.experiment)
    log = run_dir / LOG
    if state.run_id is None and log.is_file() and log.stat().st_size:
        raise ConnectionError("its training run is not in the store yet")
    return state.run_id


def _time_ms(result: dict[str, Any]) -> int:
    return int(result["checkpoint"]["committed"] * 1000)


def _name(result: dict[str, Any]) -> str:
    checkpoint = result["checkpoint"]
    return f"{checkpoint['run']} step {checkpoint['step']} {result['spec']['name']}"


def _tags(result: dict[str, Any], parent: str | None) -> dict[str, str]:
    checkpoint = result["checkpoint"]
    return {
        "ckpt.step": str(checkpoint["step"]),
        "ckpt.fingerprint": checkpoint["fingerprint"],
        "eval.spec": result["spec"]["name"],
        "dataset.digest": result["data"]["digest"][:MAX_DIGEST],
        **({PARENT_TAG: parent} if parent else {}),
    }


def _log_evaluation(store: Store, parent: str | None, result: dict[str, Any], picture: Path) -> None:
    data = result["data"]
    run_id = store.find_or_create_run(KEY_TAG, result["key"], _name(result), _tags(result, parent), _time_ms(result))
    time_ms = store.start_ms(run_id)
    store.log_params(run_id, _params(result))
    points = evaluation_points(result, time_ms)
    for start in range(0, len(points), MAX_BATCH):
        store.log(run_id, points[start : start + MAX_BATCH])
    source = str(data.get("shards", ""))
    store.log_dataset(run_id, Path(source).name or "corpus", data["digest"][:MAX_DIGEST], source)
    store.log_artifacts(run_id, result, picture)
    store.set_status(run_id, "FINISHED")
    if parent:
        store.log(parent, evaluation_columns(result, time_ms))


def _params(result: dict[str, Any]) -> dict[str, str]:
    checkpoint = result["checkpoint"]
    return {
        "run": str(checkpoint["run"]),
        "step": str(checkpoint["step"]),
        "spec": str(result["spec"]["name"]),
        "checkpoint": str(checkpoint.get("path", "")),
    }


def evaluation_points(result: dict[str, Any], time_ms: int) -> list[Metric]:
    """Curves over context length: constant names, step = context length (the longest true one for modes without).

    Gains are differences of two modes, with the same steps. Of a synthetic task: curves over the size of the samples.
    """
    points: list[Metric] = []
    curve = [(entry["mode"], entry["context_tokens"], entry) for entry in result["curve"]]
    everything = [mode for mode in ("carried", "swapped", "local") if result.get(mode)]
    curve += [(mode, result[mode]["context_max"], result[mode]) for mode in everything]
    curves = [(f"ppl_vs_len/{mode}", length, entry) for mode, length, entry in curve]
    for name, length, entry in curves + _gains(result):
        points += [
            (f"{name}/{field}", float(entry[field]), time_ms, int(length))
            for field in ("bits_per_byte", "ci_low", "ci_high")
            if entry[field] is not None
        ]
    for test in result.get("tests", []):
        points += [
            (f"synthetic/{test['test']}/{field}", float(test[field]), time_ms, int(test["high"]))
            for field in ("accuracy", "ci_low", "ci_high")
        ]
    return points


def _gains(result: dict[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
    """(name, context length, interval) of every difference of modes that was measured."""
    found = [("memory_gain", result.get("memory_gain"))]
    found += [("position_effect", entry) for entry in result.get("position_effect") or []]
    found += [(name, result.get(name)) for name in ("content_gain", "local_gain")]
    whole = result["carried"]["context_max"]
    return [(name, entry.get("context_tokens", whole), entry) for name, entry in found if entry]


def evaluation_columns(result: dict[str, Any], time_ms: int) -> list[Metric]:
    """Sortable columns of the training run over training steps, e.g. `quick/bits_per_byte_truncated/ctx_00001024`.

    They begin with the spec's name: several specs share one training run.
    """
    step, spec = int(result["checkpoint"]["step"]), re.sub(r"[^\w. -]", "-", result["spec"]["name"], flags=re.ASCII)
    entries = [(entry["mode"], entry["context_tokens"], entry) for entry in result["curve"]]
    entries.append(("carried", result["carried"]["context_max"], result["carried"]))
    columns = [(f"bits_per_byte_{mode}/ctx_{length:08d}", entry["bits_per_byte"]) for mode, length, entry in entries]
    columns += [(f"accuracy_{t['test']}/size_{t['high']:08d}", t["accuracy"]) for t in result.get("tests", [])]
    if result.get("memory_gain"):
        columns.append(("memory_gain/bits_per_byte", result["memory_gain"]["bits_per_byte"]))
    return [(f"{spec}/{name}", float(value), time_ms, step) for name, value in columns]
