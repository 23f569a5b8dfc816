"""log.jsonl as a stream of metric points: whole lines only, each (kind, step) once, however often it is read.

A resumed run cuts its log back to the checkpoint's step and writes the following steps again. Those steps are not
points again: what was sent first stays.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PREFIXES = {"step": "train"}  # of metric names; any other kind is its own prefix
_NOT_METRICS = ("kind", "step", "time")
_ANCHOR_BYTES = 4096


@dataclass(frozen=True)
class LogLine:
    """The metrics of one line.

    Attributes:
        kind: `step`, `validation`, `checkpoint`, ...
        step: training step.
        time_ms: when the line was written, unix milliseconds.
        metrics: finite numbers by metric name.
        end: offset after the line, bytes.
    """

    kind: str
    step: int
    time_ms: int
    metrics: dict[str, float]
    end: int


@dataclass
class Position:
    """How far a log was read.

    Attributes:
        offset: bytes read, at the end of a line.
        anchor: hash of the bytes just before `offset`; if they changed, the log was cut and is read from the start.
        highest: highest step taken, per kind.
    """

    offset: int = 0
    anchor: str = ""
    highest: dict[str, int] = field(default_factory=dict)


class MetricLog:
    """Reads log.jsonl from a position on."""

    def __init__(self, path: Path, position: Position) -> None:
        """Args: path: log.jsonl, which may not exist yet; position: advanced by `advance`."""
        self._path = path
        self.position = position

    def has_content(self) -> bool:
        """Whether there is a line at all."""
        try:
            return self._path.stat().st_size > 0
        except OSError:
            return False

    def birth(self) -> str:
        """Hash of the first line: a resumed run keeps it, a run that starts anew writes another. Empty if none."""
        try:
            with self._path.open("rb") as file:
                first = file.readline()
        except OSError:
            return ""
        return hashlib.sha256(first).hexdigest()[:16] if first.endswith(b"\n") else ""

    def new_lines(self) -> Iterator[LogLine]:
        """Lines behind the position that were not taken before; call `advance` when a line is dealt with."""
        if not self.has_content():
            return
        with self._path.open("rb") as file:
            if self._anchor(file, self.position.offset) != self.position.anchor:
                self.position.offset, self.position.anchor = 0, ""
            file.seek(self.position.offset)
            end = self.position.offset
            seen = dict(self.position.highest)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return  # still being written
                end += len(raw)
                line = _parse(raw, end)
                if line is not None and line.step > seen.get(line.kind, -1):
                    seen[line.kind] = line.step
                    yield line

    def advance(self, lines: list[LogLine]) -> None:
        """Move the position behind `lines`, which were dealt with."""
        for line in lines:
            self.position.highest[line.kind] = max(line.step, self.position.highest.get(line.kind, -1))
        with self._path.open("rb") as file:
            self.position.anchor = self._anchor(file, lines[-1].end)
        self.position.offset = lines[-1].end

    @staticmethod
    def _anchor(file: Any, offset: int) -> str:
        if offset == 0:
            return ""
        start = max(0, offset - _ANCHOR_BYTES)
        file.seek(start)
        return hashlib.sha256(file.read(offset - start)).hexdigest()[:16]


def metric_prefix(kind: str) -> str:
    """First part of the names of a kind's metrics."""
    return _PREFIXES.get(kind, kind)


def kind_of(metric: str) -> str:
    """The kind of line that a metric came from."""
    prefix = metric.partition("/")[0]
    return next((kind for kind, name in _PREFIXES.items() if name == prefix), prefix)


def _parse(raw: bytes, end: int) -> LogLine | None:
    """The metrics of a line; None for a line that holds none or is damaged."""
    try:
        line = json.loads(raw)
        kind, step, time_ms = str(line["kind"]), int(line["step"]), int(float(line["time"]) * 1000)
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    metrics = {
        f"{metric_prefix(kind)}/{name}": float(value)
        for name, value in line.items()
        if name not in _NOT_METRICS and isinstance(value, (int, float)) and math.isfinite(value)
    }
    return LogLine(kind, step, time_ms, metrics, end) if metrics else None
