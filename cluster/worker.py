"""What torchrun starts on each rank: a Longspan command, with its end recorded. Imports no torch itself.

`python -m longspan.cluster.worker MODULE ARGUMENT...` runs MODULE as `__main__`, in this process.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from types import FrameType
from typing import NoReturn

from longspan.cluster import exit_records
from longspan.errors import EXIT_OK, EXIT_REQUEUE, EXIT_UNEXPECTED

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when the one that started it dies (prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(argv: list[str]) -> NoReturn:
    """Args: argv: module to run, then its arguments; exits as `exit_records.leave` says."""
    end_with_parent()
    # a stop that comes while torch is still loading finds nothing to save; training sets its own handlers
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _stop_early)
    exit_records.arrive()
    module, sys.argv = argv[0], argv
    code = EXIT_OK
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else EXIT_OK if ended.code is None else EXIT_UNEXPECTED
    except BaseException as error:
        exit_records.note(f"unexpected {type(error).__name__}: {error}")
        exit_records.leave(EXIT_UNEXPECTED)
        raise
    sys.exit(exit_records.leave(code))


def _stop_early(number: int, frame: FrameType | None) -> NoReturn:
    exit_records.note(f"stopped by {signal.Signals(number).name} outside of training: there was nothing to save.")
    os._exit(exit_records.leave(EXIT_REQUEUE))


if __name__ == "__main__":
    main(sys.argv[1:])
