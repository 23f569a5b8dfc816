"""A process that has everything imported and forks one trainer for each line that it reads.

Importing torch and DeepSpeed takes many seconds and a forked child has them at once, so a life of the trainer costs
well under a second. The server itself never joins a process group and has no threads that a fork would lose.

Reads from standard input, one JSON object a line: {"config": file, "run_dir": folder, "log": file, "plant": name}.
Writes to standard output: {"ready": true}, then for each line {"pid": number} and, when the child is gone,
{"status": number} (exit code, or minus the signal that ended it).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import planted
import torch
import yaml

from longspan.errors import LongspanError
from longspan.trainer.config import RunConfig
from longspan.trainer.loop import train


def main() -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
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
    """One trainer, from start or resume to its end; its exit code."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    try:
        if request["plant"]:
            getattr(planted, request["plant"])()
        config = RunConfig.model_validate(yaml.safe_load(Path(request["config"]).read_text()))
        train(config, Path(request["run_dir"]), resume=True)
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
