"""The error tree of all rooms, and the exit code that each error ends a command with.

Every message says what happened, the offending value, what is allowed, and what to do next.
Exit codes: 0 done, 1 unexpected, 2 bad configuration or usage, 70 fault, 71 hang, 72 divergence,
75 stopped by a signal with everything saved; as any program's 141 if nobody reads its output any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

EXIT_OK = 0
EXIT_UNEXPECTED = 1
EXIT_USAGE = 2
EXIT_FAULT = 70
EXIT_HANG = 71
EXIT_DIVERGENCE = 72
EXIT_REQUEUE = 75
EXIT_READER_GONE = 128 + 13  # what a shell sees of a program that SIGPIPE ends


class LongspanError(Exception):
    """Root of all errors that Longspan raises on purpose.

    Attributes:
        exit_code: that it ends a command with.
        done: what the command came to before, as its `--json` would have said; goes with the message there.
    """

    exit_code = EXIT_UNEXPECTED
    done: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    Attributes:
        where: dotted path with its value where there is one, e.g. `data.segment_tokens = 4000`.
        what: what is wrong, what is allowed, and the nearest right value.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class ConfigError(LongspanError):
    """A configuration or command line is wrong; lists every problem found."""

    exit_code = EXIT_USAGE

    def __init__(self, subject: str, problems: list[Problem], advice: str | None = None) -> None:
        """Args: subject: what was read, e.g. a recipe's path; problems: all of them; advice: what to do next."""
        self.subject = subject
        self.problems = list(problems)
        count = len(self.problems)
        lines = [f"{count} problem{'' if count == 1 else 's'} in {subject}:"]
        lines += [f"  {problem}" for problem in self.problems]
        lines.append(advice or "Fix the recipe or pass --set section.field=value.")
        super().__init__("\n".join(lines))


class UsageError(LongspanError):
    """Inputs that do not fit together or cannot be used as given (exit 2)."""

    exit_code = EXIT_USAGE


class ShapeError(LongspanError, ValueError):
    """A tensor's shape breaks a function's contract; the message names both numbers."""


class DataError(LongspanError):
    """A shard, manifest or document does not hold what it should (exit 70)."""

    exit_code = EXIT_FAULT


class CheckpointError(LongspanError):
    """A checkpoint does not verify or cannot be read (exit 70); names file and range."""

    exit_code = EXIT_FAULT


class SecurityError(LongspanError):
    """An input would run code or leave its folder; refused (exit 70)."""

    exit_code = EXIT_FAULT


class ClusterError(LongspanError):
    """Processes, devices or a cluster service are not as asked for (exit 70)."""

    exit_code = EXIT_FAULT


class HangError(ClusterError):
    """A rank stopped answering (exit 71)."""

    exit_code = EXIT_HANG


class DivergenceError(LongspanError):
    """Too many steps in a row had NaN or Inf (exit 72); names the last good checkpoint."""

    exit_code = EXIT_DIVERGENCE


class Stopped(LongspanError):
    """Stopped by a signal with everything saved; the run can be resumed (exit 75)."""

    exit_code = EXIT_REQUEUE
