"""One whole story: reconcilers at work, kills until there are enough of them, and what must be true at the end."""

from __future__ import annotations

import json
import random
import sqlite3
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from world import RayHost, Reconciler, Server, kill_worker, read_events

sys.path.insert(0, str(Path(__file__).parent.parent / "evaluation"))
import tiny_run

from longspan.trainer import recipes
from longspan.trainer.evaluation import folders
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.evaluation.worker import EvaluationWorker
from longspan.trainer.evaluation_tracking import evaluation_columns, evaluation_points

SPEC = {
    "spans_per_document": 1, "context_tokens": [8, 16], "bootstrap_samples": 100,
    "modes": ["truncated", "carried"], "batch_tokens": 512,
}  # fmt: skip
CHANGES_BY_THEMSELVES = ("seconds", "environment")


@dataclass
class Setting:
    """Where a story takes place."""

    folder: Path
    run: Path
    specs: list[Path]
    server: Server
    expected: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, checkpoints: int, num_specs: int) -> Setting:
        """A run of `checkpoints` checkpoints with a log, and a tracking server that is not started yet."""
        corpus = tiny_run.corpus(folder)
        server = Server(folder)
        config = tiny_run.config(corpus, tracked=True)
        tracking = config.tracking.model_copy(update={"uri": server.uri})
        config = config.model_copy(update={"tracking": tracking})
        run = tiny_run.run_directory(folder / "runs" / "tiny", config, steps=tuple(range(1, checkpoints + 1)))
        lines = [{"kind": "step", "step": step, "time": 1000.0 + step, "loss": 1 / step} for step in (1, 2, 3)]
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        specs = []
        for number in range(num_specs):
            place = folder / f"spec{number}"
            place.mkdir()
            specs.append(tiny_run.spec_file(place, name=f"spec{number}", **SPEC, span_bytes=16 + 8 * number))
        return cls(folder, run, specs, server)

    def evaluate_undisturbed(self) -> None:
        """What every result must be: the same steps, in this process, elsewhere."""
        worker, out = EvaluationWorker(), self.folder / "undisturbed"
        worker._run.curve_png = lambda result, path: path.write_bytes(b"")  # type: ignore[attr-defined]
        for checkpoint in sorted((self.run / "checkpoints").glob("step-*")):
            for path in self.specs:
                spec = recipes.load(EvaluationSpec, path)
                key = folders.key_of(checkpoint, spec)
                request = {
                    "key": key, "checkpoint": str(checkpoint), "spec": spec.model_dump_json(), "out": str(out),
                    "attempt": 1,
                }  # fmt: skip
                opened = worker.run("open", request)
                for shard in range(opened["shards"]):
                    assert worker.run("score", {**request, "shard": shard}) == {}
                assert worker.run("finish", request) == {}
                self.expected[key] = json.loads((out / key / "result.json").read_text())

    def evaluated(self) -> int:
        """Results that are whole, as far as their marker says."""
        return len(list((self.run / "evals").glob("[!.]*/_SUCCESS")))

    def logged(self) -> int:
        """Results that MLflow has, as far as their marker says."""
        return len(list((self.run / "evals").glob("[!.]*/_LOGGED")))


class Watcher:
    """Looks all the time for a `_SUCCESS` that promises too much."""

    def __init__(self, run: Path) -> None:
        self._evals = run / "evals"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._seen: set[str] = set()
        self.problems: list[str] = []

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for marker in self._evals.glob("[!.]*/_SUCCESS"):
                if marker.parent.name not in self._seen:
                    self._seen.add(marker.parent.name)
                    try:
                        result = json.loads((marker.parent / "result.json").read_text())
                        assert result["key"] == marker.parent.name and (marker.parent / "curve.png").stat().st_size
                    except (OSError, ValueError, AssertionError) as error:
                        self.problems.append(f"{marker.parent.name} is not whole: {error}")


