"""What a person sees of a run: one live line on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_FIRST_STEPS = 3  # slower than the rest: not counted for the time left
_STEPS_BEFORE_ESTIMATE = 10
_LIVE_SECONDS = 0.1


class Progress:
    """Progress of one process on standard error; ranks other than 0 are silent."""

    def __init__(self, *, num_steps: int, interval_steps: int = 10, peak_flops: float | None, silent: bool) -> None:
        """
        Args:
            num_steps: steps of the whole run.
            interval_steps: steps between lines that stay.
            peak_flops: FLOP/s that the device can do at most, if known.
            silent: print nothing.
        """
        self._num_steps = num_steps
        self._interval = interval_steps
        self._peak = peak_flops
        self._silent = silent
        self._console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
        live = self._console.is_terminal and not silent
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if live else None
        self._shown = 0.0
        self._saved: int | None = None
        self._steps = 0
        self._spent = 0.0

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def note(self, message: str) -> None:
        """A line that stays."""
        if not self._silent:
            self._console.print(Text(f"longspan: {message}"))

    def saved(self, step: int, seconds: float, stall_seconds: float, waited_seconds: float) -> None:
        """A checkpoint was written, in `seconds`; training stood still for it, and for the save before it."""
        self._saved = step
        waited = f" after {waited_seconds:.2f} s of waiting for the save before" if waited_seconds >= 0.01 else ""
        self.note(f"step {step}: checkpoint saved in {seconds:.2f} s, training stalled {stall_seconds:.2f} s{waited}")

    def step(self, record: dict[str, Any], step: int, seconds: float) -> None:
        """One step is done.

        Args:
            record: fields of its log record.
            step: its number, from 1.
            seconds: wall time that it took.
        """
        self._steps += 1
        if self._steps > _FIRST_STEPS:
            self._spent += seconds
        if self._silent:
            return
        stays = step % self._interval == 0 or step == self._num_steps or self._steps == 1
        if stays:
            self._console.print(Text(self._line(record, step)))
        if self._live and (stays or time.monotonic() - self._shown > _LIVE_SECONDS):
            self._shown = time.monotonic()
            self._live.update(Text(self._line(record, step), style="bold"), refresh=True)

    def _line(self, record: dict[str, Any], step: int) -> str:
        flops = record["model_flops_per_second"]
        parts = [
            f"step {step}/{self._num_steps} ({100 * step / self._num_steps:.1f}%)",
            f"loss {record['loss']:.4f}",
            f"{record['bits_per_byte']:.3f} bits/byte",
            f"{record['tokens_per_second']:,.0f} tok/s",
            f"{_flops_text(flops)}" + (f" ({100 * flops / self._peak:.1f}% of peak)" if self._peak else ""),
            f"{record['memory_gib']:.2f} GiB",
            f"lr {record['lr']:.2e}",
            f"grad {record['grad_norm']:.3f}",
            f"skips {record['skips']}",
        ]
        if record["skipped"]:
            parts.append("SKIPPED: loss or gradient not finite")
        if self._saved is not None:
            parts.append(f"saved {self._saved}")
        left = self.seconds_left(step)
        if left is not None:
            parts.append(f"left {_duration(left)}")
        return "  ".join(parts)

    def seconds_left(self, step: int) -> float | None:
        """Estimate from the steps of this process, without the first ones; None before ten steps."""
        if self._steps < _STEPS_BEFORE_ESTIMATE:
            return None
        return self._spent / (self._steps - _FIRST_STEPS) * (self._num_steps - step)


def print_summary(summary: dict[str, Any], next_commands: list[str]) -> None:
    """The table at the end of a run, on standard output."""
    table = Table(title="Training finished", show_header=False, title_justify="left")
    rows = {
        "steps": f"{summary['steps']:,}",
        "tokens": f"{summary['tokens']:,}",
        "wall time": _duration(summary["seconds"]),
        "tokens/s": f"{summary['tokens_per_second']:,.0f}" if summary["tokens_per_second"] else "-",
        "final loss": _number(summary["loss"], "nats/token"),
        "held-out": _number(summary["validation_bits_per_byte"], "bits/byte"),
        "skipped steps": str(summary["skips"]),
        "failed saves": str(summary["checkpoint_failures"]),
        "checkpoint": str(summary["checkpoint"]),
        "run directory": str(summary["run_dir"]),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print("Next:")
    for command in next_commands:
        console.print(Text(f"  {command}"))


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.4f} {unit}"


def _flops_text(flops: float) -> str:
    for unit, size in (("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if flops >= size:
            return f"{flops / size:.1f} {unit}"
    return f"{flops / 1e6:.1f} MFLOP/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
