"""A process that has everything imported and forks one life for each line that it reads.

Importing torch and all that follows takes many seconds and a forked child has it at once, so a life costs well under a
second. The server itself never joins a process group and has no threads that a fork would lose.

Reads from standard input one JSON object a line, the request of a life. Writes to standard output {"ready": true},
then for each line {"pid": number} and, when the child is gone, {"status": number} (exit code, or minus the signal that
ended it).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longspan.errors import LongspanError

Request = dict[str, Any]


def serve(live: Callable[[Request], None], messages_of: Callable[[Request], Path]) -> None:
    """Serve until standard input ends.

    Args:
        live: one life, in a process of its own. messages_of: the file that its output is added to.
    """
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    _answer(answers, ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_exit_code(live, request, messages_of(request)))
        _answer(answers, pid=child)
        _answer(answers, status=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _answer(file: Any, **fields: Any) -> None:
    file.write(json.dumps(fields) + "\n")
    file.flush()


def _exit_code(live: Callable[[Request], None], request: Request, messages: Path) -> int:
    """Of one life, from its start to its end."""
    log = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    try:
        live(request)
        return 0
    except LongspanError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