def tell(
    setting: Setting, *, kills: dict[str, int], seed: int, reconcilers: int, bug: str = "none", seconds: float
) -> Counter[str]:
    """Reconcilers at work until everything is evaluated and logged, with kills all along; the kills that landed.

    Args:
        setting: where.
        kills: how many of `worker`, `driver` and `mlflow`.
        seed: of the choices.
        reconcilers: at once; the last one has a Ray cluster of its own, if there are three.
        bug: planted in all of them.
        seconds: limit.
    """
    generator, landed, deadline = random.Random(seed), Counter[str](), time.monotonic() + seconds
    expected = len(setting.expected)
    setting.server.start()
    ray = RayHost(setting.folder, cpus=2 * reconcilers + 2)
    ray.start()
    crew = [
        Reconciler(setting.folder, f"r{i}", setting.run, setting.specs, None if i == 2 else ray, bug)
        for i in range(reconcilers)
    ]
    todo = [kind for kind, count in kills.items() for _ in range(count)]
    generator.shuffle(todo)
    # a worker is there only while something is left to evaluate: the last kill is another's
    for kind in [kind for kind in todo if kind != "worker"][-1:]:
        todo.remove(kind)
        todo.append(kind)
    total, back_at = len(todo), 0.0
    try:
        with Watcher(setting.run) as watcher:
            while todo or setting.logged() < expected:
                assert time.monotonic() < deadline, (
                    f"{setting.evaluated()} evaluated, {setting.logged()} logged of {expected}; kills {landed}, "
                    f"{len(todo)} to go\n" + "\n".join(member.messages() for member in crew)
                )
                for member in crew:
                    member.keep_alive()
                if not setting.server.is_running() and time.monotonic() >= back_at:
                    setting.server.start(wait=False)
                # so many kills for so much done: the last one falls when nine tenths are evaluated
                due = total * min(1.0, setting.evaluated() / (0.9 * expected))
                if todo and total - len(todo) <= due:
                    time.sleep(generator.uniform(0, 0.5))
                    kind = _possible(todo, setting)
                    if kind is not None and _kill(kind, setting, crew, ray, generator):
                        todo.remove(kind)
                        landed[kind] += 1
                        back_at = time.monotonic() + generator.uniform(0, 5) if kind == "mlflow" else back_at
                time.sleep(0.05)
        for member in crew:
            member.kill()
        setting.server.wait()
        crew[0].once(deadline - time.monotonic())  # undisturbed: clears up what the last kill left
        assert not watcher.problems, watcher.problems
    finally:
        for member in crew:
            member.kill()
        ray.close()
        setting.server.close()
    return landed


def _possible(todo: list[str], setting: Setting) -> str | None:
    """The next kill; one of MLflow waits until it answers, and does not hold up the others."""
    down = not setting.server.answers()
    return next((kind for kind in todo if kind != "mlflow" or not down), None)


def _kill(kind: str, setting: Setting, crew: list[Reconciler], ray: RayHost, generator: random.Random) -> bool:
    if kind == "mlflow":
        return setting.server.kill()
    if kind == "driver":
        return generator.choice(crew).kill()
    roots = [process.pid for process in [ray.process, *(member.process for member in crew)] if process is not None]
    return kill_worker(roots, generator)


def problems_of(setting: Setting, kills: int) -> list[str]:
    """Everything that is not as it must be, after a story."""
    return [*_result_problems(setting), *_double_runs(setting, kills), *mlflow_problems(setting)]


def _result_problems(setting: Setting) -> list[str]:
    problems = []
    evals = setting.run / "evals"
    found = {marker.parent.name for marker in evals.glob("[!.]*/_SUCCESS")}
    problems += [f"{key} is missing" for key in sorted(setting.expected.keys() - found)]
    problems += [f"{key} was not asked for" for key in sorted(found - setting.expected.keys())]
    for key in sorted(found & setting.expected.keys()):
        result, expected = json.loads((evals / key / "result.json").read_text()), setting.expected[key]
        for name in expected.keys() - set(CHANGES_BY_THEMSELVES):
            if result.get(name) != expected[name]:
                problems.append(f"{key}: {name} is not that of the undisturbed run")
    problems += [f"failed: {path.name}" for path in (evals / "failed").glob("*.json")]
    problems += [f"left over: {path.name}" for path in [*evals.glob(".tmp-*"), *(evals / "work").iterdir()]]
    problems += [f"still pinned: {path}" for path in (setting.run / "checkpoints" / "pins").glob("step-*/*")]
    return problems


def _double_runs(setting: Setting, kills: int) -> list[str]:
    """Shards that were scored twice; a kill excuses one: what a dead reconciler's workers finish before they end."""
    scored = Counter((event["key"], event["shard"]) for event in read_events(setting.run) if event["event"] == "scored")
    twice = sum(count - 1 for count in scored.values())
    return [f"{twice} shards were scored more than once, with {kills} kills"] if twice > kills else []


def mlflow_problems(setting: Setting) -> list[str]:
    """Runs and points that the tracking database has too few or too many of."""
    problems = []
    training: Counter[Any] = Counter()
    with sqlite3.connect(setting.server.database) as rows:
        active = dict(
            rows.execute(
                "select t.run_uuid, t.value from tags t join runs r on r.run_uuid = t.run_uuid "
                "where t.key = 'eval.key' and r.lifecycle_stage = 'active'"
            ).fetchall()
        )
        times = Counter(active.values())
        problems += [f"MLflow has {times[key]} runs of {key}" for key in setting.expected if times[key] != 1]
        for run_id, key in active.items():
            result = json.loads((setting.run / "evals" / key / "result.json").read_text())
            committed = int(result["checkpoint"]["committed"] * 1000)
            points = rows.execute("select key, value, timestamp, step from metrics where run_uuid = ?", (run_id,))
            if Counter(points.fetchall()) != Counter(evaluation_points(result, committed)):
                problems.append(f"MLflow has other points of {key}")
            training.update(evaluation_columns(result, committed))
        columns = rows.execute(
            "select m.key, m.value, m.timestamp, m.step from metrics m join runs r on r.run_uuid = m.run_uuid where "
            "r.lifecycle_stage = 'active' and m.key like 'spec%' "
            "and m.run_uuid not in (select run_uuid from tags where key = 'eval.key')"
        )
        if Counter(columns.fetchall()) != training:
            problems.append("MLflow has other columns of the training run")
    return problems
