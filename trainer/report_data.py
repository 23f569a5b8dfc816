"""What a report shows, read from the files of a run directory. Nothing here needs torch, and every part may be missing.

A run that stopped early has a torn last log line, no evaluation, perhaps no checkpoint; it still gets its report.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longspan.errors import UsageError

Entry = dict[str, Any]


@dataclass
class RunRecord:
    """All that is known about a run.

    Attributes:
        path: the run directory.
        config: resolved configuration, as plain data.
        config_text: the same as it stands in the file.
        steps: log entries of optimizer steps, one a step, ascending.
        validations, checkpoints, failures: log entries of these kinds, in log order.
        other: log entries of all further kinds (start, stop, ...), in log order.
        evaluations: result.json of every finished evaluation by context length, by checkpoint step, ascending.
        tasks: the same of evaluations on synthetic tasks.
        committed: committed checkpoints of this run on disk, ascending: step, name, manifest.
        manifest: the data manifest, or None when the shards are not here.
    """

    path: Path
    config: Entry = field(default_factory=dict)
    config_text: str = ""
    steps: list[Entry] = field(default_factory=list)
    validations: list[Entry] = field(default_factory=list)
    checkpoints: list[Entry] = field(default_factory=list)
    failures: list[Entry] = field(default_factory=list)
    other: list[Entry] = field(default_factory=list)
    evaluations: list[Entry] = field(default_factory=list)
    tasks: list[Entry] = field(default_factory=list)
    committed: list[Entry] = field(default_factory=list)
    manifest: Entry | None = None


def read_run(run: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UsageError: there is neither a configuration nor a log, so this is no run directory.
    """
    if not (run / "config.yaml").is_file() and not (run / "log.jsonl").is_file():
        raise UsageError(
            f"{run} is no run directory: it has neither config.yaml nor log.jsonl. "
            "Give the folder that `longspan train --run-dir` wrote."
        )
    record = RunRecord(run)
    _read_config(record)
    _read_log(record)
    results = read_evaluations(run)
    record.evaluations = [result for result in results if result.get("kind") != "synthetic"]
    record.tasks = [result for result in results if result.get("kind") == "synthetic"]
    record.committed = _read_checkpoints(run)
    record.manifest = _read_manifest(record)
    return record


def read_evaluations(run: Path) -> list[Entry]:
    """Results of the finished evaluations of a run, ascending by checkpoint step; `_SUCCESS` marks a finished one."""
    results = []
    for marker in sorted((run / "evals").glob("[!.]*/_SUCCESS")):
        result = _read_json(marker.parent / "result.json")
        if isinstance(result, dict) and isinstance(result.get("curve"), list):
            results.append({**result, "folder": marker.parent.name})
    return sorted(results, key=lambda result: (checkpoint_step(result), result["folder"]))


def checkpoint_step(result: Entry) -> int:
    """Step of the checkpoint that a result belongs to; -1 if it does not say."""
    step = (result.get("checkpoint") or {}).get("step", -1)
    return step if isinstance(step, int) else -1


def number(entry: Entry, key: str) -> float | None:
    """The entry's value as a finite number, or None."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def points(entries: list[Entry], key: str) -> list[tuple[float, float]]:
    """(step, value) of all entries where both are finite numbers."""
    pairs = [(number(entry, "step"), number(entry, key)) for entry in entries]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _read_config(record: RunRecord) -> None:
    path = record.path / "config.yaml"
    if not path.is_file():
        return
    record.config_text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(record.config_text)
    except yaml.YAMLError:
        return
    record.config = config if isinstance(config, dict) else {}


def _read_log(record: RunRecord) -> None:
    path = record.path / "log.jsonl"
    if not path.is_file():
        return
    steps: dict[int, Entry] = {}
    validations: dict[int, Entry] = {}
    lists = {
        "checkpoint": record.checkpoints,
        "checkpoint_failure": record.failures,
    }
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            entry = _parse(line)
            if not isinstance(entry, dict):
                continue  # the torn last line of a killed run
            kind, step = entry.get("kind"), entry.get("step")
            if kind == "step" and isinstance(step, int):
                # a resumed run goes over the steps after its checkpoint once more: what it wrote last counts
                steps[step] = entry
            elif kind == "validation" and isinstance(step, int):
                validations[step] = entry
            else:
                lists.get(str(kind), record.other).append(entry)
    record.steps = [steps[step] for step in sorted(steps)]
    record.validations = [validations[step] for step in sorted(validations)]


def _read_checkpoints(run: Path) -> list[Entry]:
    found = []
    for marker in sorted((run / "checkpoints").glob("step-*/COMMITTED")):
        digits = marker.parent.name.removeprefix("step-")
        if digits.isdigit():
            manifest = _read_json(marker.parent / "manifest.json")
            found.append(
                {
                    "step": int(digits),
                    "name": marker.parent.name,
                    "manifest": manifest if isinstance(manifest, dict) else {},
                    "committed": marker.read_text(encoding="utf-8", errors="replace").strip(),
                    "bytes": sum(file.stat().st_size for file in marker.parent.rglob("*") if file.is_file()),
                    "parameters": count_parameters(marker.parent / "weights"),
                }
            )
    return found


def count_parameters(folder: Path) -> int:
    """Numbers in all tensors of a folder's safetensors files, read from their headers alone."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = _parse(file.read(length).decode("utf-8", errors="replace")) if length < 2**27 else None
        for name, entry in (header or {}).items():
            if name != "__metadata__":
                total += math.prod(entry["shape"])
    return total


def _read_manifest(record: RunRecord) -> Entry | None:
    data = record.config.get("data")
    shards = data.get("shards") if isinstance(data, dict) else None
    if not isinstance(shards, str):
        return None
    manifest = _read_json(Path(shards) / "manifest.json")
    return manifest if isinstance(manifest, dict) else None


def _read_json(path: Path) -> Any:
    try:
        return _parse(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
