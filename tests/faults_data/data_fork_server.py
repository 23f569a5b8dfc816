"""A process that has torch and the readers imported and forks one life for each line that it reads.

Reads from standard input one JSON object a line, see `data_life.live`, with `plant`: the name of a bug or None.
Writes to standard output {"ready": true}, then for each line {"pid": number} and, when the child is gone,
{"status": number} (exit code, or minus the signal that ended it). It has no threads that a fork would lose.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_pipeline"))

import data_life
import data_planted
import webdataset  # noqa: F401  imported once, not in every life

from longspan.errors import LongspanError


def main() -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _answer(answers, ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_life(request))
        _answer(answers, pid=child)
        _answer(answers, status=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _answer(file: Any, **fields: Any) -> None:
    file.write(json.dumps(fields) + "\n")
    file.flush()


def _life(request: dict[str, Any]) -> int:
    log = os.open(Path(request["folder"]) / "messages", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    try:
        if request["plant"]:
            getattr(data_planted, request["plant"])()
        data_life.live(request)
        return 0
    except LongspanError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1


if __name__ == "__main__":
    main()
