"""A tracking store that fails on demand, and the log of a trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class FakeStore:
    """Behaves like MLflow: the same point twice is one point; can be switched off; a copy survives restarts."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.reachable = True
        self.fail_after: int | None = None  # calls of `log` that still work
        self.calls = 0
        self.aliases: dict[tuple[str, str], tuple[str, dict[str, str]]] = {}

    def open(self) -> FakeStore:
        self._check()
        return self

    def _check(self) -> None:
        self.calls += 1
        if not self.reachable:
            raise ConnectionError("connection refused")

    def find_or_create_run(self, tag: str, value: str, name: str, tags: dict[str, str], start_ms: int) -> str:
        self._check()
        for run_id, run in self.runs.items():
            if run["tags"].get(tag) == value:
                return run_id
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = {
            "tags": {**tags, tag: value}, "points": set(), "sent": 0, "start_ms": start_ms,
            "params": {}, "artifacts": {}, "status": "RUNNING",
        }  # fmt: skip
        return run_id

    def start_ms(self, run_id: str) -> int:
        self._check()
        return int(self.runs[run_id]["start_ms"])

    def highest_steps(self, run_id: str) -> dict[str, int] | None:
        self._check()
        if run_id not in self.runs:
            return None
        steps: dict[str, int] = {}
        for name, _, _, step in self.runs[run_id]["points"]:
            steps[name] = max(step, steps.get(name, -1))
        return steps

    def log(self, run_id: str, metrics: list[tuple[str, float, int, int]]) -> None:
        self._check()
        assert 0 < len(metrics) <= 1000
        if self.fail_after is not None:
            if self.fail_after == 0:
                raise TimeoutError("timed out")
            self.fail_after -= 1
        self.runs[run_id]["points"].update(metrics)
        self.runs[run_id]["sent"] += len(metrics)

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        self._check()
        self.runs[run_id]["params"].update(params)

    def log_artifacts(self, run_id: str, result: dict[str, Any], picture: Path) -> None:
        self._check()
        self.runs[run_id]["artifacts"].update({"result.json": result, picture.name: picture.read_bytes()})

    def log_dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        self._check()
        assert len(digest) <= 36
        self.runs[run_id]["datasets"] = {(name, digest, source)}

    def set_alias(self, model: str, alias: str, run_id: str, tags: dict[str, str]) -> None:
        self._check()
        self.aliases[model, alias] = (run_id, tags)

    def set_status(self, run_id: str, status: str) -> None:
        self._check()
        self.runs[run_id]["status"] = status

    def points(self, name: str) -> list[tuple[int, float, int]]:
        """(step, value, time) of a metric of the first run, sorted."""
        run = self.runs["run0"]
        return sorted((step, value, time_ms) for key, value, time_ms, step in run["points"] if key == name)


def write_steps(run_dir: Path, first: int, last: int, time: float = 1000.0) -> None:
    """Append the log lines of steps `first` to `last`, as a trainer does."""
    with (run_dir / "log.jsonl").open("a") as file:
        for step in range(first, last + 1):
            line = {"kind": "step", "step": step, "time": time + step, "loss": 1 / step, "tokens": 32 * step}
            file.write(json.dumps(line) + "\n")


def cut_log(run_dir: Path, last_step: int) -> None:
    """Cut the log back behind a step, as a resumed trainer does."""
    file = run_dir / "log.jsonl"
    lines = [line for line in file.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= last_step]
    file.write_text("".join(lines))
